"""torch on slots: the path of a GPU on streams of the host, against the plain path of a CPU."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from engines.cuda import device_problem
from engines.errors import CudaError, EngineCorruptError, EngineError, OutOfDeviceMemoryError
from engines.model import FeatureInput, ModelSpec, input_spec
from engines.runner import Array, DeviceRows, Outputs, TensorSpec
from engines.torch_cuda import TorchGpu
from engines.torch_program import load_program, save_program
from engines.torch_run import TorchMode, TorchRunner
from tests.engines.host_streams import Faults, HostDeviceRows, HostStreams
from tests.engines.small_models import image_rows
from tests.engines.small_torch import PICTURES

Program = tuple[Path, tuple[TensorSpec, ...]]
BATCH = 4
PROBLEM = device_problem()


INPUT = input_spec(PICTURES, BATCH)


class HostTorch(TorchGpu):
    """Device memory is the host's; what is queued runs when the stream comes to it."""

    def __init__(self, streams: HostStreams) -> None:
        self.streams = streams
        self.modules: list[weakref.ref[torch.nn.Module]] = []
        self.left: list[int] = []
        """Modules that were alive each time that memory was given back."""

    def load(self, program: Path) -> torch.nn.Module:
        module = load_program(program)
        self.modules.append(weakref.ref(module))
        return module

    def tensor(self, address: int, spec: TensorSpec) -> torch.Tensor:
        return torch.from_numpy(self.streams.view(address, np.dtype(spec.dtype), spec.shape))

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        self.streams.enqueue("compute", stream, work)

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        assert self.streams.num_owned, "the slots' memory goes last"
        super().release()
        self.left.append(sum(module() is not None for module in self.modules))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    path = tmp_path_factory.mktemp("torch") / "pictures.pt2"
    return path, save_program(PICTURES, BATCH, path)


@pytest.fixture(params=range(6), ids="order {}".format)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostTorch:
    return use_host(monkeypatch, HostStreams(request.param))


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> HostTorch:
    return use_host(monkeypatch, HostStreams(7))


def use_host(monkeypatch: pytest.MonkeyPatch, streams: HostStreams) -> HostTorch:
    gpu = HostTorch(streams)
    monkeypatch.setattr("engines.torch_cuda.CudaStreams", lambda: streams)
    monkeypatch.setattr("engines.torch_run.TorchGpu", lambda: gpu)
    return gpu


def runner_on(device: Any, program: Program, **mode: bool) -> TorchRunner:
    path, outputs = program
    how = TorchMode(device=device, **{"is_compiled": False, **mode})  # type: ignore[arg-type]
    return TorchRunner(path, INPUT, outputs, 2, how)


def batches(num_batches: int) -> list[Array]:
    """The first of always the same batches."""
    return list(image_rows(11 * BATCH, seed=8).reshape(11, *INPUT.shape)[:num_batches])


def plain(program: Program, rows: list[Array]) -> list[Outputs]:
    with runner_on("cpu", program) as runner:
        return list(runner.infer(rows))


def check(found: list[Outputs], expected: list[Outputs]) -> None:
    for some, others in zip(found, expected, strict=True):
        for array, wanted in zip(some, others, strict=True):
            assert array.dtype == wanted.dtype
            np.testing.assert_allclose(array, wanted, atol=1e-5)


def test_batches_on_slots_answer_as_on_the_cpu_whatever_the_order_of_work(
    gpu: HostTorch, program: Program
) -> None:
    with runner_on("cuda", program) as runner:
        found = list(runner.infer(batches(11)))
        again = list(runner.infer(batches(2)))
    check(found, plain(program, batches(11)))
    check(again, found[:2])
    assert gpu.streams.num_owned == 0


def test_rows_in_device_memory_full_or_not_are_taken_among_others(
    gpu: HostTorch, program: Program
) -> None:
    rows = [batch[: 1 + number % BATCH] for number, batch in enumerate(batches(9))]

    def source() -> Iterator[Array | DeviceRows | None]:
        for number, batch in enumerate(rows):
            full = len(batch) == BATCH and number % 2
            yield batch if full else HostDeviceRows(gpu.streams, batch.copy())
            if number % 3 == 0:
                yield None

    with runner_on("cuda", program) as runner:
        found = list(runner.infer(source()))
    expected = plain(program, batches(9))
    check(
        found,
        [
            tuple(array[: len(few)] for array in outputs)
            for outputs, few in zip(expected, rows, strict=True)
        ],
    )


def test_a_runner_of_the_cpu_refuses_rows_in_device_memory_in_one_sentence(
    program: Program,
) -> None:
    rows = HostDeviceRows(HostStreams(), batches(1)[0].copy())
    said = (
        r"^engine input rows: \(4, .*\) in device memory; expected host memory\. Decode on the CPU"
    )
    with runner_on("cpu", program) as runner:
        with pytest.raises(EngineError, match=said):
            list(runner.infer([rows]))
        assert len(list(runner.infer(batches(2)))) == 2


