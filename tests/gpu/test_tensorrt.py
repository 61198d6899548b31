"""TensorRT on a real GPU: builds, agrees with ONNX Runtime on the same graph, refuses bad plans."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest

from engines.cuda import CudaStreams
from engines.devices import ARCHITECTURE, Gpu
from engines.errors import BuildError, EngineCorruptError, EngineError
from engines.half import to_half
from engines.runner import Array, Outputs, TensorSpec
from engines.tensorrt_build import BuilderSettings, BuiltPlan, build_plan, unavailable
from engines.tensorrt_run import TensorRtRunner
from tests.engines.residual_graphs import BATCH, FOR_TENSORRT, SIZE, quantised, residual_net
from tests.gpu.device_rows import CudaRows

PROBLEM = unavailable()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or ""),
    pytest.mark.timeout(600),
]

INPUT = TensorSpec(name="x", dtype="float32", shape=(BATCH, 3, SIZE, SIZE))
OUTPUT = TensorSpec(name="y", dtype="float32", shape=(BATCH, 5))
LARGEST_DIFFERENCE = {"fp32": 0.01, "fp16": 0.02, "int8": 0.05}
"""Of the largest score: TF32, fp16 and one step of int8 round apart."""


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    with CudaStreams() as streams:
        capability = streams.compute_capability
    return Gpu(
        uuid="GPU-of-this-test",
        name="the visible GPU",
        compute_capability=capability,
        num_sms=0,
        memory_bytes=0,
        mig_profile=None,
        driver="",
        cuda=(13, 0),
        architecture=ARCHITECTURE,
        num_threads=1,
    )


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    core = onnx.shape_inference.infer_shapes(residual_net())
    return {
        "fp32": core.SerializeToString(),
        "fp16": to_half(core).SerializeToString(),
        "int8": quantised(tmp_path_factory.mktemp("int8"), FOR_TENSORRT),
    }


def build(graph: bytes, timing_cache: bytes | None = None) -> BuiltPlan:
    settings = BuilderSettings(optimization_level=2)
    return build_plan(graph, settings, timing_cache=timing_cache, say=print)


@pytest.fixture(scope="module")
def plans(graphs: dict[str, bytes]) -> dict[str, BuiltPlan]:
    return {precision: build(graph) for precision, graph in graphs.items()}


@pytest.fixture(params=["fp32", "fp16", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def runner_for(
    plan: bytes, folder: Path, gpu: Gpu, *, use_graphs: bool = True, output: TensorSpec = OUTPUT
) -> TensorRtRunner:
    path = folder / "model.plan"
    path.write_bytes(plan)
    return TensorRtRunner(path, INPUT, (output,), gpu, use_graphs=use_graphs)


def batches(num_batches: int) -> list[Array]:
    rng = np.random.default_rng(6)
    return list(rng.standard_normal((num_batches, *INPUT.shape)).astype(np.float32))


def scores(runner: TensorRtRunner, rows: list[Array]) -> Array:
    return np.stack([found for (found,) in runner.infer(rows)])


def entering(runner: TensorRtRunner) -> None:
    with runner:
        pytest.fail("it was opened")


def test_each_precision_agrees_with_onnxruntime_on_its_graph(
    graphs: dict[str, bytes],
    plans: dict[str, BuiltPlan],
    precision: str,
    tmp_path: Path,
    gpu: Gpu,
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graphs[precision])
    expected = np.stack([session.run(None, {"x": rows})[0] for rows in batches(20)])
    with runner_for(plans[precision].plan, tmp_path, gpu) as runner:
        found = scores(runner, batches(20))
    assert np.abs(found - expected).max() <= LARGEST_DIFFERENCE[precision] * np.abs(expected).max()


def test_graphs_and_plain_launches_give_the_same_scores(
    plans: dict[str, BuiltPlan], precision: str, tmp_path: Path, gpu: Gpu
) -> None:
    answers = []
    for use_graphs in (True, False):
        plan = plans[precision].plan
        with runner_for(plan, tmp_path, gpu, use_graphs=use_graphs) as runner:
            assert (runner.graph_refusal is None) == use_graphs, runner.graph_refusal
            answers.append(scores(runner, batches(30)))
    np.testing.assert_array_equal(answers[0], answers[1])


def test_rows_in_device_memory_score_as_those_of_the_host(
    plans: dict[str, BuiltPlan], tmp_path: Path, gpu: Gpu
) -> None:
    with runner_for(plans["int8"].plan, tmp_path, gpu) as runner:
        expected = scores(runner, batches(12))
        rows = [batch[: 1 + number % BATCH] for number, batch in enumerate(batches(12))]
        found = [outputs for (outputs,) in runner.infer(CudaRows(batch) for batch in rows)]
    for few, full, batch in zip(found, expected, rows, strict=True):
        np.testing.assert_array_equal(few, full[: len(batch)])


def test_the_stream_keeps_order_flushes_and_closes_early(
    plans: dict[str, BuiltPlan], tmp_path: Path, gpu: Gpu
) -> None:
    with runner_for(plans["fp16"].plan, tmp_path, gpu) as runner:
        expected = scores(runner, batches(7))

        def source() -> Iterator[Array | None]:
            for batch in batches(7):
                yield batch
                yield None

        found = np.stack([outputs for (outputs,) in runner.infer(source())])
        np.testing.assert_array_equal(found, expected)
        with closing(cast("Generator[Outputs]", runner.infer(batches(7)))) as outputs:
            np.testing.assert_array_equal(next(outputs)[0], expected[0])
        np.testing.assert_array_equal(scores(runner, batches(7)), expected)


def test_a_runner_can_be_left_and_entered_again(
    plans: dict[str, BuiltPlan], tmp_path: Path, gpu: Gpu
) -> None:
    runner = runner_for(plans["fp16"].plan, tmp_path, gpu)
    answers = []
    for _ in range(2):
        with runner:
            answers.append(scores(runner, batches(3)))
    np.testing.assert_array_equal(answers[0], answers[1])


def test_the_inspector_tells_int8_layers(plans: dict[str, BuiltPlan]) -> None:
    told = plans["int8"].inspector
    assert told is not None
    assert json.loads(told)["Layers"]
    assert "int8" in told.lower()
    assert "int8" not in (plans["fp32"].inspector or "").lower()


def test_timings_are_used_again_and_garbage_is_a_warning(
    graphs: dict[str, bytes], plans: dict[str, BuiltPlan]
) -> None:
    known = plans["int8"].timing_cache
    assert known
    again = build(graphs["int8"], known)
    assert not [text for text in again.warnings if text.startswith("timing cache:")]
    spoilt = build(graphs["int8"], b"garbage" * 50)
    assert [text for text in spoilt.warnings if text.startswith("timing cache:")]
    assert spoilt.plan


def test_a_graph_that_the_parser_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="Int32"):
        build(quantised(tmp_path, None))


@pytest.mark.parametrize("damage", ["a flipped byte at the start", "half of it", "nothing left"])
def test_a_damaged_plan_is_told_as_corrupt_and_the_device_works_on(
    plans: dict[str, BuiltPlan], damage: str, tmp_path: Path, gpu: Gpu
) -> None:
    plan = plans["fp16"].plan
    spoilt = {
        "a flipped byte at the start": bytes([plan[0] ^ 1]) + plan[1:],
        "half of it": plan[: len(plan) // 2],
        "nothing left": b"",
    }[damage]
    with pytest.raises(EngineCorruptError, match=r"model\.plan: TensorRT 11.* cannot read it"):
        entering(runner_for(spoilt, tmp_path, gpu))
    with runner_for(plan, tmp_path, gpu) as runner:
        assert len(scores(runner, batches(2))) == 2


def test_a_plan_with_other_outputs_is_refused(
    plans: dict[str, BuiltPlan], tmp_path: Path, gpu: Gpu
) -> None:
    other = replace(OUTPUT, shape=(BATCH, 6))
    with pytest.raises(EngineCorruptError, match="expected TensorSpec"):
        entering(runner_for(plans["fp16"].plan, tmp_path, gpu, output=other))


def test_a_process_that_sees_another_gpu_is_told(
    plans: dict[str, BuiltPlan], tmp_path: Path, gpu: Gpu
) -> None:
    other = replace(gpu, compute_capability=(1, 0))
    with pytest.raises(EngineError, match="CUDA_VISIBLE_DEVICES=GPU-of-this-test"):
        entering(runner_for(plans["fp16"].plan, tmp_path, other))
