"""The ladder: which rung is chosen, what is kept in float, what is left out, and what is said."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines.calibrate import Method
from engines.candidates import CPU_BATCH_FEATURES, Candidate, CandidateFactory
from engines.devices import Device, this_cpu
from engines.errors import AccuracyError, BuildError, CudaError, OutOfDeviceMemoryError
from engines.gate import Answers, GateSpec, run_rows
from engines.ladder import FEWER_BITS, RUNGS, Choice, HeldOut, Ladder
from engines.manifest import Rung
from engines.model import ModelSpec
from engines.onnxrt import OnnxrtRunner
from engines.runner import Array, Runner, TensorSpec
from tests.engines.fitted_nets import Net, make_net
from tests.engines.small_devices import H200
from tests.engines.small_graphs import embedding, hard_to_round, mlp, save
from tests.engines.small_models import feature_rows

GPU = dataclasses.replace(H200, num_threads=2)
CPU = this_cpu(2)
SCORES = GateSpec(min_agreement=0.98)
SPEEDS = {"int8": 1000.0, "mixed": 800.0, "fp16": 600.0, "fp32": 400.0}
GPU_RUNGS = ["tensorrt int8", "tensorrt fp16", "torch fp16"]
Race = Callable[[dict[str, Runner], Array], dict[str, float]]


def race_of(speeds: dict[str, float]) -> Race:
    """As fast as the precision says, and the first runtime a little faster."""

    def race(runners: dict[str, Runner], *_: object) -> dict[str, float]:
        return {name: speeds[name.split()[1]] - position for position, name in enumerate(runners)}

    return race


@pytest.fixture(autouse=True)
def usual_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower precision is faster, as it should be."""
    monkeypatch.setattr("engines.ladder.race", race_of(SPEEDS))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def net_of(model: onnx.ModelProto, folder: Path) -> Net:
    usual = make_net("mlp", folder)
    save(model, Path(usual.spec.source))
    return usual


def climb(
    net: Net,
    opened: ExitStack,
    gate: GateSpec = SCORES,
    *,
    device: Device = CPU,
    batch_size: int = 16,
) -> Choice:
    return Ladder(net.spec, net.factory, gate, net.held_out, device, opened).climb(batch_size)


def by_name(choice: Choice) -> dict[str, Rung]:
    return {rung.name: rung for rung in choice.rungs}


def test_where_int8_passes_it_is_chosen_and_every_rung_has_its_numbers(
    tmp_path: Path, opened: ExitStack
) -> None:
    choice = climb(make_net("mlp", tmp_path), opened)
    assert choice.rung.name == "openvino int8"
    assert [rung.name for rung in choice.rungs] == [" ".join(each) for each in RUNGS["cpu"]]
    for rung in choice.rungs:
        assert rung.passed
        assert rung.accuracy is not None
        assert rung.accuracy.agreement > 0.98
        assert (rung.batch_size, rung.failures, rung.error) == (16, (), None)
        fewer_bits = rung.precision == "int8" and CPU.weight_bits == 7
        assert rung.note == (FEWER_BITS if fewer_bits else None)
        assert rung.rows_per_s == pytest.approx(SPEEDS[rung.precision], abs=9)
    assert choice.candidate.name == "openvino int8"
    assert len(choice.probe) == 16
    assert choice.reason.startswith(
        "openvino int8, the fastest of 4 that pass the gate (1,000 rows/s, 2.51 x openvino fp32)"
    )


@pytest.mark.parametrize("how", ["input", "weights"])
def test_where_one_layer_cannot_bear_int8_it_alone_stays_in_float(
    how: str, tmp_path: Path, opened: ExitStack
) -> None:
    choice = climb(net_of(hard_to_round(how), tmp_path), opened)
    rungs = by_name(choice)
    for runtime in ("openvino", "onnxruntime"):
        assert rungs[f"{runtime} int8"].failures[0].startswith("agreement 0.")
        mixed = rungs[f"{runtime} mixed"]
        assert mixed.passed, mixed
        assert mixed.float_layers == ("g3",)
        assert mixed.accuracy is not None
        assert mixed.accuracy.agreement > 0.98
    assert choice.rung == rungs["openvino mixed"]
    assert choice.candidate.float_layers == ("g3",)
    assert "; in float: g3; " in choice.reason
    assert "openvino int8 missed the gate: agreement 0." in choice.reason


