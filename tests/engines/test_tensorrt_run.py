"""The runner for TensorRT over a made-up engine, on streams of the host; see also tests/gpu."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tensorrt_rtx

from engines.cuda import device_problem
from engines.errors import CudaError, EngineCorruptError, EngineError, OutOfDeviceMemoryError
from engines.runner import Array, Outputs, TensorSpec
from engines.tensorrt_build import BuilderSettings, Log, Toolkit, build_plan, rtx_toolkit
from engines.tensorrt_run import TensorRtRunner
from tests.engines.host_streams import Faults, HostDeviceRows, HostStreams
from tests.engines.small_devices import H200
from tests.engines.small_graphs import linear

BATCH = 4
GPU = dataclasses.replace(H200, uuid="GPU-7")
INPUT = TensorSpec(name="x", dtype="uint8", shape=(BATCH, 3))
DOUBLE = TensorSpec(name="double", dtype="float32", shape=(BATCH, 3))
SUM = TensorSpec(name="sum", dtype="int32", shape=(BATCH,))
OTHER = TensorSpec(name="features", dtype="float16", shape=(BATCH, 7))
KINDS = {"uint8": "UINT8", "float32": "FLOAT", "int32": "INT32", "float16": "HALF"}
SCRATCH_BYTES = 64


@dataclass
class MadeUpContext:
    """Computes `double` and `sum` from what lies at its addresses, through scratch memory."""

    streams: HostStreams
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: int = 0
    runs: bool = True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size == SCRATCH_BYTES
        self.scratch = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert set(self.addresses) == {"x", "double", "sum", "features"}
        self.streams.enqueue("compute", stream_handle, self._first)
        self.streams.enqueue("compute", stream_handle, self._second)
        return self.runs

    def _view(self, spec: TensorSpec) -> Array:
        return self.streams.view(self.addresses[spec.name], np.dtype(spec.dtype), spec.shape)

    def _middle(self) -> Array:
        return self.streams.view(self.scratch, np.dtype(INPUT.dtype), INPUT.shape)

    def _first(self) -> None:
        self._middle()[...] = self._view(INPUT)
        self._view(OTHER)[...] = 1

    def _second(self) -> None:
        self._view(DOUBLE)[...] = self._middle() * np.float32(2)
        self._view(SUM)[...] = self._middle().sum(1)


@dataclass
class MadeUpEngine:
    """An engine with one output more than is asked for."""

    streams: HostStreams
    tensors: tuple[TensorSpec, ...] = (INPUT, DOUBLE, OTHER, SUM)
    contexts: list[MadeUpContext] = field(default_factory=list)
    gives_contexts: bool = True
    runs: bool = True
    device_memory_size_v2: int = SCRATCH_BYTES

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def _spec(self, name: str) -> TensorSpec:
        return next(spec for spec in self.tensors if spec.name == name)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(tensorrt_rtx.DataType, KINDS[self._spec(name).dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._spec(name).shape

    def get_tensor_mode(self, name: str) -> Any:
        modes = tensorrt_rtx.TensorIOMode
        return modes.INPUT if name.startswith("x") else modes.OUTPUT

    def create_execution_context(self, strategy: Any) -> MadeUpContext | None:
        assert strategy == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.gives_contexts:
            return None
        self.contexts.append(MadeUpContext(self.streams, runs=self.runs))
        return self.contexts[-1]


class MadeUpTensorRt:
    """The real enumerations of TensorRT-RTX, and a runtime that gives a made-up engine."""

    __version__ = "11.4.0.106"
    ILogger = tensorrt_rtx.ILogger
    TensorIOMode = tensorrt_rtx.TensorIOMode
    ExecutionContextAllocationStrategy = tensorrt_rtx.ExecutionContextAllocationStrategy

    def __init__(self) -> None:
        self.log = Log(tensorrt_rtx)
        self.streams = HostStreams(11)
        self.engine: MadeUpEngine | None = MadeUpEngine(self.streams)
        self.message = "Magic tag does not match"

    def Runtime(self, logger: Any) -> Any:  # TensorRT's name
        assert logger is self.log.logger
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> MadeUpEngine | None:
        assert plan == b"a plan"
        self.log.errors.append(self.message)
        return self.engine


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUpTensorRt:
    trt = MadeUpTensorRt()
    toolkit = Toolkit(name="tensorrt", trt=trt, log=trt.log)
    monkeypatch.setattr("engines.tensorrt_run.tensorrt_toolkit", lambda: toolkit)
    monkeypatch.setattr("engines.tensorrt_run.CudaStreams", lambda: trt.streams)
    return trt


@pytest.fixture
def runner(tmp_path: Path) -> TensorRtRunner:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"a plan")
    return TensorRtRunner(plan, INPUT, (SUM, DOUBLE), GPU)


def batches(num_batches: int) -> list[Array]:
    rng = np.random.default_rng(4)
    return list(rng.integers(0, 256, (num_batches, *INPUT.shape), dtype=np.uint8))


def entering(runner: TensorRtRunner) -> None:
    with runner:
        pytest.fail("it was opened")


@pytest.mark.usefixtures("made_up")
def test_outputs_come_in_the_order_asked_for(runner: TensorRtRunner) -> None:
    with runner:
        assert runner.graph_refusal is None
        for (sums, doubles), rows in zip(runner.infer(batches(9)), batches(9), strict=True):
            assert (sums.dtype, doubles.dtype) == (np.int32, np.float32)
            np.testing.assert_array_equal(sums, rows.sum(1))
            np.testing.assert_array_equal(doubles, rows * np.float32(2))


def test_rows_in_device_memory_are_taken(made_up: MadeUpTensorRt, runner: TensorRtRunner) -> None:
    with runner:
        rows = HostDeviceRows(made_up.streams, batches(1)[0][:3].copy())
        ((sums, _),) = runner.infer([rows])
    np.testing.assert_array_equal(sums, batches(1)[0][:3].sum(1))


def test_contexts_share_scratch_memory_and_unread_outputs_but_no_other(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    with runner:
        assert made_up.engine is not None
        contexts = made_up.engine.contexts
        assert len(contexts) == 3
        assert len({context.scratch for context in contexts}) == 1
        num_places = {
            name: len({context.addresses[name] for context in contexts})
            for name in ("x", "sum", "double", "features")
        }
        assert num_places == {"x": 3, "sum": 3, "double": 3, "features": 1}


def test_graphs_can_be_declined(made_up: MadeUpTensorRt, runner: TensorRtRunner) -> None:
    plain = TensorRtRunner(runner._plan, INPUT, (SUM, DOUBLE), GPU, use_graphs=False)
    with plain:
        assert plain.graph_refusal == "graphs were not asked for"
        assert len(list(plain.infer(batches(4)))) == 4
    assert made_up.streams.num_calls["begin_capture"] == 0


def test_all_is_freed_and_the_runner_can_be_entered_again(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    for _ in range(2):
        with runner:
            assert made_up.streams.num_owned > 0
            assert len(list(runner.infer(batches(5)))) == 5
        assert made_up.streams.num_owned == 0
        with pytest.raises(EngineError, match=r"model\.plan: not open"):
            runner.infer(batches(1))


def test_a_plan_that_cannot_be_read_is_told_as_corrupt(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    made_up.engine = None
    expected = r"model\.plan: TensorRT 11\.4\.0\.106 cannot read it \(Magic tag.*build --force"
    with pytest.raises(EngineCorruptError, match=expected):
        entering(runner)
    assert made_up.streams.num_owned == 0


@pytest.mark.skipif(device_problem() is None, reason="has a driver")
def test_a_real_plan_without_a_device_is_told_as_corrupt(
    made_up: MadeUpTensorRt, runner: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    del made_up
    toolkit = rtx_toolkit()
    model = linear()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = BATCH
    graph = model.SerializeToString()
    settings = BuilderSettings()
    built = build_plan(graph, settings, timing_cache=None, say=lambda _: None, toolkit=toolkit)
    runner._plan.write_bytes(built.plan)
    monkeypatch.setattr("engines.tensorrt_run.tensorrt_toolkit", lambda: toolkit)
    with pytest.raises(EngineCorruptError, match=r"TensorRT 1\.7.*cannot read it \(.*cudaError 35"):
        entering(runner)


def test_memory_that_runs_out_while_loading_is_not_told_as_corrupt(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    made_up.engine = None
    made_up.message = "Error Code 1: Cuda Runtime (out of memory)"
    with pytest.raises(OutOfDeviceMemoryError, match=r"model\.plan.*Use a smaller batch"):
        entering(runner)


def test_every_allocation_that_fails_frees_the_others(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    with runner:
        counts = dict(made_up.streams.num_calls)
    for call in ("device", "pinned", "new_stream", "new_event"):
        for number in range(counts[call]):
            error = OutOfDeviceMemoryError("no memory is left")
            made_up.streams = HostStreams(0, Faults(calls={(call, number): error}))
            made_up.engine = MadeUpEngine(made_up.streams)
            with pytest.raises(OutOfDeviceMemoryError):
                entering(runner)
            assert made_up.streams.num_owned == 0


@pytest.mark.parametrize(
    ("tensors", "shown"),
    [
        ((INPUT, DOUBLE), "has no tensor; expected sum too"),
        ((INPUT, replace(SUM, dtype="float32"), DOUBLE), r"sum \('float32', \(4,\)\); expected"),
        ((replace(INPUT, shape=(8, 3)), SUM, DOUBLE), r"x \('uint8', \(8, 3\)\); expected"),
        ((INPUT, replace(INPUT, name="x2"), SUM, DOUBLE), r"x2 .*; expected None"),
    ],
    ids=["missing", "dtype", "shape", "second input"],
)
def test_a_plan_of_another_model_is_refused(
    made_up: MadeUpTensorRt,
    runner: TensorRtRunner,
    tensors: tuple[TensorSpec, ...],
    shown: str,
) -> None:
    assert made_up.engine is not None
    made_up.engine.tensors = tensors
    with pytest.raises(EngineCorruptError, match=shown):
        entering(runner)
    assert made_up.streams.num_owned == 0


def test_a_process_that_sees_another_gpu_is_told_which_to_show(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    made_up.streams.compute_capability = (8, 9)
    expected = r"capability \(8, 9\); expected \(9, 0\).*CUDA_VISIBLE_DEVICES=GPU-7"
    with pytest.raises(EngineError, match=expected):
        entering(runner)


def refuse_contexts(engine: MadeUpEngine) -> None:
    engine.gives_contexts = False


def refuse_to_run(engine: MadeUpEngine) -> None:
    engine.runs = False


@pytest.mark.parametrize(
    ("spoil", "shown"),
    [(refuse_contexts, "create_execution_context"), (refuse_to_run, "execute_async_v3")],
)
def test_what_tensorrt_refuses_is_named(
    made_up: MadeUpTensorRt,
    runner: TensorRtRunner,
    spoil: Callable[[MadeUpEngine], None],
    shown: str,
) -> None:
    made_up.streams = Draining()
    made_up.engine = MadeUpEngine(made_up.streams)
    spoil(made_up.engine)
    with pytest.raises(EngineError, match=f"TensorRT, {shown}: refused"):
        entering(runner)


class Draining(HostStreams):
    """As a device does when memory is freed: waits for what is in flight."""

    def __exit__(self, *error: object) -> None:
        self._run_until(lambda: self.num_pending == 0)
        super().__exit__(*error)


def test_a_stream_left_open_when_the_runner_is_left_touches_nothing_any_more(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    made_up.streams = Draining()
    made_up.engine = MadeUpEngine(made_up.streams)
    for end in ("next", "close"):
        with runner:
            outputs = cast("Generator[Outputs]", runner.infer(batches(9)))
            next(outputs)
        calls = dict(made_up.streams.num_calls)
        if end == "next":
            with pytest.raises(EngineError, match="engine: closed"):
                next(outputs)
        outputs.close()
        assert made_up.streams.num_calls == calls


def test_an_error_in_the_body_and_one_of_cuda_come_through(
    made_up: MadeUpTensorRt, runner: TensorRtRunner
) -> None:
    made_up.streams = HostStreams(3, Faults(works={("compute", 11)}))
    made_up.engine = MadeUpEngine(made_up.streams)

    def fail() -> Iterator[Array]:
        yield from batches(2)
        raise LookupError

    with runner, pytest.raises(LookupError):
        list(runner.infer(fail()))
    with pytest.raises(CudaError, match="compute failed"), runner:
        list(runner.infer(batches(12)))
    assert made_up.streams.num_owned == 0


@pytest.mark.skipif(device_problem() is None, reason="has a driver")
def test_without_tensorrt_or_a_driver_entering_is_one_sentence(runner: TensorRtRunner) -> None:
    with pytest.raises(EngineError, match=r"^(TensorRT: the package|CUDA: cudaError)"):
        entering(runner)


def test_a_plan_that_is_not_there_fails_on_entering(tmp_path: Path) -> None:
    absent = TensorRtRunner(tmp_path / "none.plan", INPUT, (SUM,), GPU)
    with pytest.raises(FileNotFoundError, match=r"none\.plan"):
        entering(absent)
