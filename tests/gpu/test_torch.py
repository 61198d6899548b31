"""torch on a real GPU: the CPU's answers in both precisions, in order, with rows of either memory.

Never executed so far: there was no GPU where it was written, and the torch there had no CUDA. What
`tests/engines/test_torch_cuda.py` shows over streams of the host is here asked of a device.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from engines.cuda import CudaStreams, device_problem
from engines.errors import OutOfDeviceMemoryError
from engines.model import ImageInput, ModelSpec, input_spec
from engines.runner import Array, DeviceRows, Outputs, TensorSpec
from engines.torch_cuda import TorchGpu
from engines.torch_program import TorchPrecision, save_program
from engines.torch_run import TorchMode, TorchRunner
from tests.gpu.device_rows import CudaRows


def problem() -> str | None:
    return device_problem() or (None if torch.cuda.is_available() else "torch: without CUDA")


PROBLEM = problem()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or ""),
    pytest.mark.timeout(600),
]

BATCH = 32
SIZE = 64
NUM_BATCHES = 24
LARGEST_DIFFERENCE = {"fp32": 0.01, "fp16": 0.03}
"""Of the largest logit: convolutions in TF32, or in fp16."""


class Residual(torch.nn.Module):
    """A convolution with its input added, so that layers share tensors."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(num_channels)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(planes)) + planes)


def residual_model() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3, padding=1, stride=2),
        *(Residual(64) for _ in range(6)),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )


SPEC = ModelSpec(
    source=f"{__name__}:residual_model",
    input=ImageInput(height=SIZE, width=SIZE, mean=(124.0, 116.0, 104.0), std=(58.0, 57.0, 57.0)),
    head="classes",
    top_k=3,
)
INPUT = input_spec(SPEC, BATCH)
Program = tuple[Path, tuple[TensorSpec, ...]]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def precision(request: pytest.FixtureRequest) -> TorchPrecision:
    return cast(TorchPrecision, request.param)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, precision: TorchPrecision) -> Program:
    path = tmp_path_factory.mktemp("torch") / f"{precision}.pt2"
    return path, save_program(SPEC, BATCH, path, precision)


def on_gpu(program: Program, *, is_compiled: bool = False) -> TorchRunner:
    path, outputs = program
    return TorchRunner(path, INPUT, outputs, 1, TorchMode(device="cuda", is_compiled=is_compiled))


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "compiled"])
def runner(request: pytest.FixtureRequest, program: Program) -> Iterator[TorchRunner]:
    with on_gpu(program, is_compiled=request.param) as opened:
        assert opened.fallback is None
        yield opened


@pytest.fixture(scope="module")
def rows() -> list[Array]:
    rng = np.random.default_rng(9)
    coarse = rng.integers(0, 256, (NUM_BATCHES, BATCH, 8, 8, 3), dtype=np.uint8)
    return list(coarse.repeat(SIZE // 8, axis=2).repeat(SIZE // 8, axis=3))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, rows: list[Array]) -> list[Array]:
    """Logits in fp32 on the CPU."""
    path = tmp_path_factory.mktemp("cpu") / "p.pt2"
    outputs = save_program(SPEC, BATCH, path)
    with TorchRunner(path, INPUT, outputs, 4, TorchMode(is_compiled=False)) as cpu:
        return [outputs[-1] for outputs in cpu.infer(rows)]


def logits(found: Iterator[Outputs]) -> list[Array]:
    return [outputs[-1] for outputs in found]


def check(found: list[Array], expected: list[Array], tolerance: float) -> None:
    """Each batch has its own logits: those of another batch are much farther away."""
    largest = max(np.abs(array).max() for array in expected)
    for some, wanted in zip(found, expected, strict=True):
        assert some.dtype == np.float32
        np.testing.assert_allclose(some, wanted, rtol=0, atol=tolerance * largest)


def test_it_answers_as_the_cpu_in_fp32_does_batch_by_batch(
    runner: TorchRunner, rows: list[Array], expected: list[Array], precision: TorchPrecision
) -> None:
    spread = np.stack(expected)
    assert np.abs(spread[1:] - spread[:-1]).max() > 0.1 * np.abs(spread).max(), "batches differ"
    for _ in range(3):
        check(logits(runner.infer(rows)), expected, LARGEST_DIFFERENCE[precision])


def test_batches_in_flight_do_not_touch_each_other(runner: TorchRunner, rows: list[Array]) -> None:
    together = list(runner.infer(rows))
    for batch, outputs in zip(rows, together, strict=True):
        ((class_id, probability, found),) = runner.infer([batch])
        assert (class_id.dtype, class_id.shape) == (np.int32, (BATCH, 3))
        np.testing.assert_allclose(found, outputs[2], atol=1e-5)
        np.testing.assert_allclose(probability, outputs[1], atol=1e-5)


def test_rows_of_host_and_device_may_alternate_and_be_few(
    runner: TorchRunner, rows: list[Array]
) -> None:
    full = logits(runner.infer(rows))
    few = [
        batch[: 1 + 7 * number % BATCH] if number % 2 else batch
        for number, batch in enumerate(rows)
    ]

    def source() -> Iterator[Array | DeviceRows | None]:
        for number, batch in enumerate(few):
            yield CudaRows(batch) if number % 2 else batch
            if number % 5 == 0:
                yield None

    found = logits(runner.infer(source()))
    for some, batch, wanted in zip(found, few, full, strict=True):
        np.testing.assert_allclose(some, wanted[: len(batch)], atol=1e-5)


def test_a_stream_that_is_closed_early_does_no_harm(
    runner: TorchRunner, rows: list[Array], expected: list[Array], precision: TorchPrecision
) -> None:
    for _ in range(3):
        with closing(cast("Generator[Outputs]", runner.infer(rows))) as outputs:
            next(outputs)
    check(logits(runner.infer(rows)), expected, LARGEST_DIFFERENCE[precision])


def test_it_can_be_left_and_entered_again_and_gives_its_memory_back(
    program: Program, rows: list[Array]
) -> None:
    runner = on_gpu(program)
    answers, kept = [], []
    for _ in range(4):
        with runner:
            answers.append(logits(runner.infer(rows)))
        kept.append(torch.cuda.memory_reserved())
    for found in answers[1:]:
        check(found, answers[0], 1e-4)
    # cuBLAS has a workspace for each stream that it ever met: some 32 MiB each on Hopper.
    assert kept[-1] - kept[0] <= 3 * 64 * 2**20, kept


def test_a_tensor_over_device_memory_is_a_view_not_a_copy() -> None:
    spec = TensorSpec(name="x", dtype="int32", shape=(4, 5))
    torch.cuda.init()
    with CudaStreams() as streams:
        stream, address = streams.new_stream(), streams.device(80)
        tensor = TorchGpu().tensor(address, spec)
        assert tensor.data_ptr() == address
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.int32, spec.shape)

        def fill() -> None:
            tensor.fill_(7)

        TorchGpu().queue(stream, fill)
        found = streams.pinned(80)
        streams.copy_out(found, address, stream)
        streams.synchronize_stream(stream)
        assert found.view(np.int32).tolist() == [7] * 20


def test_memory_that_is_not_there_has_its_own_error_and_the_device_works_on(
    program: Program, rows: list[Array]
) -> None:
    def too_much() -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with on_gpu(program) as runner:
        with CudaStreams() as streams, pytest.raises(OutOfDeviceMemoryError, match="torch: "):
            TorchGpu().queue(streams.new_stream(), too_much)
        assert len(logits(runner.infer(rows[:4]))) == 4