def test_where_half_of_the_layers_in_float_are_not_enough_fp32_is_chosen(
    tmp_path: Path, opened: ExitStack
) -> None:
    choice = climb(make_net("mlp", tmp_path), opened, GateSpec(min_agreement=1.0))
    rungs = by_name(choice)
    assert choice.rung.precision == "fp32"
    for runtime in ("openvino", "onnxruntime"):
        mixed = rungs[f"{runtime} mixed"]
        assert (mixed.passed, mixed.accuracy, mixed.batch_size) == (False, None, 0)
        assert mixed.error == "half of the layers in float are not enough"
    assert "openvino mixed failed: half of the layers" in choice.reason


def test_a_search_for_float_layers_that_breaks_leaves_fp32(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr("engines.sensitivity.rank_layers", refuse)
    choice = climb(net_of(hard_to_round("input"), tmp_path), opened)
    assert choice.rung.name == "openvino fp32"
    assert by_name(choice)["openvino mixed"].error == "NotImplementedError: no such operator"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EMFILE, "m"), MemoryError()],
    ids=["disk", "files", "memory"],
)
@pytest.mark.parametrize("where", ["quantize.quantize", "sensitivity.rank_layers", "ladder.race"])
def test_a_machine_that_is_short_of_something_decides_for_no_rung(
    error: Exception,
    where: str,
    tmp_path: Path,
    opened: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"engines.{where}", fail)
    with pytest.raises(type(error)) as raised:
        climb(net_of(hard_to_round("input"), tmp_path), opened)
    assert raised.value is error


