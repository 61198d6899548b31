"""One suite over every runner, bare and checked: what the pipeline relies on."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from engines.build import resolve_engine
from engines.candidates import GRAPH
from engines.devices import this_cpu
from engines.errors import EngineError
from engines.gate import run_rows
from engines.load import make_runner, open_runner
from engines.manifest import StoredEngine
from engines.model import FeatureInput, ModelSpec
from engines.onnxrt import OnnxrtRunner
from engines.ovino import BLOB
from engines.ovino_compile import compile_graph
from engines.runner import Array, HostRunner, Outputs, Runner
from engines.torch_program import save_program
from engines.torch_run import TorchMode, TorchRunner
from tests.engines.small_models import (
    NUM_FEATURES,
    feature_rows,
    feature_sample,
    features_spec,
    request_for,
    write_features_model,
)
from tests.engines.small_stores import local_store

BATCH = 4
THREADS = 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> StoredEngine:
    folder = tmp_path_factory.mktemp("runners")
    spec = features_spec(write_features_model(folder / "m.onnx"))
    request = request_for(spec, min_agreement=0.999999)  # fp32: runtimes round int8 differently
    store = local_store(folder / "store")
    return resolve_engine(request, store, feature_sample, lambda _: None).engine


def torch_twin() -> torch.nn.Module:
    """The model of `write_features_model` with its weights, drawn in the same order."""
    rng = np.random.default_rng(1)
    first, second = torch.nn.Linear(NUM_FEATURES, 32), torch.nn.Linear(32, 1)
    with torch.no_grad():
        for tensor in (first.weight, first.bias, second.weight, second.bias):
            tensor.copy_(torch.from_numpy(rng.standard_normal(tensor.shape)))
    return torch.nn.Sequential(first, torch.nn.ReLU(), second)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "features.pt2"
    spec = ModelSpec(
        source=f"{__name__}:torch_twin",
        input=FeatureInput(num_features=NUM_FEATURES),
        head="scores",
    )
    save_program(spec, BATCH, path)
    return path


def graph_of(engine: StoredEngine) -> Path:
    """The ONNX graph, whichever runtime won."""
    is_compiled = GRAPH in engine.manifest.attachments
    return engine.attachment(GRAPH) if is_compiled else engine.artifact


HOST_RUNNERS = ["openvino", "compiled", "onnxruntime", "literal", "checked"]
"""Those that compute a batch in the thread that asks."""
on_host_runners = pytest.mark.parametrize("closed", HOST_RUNNERS, indirect=True)


@pytest.fixture(params=[*HOST_RUNNERS, "torch"])
def closed(
    request: pytest.FixtureRequest, engine: StoredEngine, program: Path, tmp_path: Path
) -> Runner:
    if request.param == "checked":
        return open_runner(engine)
    known = engine.manifest
    if request.param == "literal":  # as the gate's simulation of a mixed graph runs
        graph, source, outputs = graph_of(engine), known.input, known.outputs
        return OnnxrtRunner(graph, source, outputs, THREADS, is_literal=True)
    if request.param == "torch":  # compiled, it is tested in tests/engines/test_torch_run.py
        mode = TorchMode(is_compiled=False)
        return TorchRunner(program, known.input, known.outputs, THREADS, mode)
    if request.param == "compiled":  # as an engine of OpenVINO is stored
        blob = tmp_path / f"graph{BLOB}"
        blob.write_bytes(compile_graph(graph_of(engine)))
        return make_runner("openvino", blob, known.input, known.outputs, this_cpu(THREADS))
    return make_runner(
        request.param, graph_of(engine), known.input, known.outputs, this_cpu(THREADS)
    )


@pytest.fixture
def runner(closed: Runner) -> Iterator[Runner]:
    with closed:
        yield closed


@pytest.fixture
def host(runner: Runner) -> HostRunner:
    return cast("HostRunner", runner)


def batches(num_batches: int) -> list[Array]:
    return list(feature_rows(num_batches * BATCH, seed=5).reshape(num_batches, BATCH, -1))


def stream(runner: Runner, source: Iterable[Array | None]) -> Generator[Outputs]:
    return cast("Generator[Outputs]", runner.infer(source))


def by_onnxruntime(engine: StoredEngine, rows: Array) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph_of(engine))
    (scores,) = session.run(None, {engine.manifest.input.name: rows})
    return np.asarray(scores)


def test_many_more_batches_than_streams_come_out_in_order(
    runner: Runner, engine: StoredEngine
) -> None:
    rows = batches(101)
    found = list(runner.infer(rows))
    assert len(found) == 101
    for (scores,), batch in zip(found, rows, strict=True):
        assert (scores.shape, scores.dtype) == ((BATCH, 1), np.float32)
        np.testing.assert_allclose(scores, by_onnxruntime(engine, batch), rtol=1e-4, atol=1e-4)


def test_each_batch_answers_the_same_alone_and_among_others(runner: Runner) -> None:
    rows = batches(20)
    together = [scores for (scores,) in runner.infer(rows)]
    alone = [next(iter(runner.infer([batch])))[0] for batch in rows]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_none_brings_out_all_in_flight_before_the_next_batch_is_asked_for(runner: Runner) -> None:
    events: list[str] = []

    def source() -> Iterator[Array | None]:
        for number, batch in enumerate(batches(5)):
            events.append(f"in {number}")
            yield batch
            if number in (0, 2):
                yield None

    for number, _ in enumerate(runner.infer(source())):
        events.append(f"out {number}")
    assert events.index("out 0") < events.index("in 1")
    assert events.index("out 2") < events.index("in 3")
    assert [event for event in events if event.startswith("out")] == [f"out {i}" for i in range(5)]


def test_none_without_anything_in_flight_is_no_output(runner: Runner) -> None:
    assert list(runner.infer([None, None])) == []
    assert len(list(runner.infer([None, *batches(2), None, None]))) == 2


@pytest.mark.timeout(30)
def test_an_early_close_does_not_hang_and_the_runner_works_on(runner: Runner) -> None:
    for _ in range(3):
        with closing(stream(runner, batches(30))) as outputs:
            next(outputs)
        assert len(list(runner.infer(batches(7)))) == 7


def test_a_batch_may_be_reused_once_the_stream_is_closed(runner: Runner) -> None:
    rows = batches(12)
    with closing(stream(runner, rows)) as outputs:
        next(outputs)
    expected = [next(iter(runner.infer([batch])))[0] for batch in batches(12)]
    for batch in rows:
        batch[:] = 1e6
    found = [scores for (scores,) in runner.infer(batches(12))]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_error_of_the_source_comes_through_unchanged(runner: Runner) -> None:
    def source() -> Iterator[Array]:
        yield from batches(2)
        raise LookupError("the decoder lost its way")

    with pytest.raises(LookupError, match="lost its way"):
        list(runner.infer(source()))
    assert len(list(runner.infer(batches(3)))) == 3


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (np.zeros((BATCH + 1, 8), np.float32), r"float32 \(5, 8\); expected float32 \(4, 8\)"),
        (np.zeros((BATCH, 8), np.float64), r"float64 \(4, 8\); expected float32 \(4, 8\)"),
    ],
    ids=["shape", "dtype"],
)
def test_a_wrong_batch_is_refused_with_both_kinds(runner: Runner, wrong: Array, shown: str) -> None:
    with pytest.raises(EngineError, match=shown):
        list(runner.infer([*batches(2), wrong]))
    assert len(list(runner.infer(batches(2)))) == 2


def test_arrays_that_cannot_be_written_are_taken(runner: Runner) -> None:
    rows = batches(6)
    expected = [scores.copy() for (scores,) in runner.infer(rows)]
    for batch in rows:
        batch.flags.writeable = False  # such as those that Arrow gives
    found = [scores for (scores,) in runner.infer(rows)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_outputs_stay_as_they_were_when_later_batches_run(runner: Runner) -> None:
    outputs = stream(runner, batches(40))
    kept = next(outputs)
    copies = [array.copy() for array in kept]
    assert len(list(outputs)) == 39
    list(runner.infer(batches(9)))
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_runner_can_be_left_and_entered_again(closed: Runner) -> None:
    rows = feature_rows(10, seed=2)
    answers = []
    for _ in range(2):
        with closed:
            answers.append(run_rows(closed, rows)["score"])
    assert answers[0].shape == (10, 1)
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)


def test_nothing_in_is_nothing_out(runner: Runner) -> None:
    assert list(runner.infer([])) == []


def test_a_graph_that_is_not_there_fails_on_entering_not_before(
    engine: StoredEngine, tmp_path: Path
) -> None:
    known = engine.manifest
    for runtime in ("openvino", "onnxruntime", "torch"):
        absent = make_runner(
            runtime, tmp_path / "none.onnx", known.input, known.outputs, this_cpu(THREADS)
        )
        with pytest.raises(Exception, match=r"none\.onnx"), absent:
            pytest.fail("a graph that is not there was opened")


def test_batches_are_drawn_only_a_few_ahead(runner: Runner) -> None:
    num_drawn = 0

    def source() -> Iterator[Array]:
        nonlocal num_drawn
        for batch in batches(30):
            num_drawn += 1
            yield batch

    with closing(stream(runner, source())) as outputs:
        next(outputs)
        assert num_drawn <= 3 * THREADS


def test_no_python_thread_outlives_a_runner(closed: Runner) -> None:
    before = threading.active_count()
    with closed:
        list(closed.infer(batches(5)))
    assert threading.active_count() == before


@on_host_runners
def test_one_batch_at_once_answers_what_a_stream_of_batches_answers(host: HostRunner) -> None:
    rows = batches(20)
    expected = [scores for (scores,) in host.infer(rows)]
    for batch, scores in zip(rows, expected, strict=True):
        (found,) = host.run(batch)
        assert (found.shape, found.dtype) == ((BATCH, 1), np.float32)
        np.testing.assert_array_equal(found, scores)


@on_host_runners
@pytest.mark.parametrize("num_threads", [THREADS, 8 * THREADS])
@pytest.mark.timeout(60)
def test_any_number_of_threads_may_ask_at_once_and_each_gets_its_own_answer(
    host: HostRunner, num_threads: int
) -> None:
    rows = batches(200)
    expected = [scores for (scores,) in host.infer(rows)]
    all_there = threading.Barrier(num_threads)

    def ask(first: int) -> list[Array]:
        all_there.wait(10)
        return [host.run(batch)[0] for batch in rows[first::num_threads]]

    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(ask, range(num_threads)))
    for first, answers in enumerate(found):
        np.testing.assert_array_equal(answers, expected[first::num_threads])


@on_host_runners
@pytest.mark.timeout(60)
def test_batches_are_run_while_a_stream_of_others_is_under_way(host: HostRunner) -> None:
    rows = batches(60)
    expected = [scores for (scores,) in host.infer(rows)]
    with closing(stream(host, rows)) as outputs:
        for number, (scores,) in enumerate(outputs):
            np.testing.assert_array_equal(scores, expected[number])
            np.testing.assert_array_equal(host.run(rows[-1 - number])[0], expected[-1 - number])


@on_host_runners
def test_run_takes_what_cannot_be_written_and_leaves_batches_as_they_are(host: HostRunner) -> None:
    (batch,) = batches(1)
    (expected,) = host.run(batch)
    assert np.array_equal(batch, *batches(1))
    batch.flags.writeable = False  # such as those that Arrow gives
    np.testing.assert_array_equal(host.run(batch)[0], expected)
    assert np.array_equal(batch, *batches(1))


@on_host_runners
def test_answers_of_run_may_be_kept_and_written(host: HostRunner) -> None:
    rows = batches(12)
    kept = [host.run(batch)[0] for batch in rows]
    copies = [scores.copy() for scores in kept]
    for batch in rows[::-1]:
        host.run(batch)
    np.testing.assert_array_equal(kept, copies)
    kept[0][:] = -1
    np.testing.assert_array_equal(host.run(rows[0])[0], copies[0])
    np.testing.assert_array_equal(kept[1:], copies[1:])


@on_host_runners
def test_a_batch_may_be_overwritten_as_soon_as_run_returns(host: HostRunner) -> None:
    rows = batches(12)
    expected = [scores for (scores,) in host.infer(rows)]
    same_memory = np.empty_like(rows[0])
    found = []
    for batch in rows:
        same_memory[:] = batch
        found.append(host.run(same_memory)[0])
        same_memory[:] = np.nan
    np.testing.assert_array_equal(found, expected)


@on_host_runners
@pytest.mark.timeout(30)
def test_an_error_in_one_run_leaves_the_runner_as_it_was(host: HostRunner) -> None:
    rows = batches(6)
    expected = [scores for (scores,) in host.infer(rows)]
    for _ in range(3 * THREADS):  # more often than there are requests to lose
        with pytest.raises(Exception, match=r"(?i)shape|dimension"):
            host.run(np.zeros((BATCH, NUM_FEATURES + 1), np.float32))
    np.testing.assert_array_equal([host.run(batch)[0] for batch in rows], expected)


@on_host_runners
def test_run_takes_rows_of_a_larger_array_in_place(host: HostRunner) -> None:
    rows = feature_rows(5 * BATCH, seed=5)
    expected = [scores for (scores,) in host.infer(batches(5))]
    found = [host.run(rows[first : first + BATCH])[0] for first in range(0, len(rows), BATCH)]
    np.testing.assert_array_equal(found, expected)