def test_a_stream_that_is_closed_early_leaves_nothing_running(
    gpu: HostTorch, program: Program
) -> None:
    with runner_on("cuda", program) as runner:
        for _ in range(2):
            stream = cast("Generator[Outputs]", runner.infer(batches(9)))
            with closing(stream) as outputs:
                next(outputs)
            assert gpu.streams.num_pending == 0
        found = list(runner.infer(batches(3)))
    check(found, plain(program, batches(3)))


def test_planes_give_the_same_answers(one_gpu: HostTorch, program: Program) -> None:
    with runner_on("cuda", program, is_channels_last=False) as runner:
        found = list(runner.infer(batches(3)))
    check(found, plain(program, batches(3)))
    assert one_gpu.left == [0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_program_runs_on_slots(one_gpu: HostTorch, program: Program) -> None:
    with runner_on("cuda", program, is_compiled=True) as runner:
        assert runner.fallback is None
        found = list(runner.infer(batches(5)))
    check(found, plain(program, batches(5)))
    assert one_gpu.left == [0]


def test_without_a_compiler_slots_are_made_anew_for_the_eager_program(
    one_gpu: HostTorch, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_later(*_: object, **__: object) -> Callable[..., Any]:
        def fail(_: torch.Tensor) -> Any:
            raise RuntimeError("no Triton")

        return fail

    monkeypatch.setattr(torch, "compile", compile_later)
    with runner_on("cuda", program, is_compiled=True) as runner:
        assert runner.fallback == "RuntimeError: no Triton"
        assert one_gpu.left == [1]
        found = list(runner.infer(batches(4)))
    check(found, plain(program, batches(4)))


def test_weights_go_when_the_runner_is_left_and_it_can_be_entered_again(
    one_gpu: HostTorch, program: Program
) -> None:
    runner = runner_on("cuda", program)
    answers = []
    for _ in range(2):
        with runner:
            answers.append(list(runner.infer(batches(2))))
    check(*answers)
    assert one_gpu.left == [0, 0]


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float16"}, {"shape": (BATCH, 6)}, {"shape": (2, BATCH, 5)}]
)
def test_outputs_that_do_not_fit_are_neither_converted_nor_repeated(
    one_gpu: HostTorch, program: Program, wrong: dict[str, Any]
) -> None:
    path, outputs = program
    outputs = tuple(replace(s, **wrong) if s.name == "logits" else s for s in outputs)
    runner = runner_on("cuda", (path, outputs))
    with pytest.raises(EngineCorruptError, match=r"its logits is torch\.float32 \(4, 5\)"), runner:
        pytest.fail("it was opened")
    assert one_gpu.streams.num_owned == 0


def test_memory_that_does_not_suffice_has_its_own_error_and_is_given_back(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Faults(calls={("device", 3): OutOfDeviceMemoryError("full")})
    gpu = use_host(monkeypatch, HostStreams(1, full))
    with pytest.raises(OutOfDeviceMemoryError, match="full"), runner_on("cuda", program):
        pytest.fail("it was opened")
    assert gpu.streams.num_owned == 0


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (torch.OutOfMemoryError("2 GiB"), OutOfDeviceMemoryError, "2 GiB; expected room"),
        (torch.AcceleratorError("lost"), CudaError, "lost; expected success"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            OutOfDeviceMemoryError,
            "CUBLAS_STATUS_ALLOC_FAILED.*expected room",
        ),
        (RuntimeError("mat1 and mat2"), RuntimeError, "^mat1 and mat2$"),
    ],
)
def test_errors_of_the_device_are_told_as_those_of_other_runtimes(
    error: Exception, expected: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    with pytest.raises(expected, match=said):
        TorchGpu().queue(5, fail)


@pytest.mark.skipif(PROBLEM is None, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_so_in_one_sentence(program: Program) -> None:
    with pytest.raises(EngineError, match=r"^CUDA: .*; expected"), runner_on("cuda", program):
        pytest.fail("it was opened")


def test_a_torch_without_cuda_says_so(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.torch_cuda.device_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"cannot use the GPU .*; expected a build"):
        TorchGpu().load(program[0])


def users_model() -> torch.nn.Module:
    class Numbered(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows + torch.arange(rows.shape[1])

    return Numbered()


def test_a_program_that_is_moved_names_the_new_device_everywhere(tmp_path: Path) -> None:
    spec = ModelSpec(
        source=f"{__name__}:users_model", input=FeatureInput(num_features=3), head="scores"
    )
    save_program(spec, BATCH, tmp_path / "p.pt2")
    module = load_program(tmp_path / "p.pt2", "meta")
    assert module(torch.zeros(BATCH, 3, device="meta"))["score"].device.type == "meta"
    graph = cast("torch.fx.GraphModule", module).graph
    named = [node.kwargs["device"] for node in graph.nodes if "device" in node.kwargs]
    assert len(named) >= 2, "it makes a tensor, and checks its input"
    assert set(map(str, named)) == {"meta"}