def test_int8_that_passes_but_is_slower_is_not_chosen(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.ladder.race", race_of({"int8": 500.0, "fp32": 750.0}))
    choice = climb(make_net("mlp", tmp_path), opened)
    assert choice.rung.name == "openvino fp32"
    assert by_name(choice)["openvino int8"].passed
    wanted = "openvino fp32, the fastest of 4 that pass the gate (748 rows/s, 1.50 x openvino int8)"
    assert choice.reason == wanted


@pytest.mark.parametrize("where", ["made", "opened"])
def test_where_memory_is_short_a_smaller_batch_is_tried_and_noted(
    where: str, tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check(batch_size: int) -> None:
        asked.append(batch_size)
        if batch_size > 4:
            raise OutOfDeviceMemoryError("tensorrt build: out of device memory")

    if where == "made":
        make = CandidateFactory.make

        def small_only(
            self: CandidateFactory, runtime: str, precision: str, batch_size: int, *rest: object
        ) -> Candidate:
            if (runtime, precision) == ("openvino", "int8"):
                check(batch_size)
            return make(self, runtime, precision, batch_size, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(CandidateFactory, "make", small_only)
    else:
        from engines.ovino import OpenVinoRunner

        enter = OpenVinoRunner.__enter__

        def open_small(self: OpenVinoRunner) -> OpenVinoRunner:
            if "int8" in str(self._graph):
                check(self.batch_size)
            return enter(self)

        monkeypatch.setattr(OpenVinoRunner, "__enter__", open_small)
    choice = climb(make_net("mlp", tmp_path), opened)
    assert asked == [16, 8, 4]
    assert choice.rung.name == "openvino int8"
    assert (choice.rung.batch_size, choice.candidate.input.shape[0]) == (4, 4)
    assert choice.rung.note == "batches of 4: 8 do not fit into memory"
    assert by_name(choice)["openvino fp32"].batch_size == 16


def test_a_rung_that_does_not_even_fit_with_one_row_is_left_out(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OutOfDeviceMemoryError("runner: out of device memory")

    monkeypatch.setattr("engines.ovino.OpenVinoRunner.__enter__", full)
    choice = climb(make_net("mlp", tmp_path), opened)
    assert choice.rung.name == "onnxruntime int8"
    error = by_name(choice)["openvino int8"].error
    assert error == "OutOfDeviceMemoryError: runner: out of device memory"


def test_int8_that_loses_the_tasks_metric_is_not_chosen(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 of 200 rows: agreement alone would let it pass."""

    def worse_in_int8(runner: Runner, rows: Array) -> Answers:
        answers = run_rows(runner, rows)
        if "int8" in Path(getattr(runner, "_graph")).name:  # noqa: B009  # of any runner
            answers["class_id"][:5, 0] = (answers["class_id"][:5, 0] + 1) % 5
        return answers

    monkeypatch.setattr("engines.ladder.run_rows", worse_in_int8)
    net = make_net("conv", tmp_path)
    unlabelled = replace(net, held_out=replace(net.held_out, labels=None))
    assert climb(unlabelled, opened, GateSpec()).rung.name == "openvino int8"
    choice = climb(net, opened, GateSpec())
    int8 = by_name(choice)["openvino int8"]
    assert int8.failures == ("accuracy loss 0.0250 > 0.005",)
    assert int8.accuracy is not None
    assert (int8.accuracy.metric_name, int8.accuracy.reference_metric) == ("accuracy", 1.0)
    assert choice.rung.precision == "mixed"
    assert "openvino int8 missed the gate: accuracy loss 0.0250 > 0.005" in choice.reason


def test_labels_that_fp32_itself_does_not_tell_are_said_and_not_judged(
    tmp_path: Path, opened: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    net = make_net("mlp", tmp_path)
    labels = np.linspace(1e6, 2e6, len(net.held_out.rows))
    mislabelled = replace(net, held_out=replace(net.held_out, labels=labels))
    choice = climb(mislabelled, opened, replace(SCORES, label="target"))
    assert choice.rung.accuracy is not None
    assert choice.rung.accuracy.metric is None
    assert caplog.text.count("labels (target): fp32 tells them no better than chance") == 1


def test_runners_stay_open_until_the_stack_is_closed(tmp_path: Path) -> None:
    left: list[str] = []

    class Counted(OnnxrtRunner):
        def __exit__(self, *error: object) -> None:
            left.append(self._graph.name)
            super().__exit__(*error)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr("engines.onnxrt.OnnxrtRunner", Counted)
        climb(make_net("mlp", tmp_path), stack)
        reference = f"fp32-{CPU_BATCH_FEATURES}.onnx"
        assert left == [reference], "only the reference has done its work"
    assert sorted(left) == sorted([reference, "fp32-16.onnx", "int8-16.onnx"])


class GpuFactory(CandidateFactory):
    """Makes for ONNX Runtime on the CPU what it would make for a GPU."""

    def __init__(self, spec: ModelSpec, rows: Array, method: Method, folder: Path) -> None:
        super().__init__(spec, rows, method, folder, lambda _: None)
        self.asked: list[str] = []
        self.refuses: tuple[str, ...] = ()

    def make(
        self, runtime: str, precision: str, batch_size: int, float_layers: Sequence[str] = ()
    ) -> Candidate:
        if runtime not in ("tensorrt", "torch"):
            return super().make(runtime, precision, batch_size, float_layers)
        self.asked.append(f"{runtime} {precision}")
        if runtime in self.refuses:
            raise BuildError(f"{runtime}: not installed; expected version 11.")
        alike = "mixed" if precision == "int8" else precision  # the symmetric graph
        made = super().make("onnxruntime", alike, batch_size, float_layers)
        return replace(made, runtime=runtime, precision=precision)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_runner(
        runtime: str,
        graph: Path,
        input: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        device: Device,
    ) -> Runner:
        assert (device.kind == "gpu") is (runtime in ("tensorrt", "torch"))
        return OnnxrtRunner(graph, input, outputs, 2)

    monkeypatch.setattr("engines.ladder.make_runner", make_runner)


def gpu_net(folder: Path, model: onnx.ModelProto | None = None) -> tuple[Net, GpuFactory]:
    net = net_of(model or mlp(), folder)
    factory = GpuFactory(net.spec, feature_rows(128, seed=1), "max", net.folder)
    return replace(net, factory=factory), factory


@pytest.mark.usefixtures("on_gpu")
def test_a_gpus_rungs_are_tensorrt_int8_then_fp16_then_torch_fp16(
    tmp_path: Path, opened: ExitStack
) -> None:
    net, factory = gpu_net(tmp_path)
    choice = climb(net, opened, device=GPU)
    assert factory.asked == GPU_RUNGS
    assert [rung.name for rung in choice.rungs] == factory.asked
    assert choice.rung.name == "tensorrt int8"


@pytest.mark.usefixtures("on_gpu")
def test_on_a_gpu_too_the_worst_layer_stays_in_float(tmp_path: Path, opened: ExitStack) -> None:
    net, factory = gpu_net(tmp_path, hard_to_round("input"))
    choice = climb(net, opened, device=GPU)
    assert factory.asked == [*GPU_RUNGS, "tensorrt mixed"]
    assert (choice.rung.name, choice.rung.float_layers) == ("tensorrt mixed", ("g3",))


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_where_tensorrt_fails_is_left_with_torch(tmp_path: Path, opened: ExitStack) -> None:
    net, factory = gpu_net(tmp_path)
    factory.refuses = ("tensorrt",)
    choice = climb(net, opened, device=GPU)
    assert factory.asked == GPU_RUNGS
    assert choice.rung.name == "torch fp16"
    refused = "BuildError: tensorrt: not installed; expected version 11."
    assert [rung.error for rung in choice.rungs] == [refused, refused, None]
    assert f"tensorrt int8 failed: {refused}" in choice.reason


@pytest.mark.usefixtures("on_gpu")
def test_where_fp16_cannot_tell_the_rows_apart_fp32_scores_on_a_gpu_too(
    tmp_path: Path, opened: ExitStack
) -> None:
    """Ids above 2,048: every other one is a neighbour's in fp16, and all of them in int8."""

    def ids(num_rows: int, seed: int) -> Array:
        rows = feature_rows(num_rows, seed)
        rows[:, 0] = np.random.default_rng(seed).integers(0, 5000, num_rows)
        return rows

    usual, _ = gpu_net(tmp_path, embedding(5000))
    factory = GpuFactory(usual.spec, ids(128, seed=1), "max", usual.folder)
    held_out = HeldOut(rows=ids(200, seed=2), labels=None)
    choice = climb(replace(usual, factory=factory, held_out=held_out), opened, device=GPU)
    assert choice.rung.name == "tensorrt fp32"
    rungs = by_name(choice)
    for name in GPU_RUNGS:
        assert rungs[name].failures, name
    assert rungs["tensorrt fp32"].accuracy is not None
    assert rungs["tensorrt fp32"].accuracy.agreement == 1.0


@pytest.mark.usefixtures("on_gpu")
def test_without_tensorrt_fp32_scores_by_torch(tmp_path: Path, opened: ExitStack) -> None:
    class Rounding(GpuFactory):
        def make(self, runtime: str, precision: str, *args: Any) -> Candidate:
            if (runtime, precision) == ("torch", "fp16"):
                self.asked.append("torch fp16")
                raise BuildError("incomes beyond 65,504")
            return super().make(runtime, precision, *args)

    net, _ = gpu_net(tmp_path)
    factory = Rounding(net.spec, feature_rows(128, seed=1), "max", net.folder)
    factory.refuses = ("tensorrt",)
    choice = climb(replace(net, factory=factory), opened, device=GPU)
    assert factory.asked == [*GPU_RUNGS, "tensorrt fp32", "torch fp32"]
    assert choice.rung.name == "torch fp32"


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("when", ["judged", "timed"])
def test_a_device_that_is_lost_ends_the_climb_with_its_own_reason(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def lost(*_: object) -> Any:
        raise CudaError("cudaErrorIllegalAddress")

    monkeypatch.setattr(f"engines.ladder.{'run_rows' if when == 'judged' else 'race'}", lost)
    net, factory = gpu_net(tmp_path)
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
        climb(net, opened, device=GPU)
    assert factory.asked == (GPU_RUNGS[:1] if when == "judged" else GPU_RUNGS)


@pytest.mark.usefixtures("on_gpu")
def test_a_rung_that_fails_while_it_is_timed_is_left_out(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def race(runners: dict[str, Runner], *_: object) -> dict[str, float]:
        if "tensorrt int8" in runners:
            raise RuntimeError("device lost")
        return dict.fromkeys(runners, 1.0)

    monkeypatch.setattr("engines.ladder.race", race)
    net, _ = gpu_net(tmp_path)
    choice = climb(net, opened, device=GPU)
    assert choice.rung.name == "tensorrt fp16"
    assert choice.rungs[0].error == "RuntimeError: device lost"


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_where_nothing_works_gets_no_engine_and_every_reason(
    tmp_path: Path, opened: ExitStack
) -> None:
    net, factory = gpu_net(tmp_path)
    factory.refuses = ("tensorrt", "torch")
    with pytest.raises(AccuracyError, match=r"tensorrt int8: BuildError.*torch fp16: BuildError"):
        climb(net, opened, device=GPU)


def test_a_batch_that_the_graph_is_bound_to_is_kept(tmp_path: Path, opened: ExitStack) -> None:
    model = mlp()
    for entry in (model.graph.input[0], model.graph.output[0]):
        entry.type.tensor_type.shape.dim[0].dim_value = 6
    choice = climb(net_of(model, tmp_path), opened)
    assert {rung.batch_size for rung in choice.rungs} == {6}
    assert np.isfinite(choice.probe).all()
