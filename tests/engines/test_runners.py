"""One suite over every runner: what the pipeline relies on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.errors import EngineError
from engines.graph import input_spec, output_specs, wrap
from engines.load import make_runner
from engines.runner import Array, Runner
from tests.engines.small_models import image_rows, images_spec, write_image_model

BATCH = 4


@pytest.fixture(params=["openvino", "onnxruntime"])
def closed(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    spec = images_spec(write_image_model(tmp_path / "model.onnx"))
    graph = wrap(onnx.load(spec.source), spec, BATCH)
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph.SerializeToString())
    return make_runner(
        request.param, path, input_spec(spec, BATCH), output_specs(graph, spec), num_threads=2
    )


@pytest.fixture
def runner(closed: Runner) -> Iterator[Runner]:
    with closed:
        yield closed


def batches(num_batches: int) -> list[Array]:
    return list(image_rows(num_batches * BATCH, seed=3).reshape(num_batches, BATCH, 12, 12, 3))


def one_by_one(runner: Runner, rows: list[Array]) -> list[Array]:
    return [next(iter(runner.infer([batch])))[1] for batch in rows]


def test_outputs_have_the_promised_dtypes_and_shapes(runner: Runner) -> None:
    (outputs,) = runner.infer(batches(1))
    for found, spec in zip(outputs, runner.outputs, strict=True):
        assert (str(found.dtype), found.shape) == (spec.dtype, spec.shape)


def test_outputs_come_in_the_order_of_the_batches(runner: Runner) -> None:
    rows = batches(40)
    together = [outputs[1] for outputs in runner.infer(rows)]
    for found, expected in zip(together, one_by_one(runner, rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_outputs_survive_the_batches_that_follow(runner: Runner) -> None:
    rows = batches(20)
    stream = runner.infer(rows)
    first = next(stream)
    kept = [array.copy() for array in first]
    list(stream)
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_batches_are_drawn_only_a_few_ahead(runner: Runner) -> None:
    drawn = itertools.count()
    num_drawn = 0

    def source() -> Iterator[Array]:
        nonlocal num_drawn
        for batch in batches(30):
            num_drawn = next(drawn) + 1
            yield batch

    stream = runner.infer(source())
    next(stream)
    assert num_drawn <= 6
    stream.close()  # type: ignore[attr-defined]


def test_none_brings_out_everything_in_flight_before_the_next_batch(runner: Runner) -> None:
    seen: list[int] = []
    num_out = 0

    def source() -> Iterator[Array | None]:
        for batch in batches(3):
            yield batch
            yield None
            seen.append(num_out)

    for _ in runner.infer(source()):
        num_out += 1
    assert seen == [1, 2, 3]


def test_an_early_close_leaves_a_runner_that_still_works(runner: Runner) -> None:
    rows = batches(20)
    stream = runner.infer(rows)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(list(runner.infer(rows))) == 20


def test_no_batches_give_no_outputs(runner: Runner) -> None:
    assert list(runner.infer([])) == []


@pytest.mark.parametrize(
    "batch",
    [np.zeros((BATCH - 1, 12, 12, 3), np.uint8), np.zeros((BATCH, 12, 12, 3), np.float32)],
    ids=["partial batch", "wrong dtype"],
)
def test_a_batch_of_another_kind_is_refused_by_name(runner: Runner, batch: Array) -> None:
    with pytest.raises(
        EngineError, match=r"engine input rows: .*; expected uint8 \(4, 12, 12, 3\)"
    ):
        list(runner.infer([batch]))
    assert len(list(runner.infer(batches(2)))) == 2


def test_an_error_of_the_source_comes_through_and_the_runner_goes_on(runner: Runner) -> None:
    def source() -> Iterator[Array]:
        yield from batches(2)
        raise ZeroDivisionError("the decoder failed")

    with pytest.raises(ZeroDivisionError, match="the decoder failed"):
        list(runner.infer(source()))
    assert len(list(runner.infer(batches(3)))) == 3


def test_a_runner_can_be_entered_again(closed: Runner) -> None:
    with closed:
        first = one_by_one(closed, batches(2))
    with closed:
        again = one_by_one(closed, batches(2))
    np.testing.assert_allclose(first, again, atol=1e-6)


def test_no_python_thread_outlives_a_runner(closed: Runner) -> None:
    before = threading.active_count()
    with closed:
        list(closed.infer(batches(5)))
    assert threading.active_count() == before
