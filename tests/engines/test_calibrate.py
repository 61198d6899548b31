"""Calibration: the ranges that numpy finds, and the cuts that TensorRT's calibrator would make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.calibrate import (
    NUM_BINS,
    Feeds,
    Method,
    ScaleTable,
    calibrate,
    entropy_bin,
    feeds_of,
    percentile_bin,
)
from engines.errors import ModelError
from engines.export import load_core
from engines.graph import wrap
from engines.model import ModelSpec
from engines.runner import Array
from tests.engines.small_graphs import (
    constants_of,
    features,
    gemm,
    linear,
    linear_weights,
    make_model,
    mlp,
    run_graph,
    save,
)
from tests.engines.small_models import IMAGES, feature_rows, image_rows

METHODS: list[Method] = ["max", "percentile", "entropy"]


def whole(rows: Array, num_rows: int | None = None) -> Feeds:
    """The rows in batches of one size."""
    size = num_rows or len(rows)
    return lambda: ({"x": rows[start : start + size]} for start in range(0, len(rows), size))


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model)


def identity() -> onnx.ModelProto:
    return make_model([helper.make_node("Neg", ["x"], ["y"])], {}, ["batch", 8])


def test_max_is_the_range_that_numpy_finds_in_every_tensor() -> None:
    core, rows = inferred(mlp((8, 16, 4))), feature_rows(50, seed=1)
    arrays = constants_of(core)
    tensors = {"x": rows, "h1": rows @ arrays["w1"].T + arrays["b1"]}
    tensors["r1"] = np.maximum(tensors["h1"], 0)
    tensors["y"] = tensors["r1"] @ arrays["w2"].T + arrays["b2"]
    table = calibrate(core, whole(rows), "max")
    assert (table.method, table.num_rows) == ("max", 50)
    assert set(table.ranges) == set(tensors)
    for name, values in tensors.items():
        np.testing.assert_allclose(table.ranges[name], (values.min(), values.max()), rtol=1e-5)


def test_only_float_tensors_that_are_no_constants_have_a_range() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["same"]),
        gemm("same"),
    ]
    core = inferred(make_model(nodes, linear_weights(), ["batch", 4]))
    table = calibrate(core, whole(feature_rows(4, seed=0)), "max")
    assert set(table.ranges) == {"x", "same", "y"}


def test_a_percentile_leaves_an_outlier_out_and_a_maximum_does_not() -> None:
    rows = feature_rows(4096, seed=2)
    rows[7, 3] = 1000.0
    core = inferred(identity())
    assert calibrate(core, whole(rows), "max").ranges["x"][1] == 1000.0
    low, high = calibrate(core, whole(rows, 64), "percentile").ranges["x"]
    kept = np.percentile(np.abs(rows), 99.99)
    assert low == pytest.approx(rows.min())  # a range is never wider than what was seen
    assert kept <= high <= kept + 1000 / NUM_BINS


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_always_zero_has_an_empty_range(method: Method) -> None:
    table = calibrate(inferred(identity()), whole(np.zeros((9, 8), np.float32)), method)
    assert {tuple(np.abs(both)) for both in table.ranges.values()} == {(0.0, 0.0)}


def reference_bin(histogram: Array) -> int:
    """The last bin kept, step by step after pytorch-quantization's `_compute_amax_entropy`."""
    bins = histogram.astype(np.float64)
    bins[0] = bins[1]
    divergences = []
    for num_kept in range(128, len(bins) + 1):
        level = np.digitize(np.arange(num_kept), np.linspace(0, num_kept, num=129)) - 1
        used = bins[:num_kept] != 0
        sums = np.bincount(level[used], bins[:num_kept][used], minlength=128)
        filled = np.bincount(level[used], minlength=128)
        quantised = np.zeros(num_kept)
        quantised[used] = (sums / np.maximum(filled, 1))[level[used]]
        clipped = bins[:num_kept].copy()
        clipped[-1] += bins[num_kept:].sum()
        divergences.append(kullback_leibler(clipped, quantised))
    backwards = np.array(divergences[::-1])
    return 127 + len(divergences) - 1 - int(np.argmin(backwards))


def kullback_leibler(p: Array, q: Array) -> float:
    if p.sum() == 0 or q.sum() == 0 or (q[p > 0] == 0).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


def histogram_of(kind: str) -> Array:
    rng = np.random.default_rng(4)
    values = {
        "normal": np.abs(rng.standard_normal(100_000)),
        "heavy tail": rng.exponential(size=100_000) ** 2,
        "relu and outliers": np.append(np.maximum(rng.standard_normal(50_000), 0), [40.0, 41.0]),
        "uniform": rng.random(100_000),
        "two humps": np.abs(np.append(rng.normal(1, 0.1, 50_000), rng.normal(9, 0.5, 500))),
        "few values": np.append(rng.random(40), 3.0),
        "one value": np.ones(1000),
    }[kind]
    counts, _ = np.histogram(values, bins=NUM_BINS, range=(0, values.max()))
    return counts


@pytest.mark.parametrize(
    "kind",
    [
        *("normal", "heavy tail", "relu and outliers", "uniform"),
        *("two humps", "few values", "one value"),
    ],
)
def test_entropy_cuts_where_nvidias_calibrator_does(kind: str) -> None:
    histogram = histogram_of(kind)
    before = histogram.copy()
    assert entropy_bin(histogram) == reference_bin(histogram)
    np.testing.assert_array_equal(histogram, before)


def test_entropy_clips_a_heavy_tail_and_keeps_a_uniform_range() -> None:
    assert entropy_bin(histogram_of("relu and outliers")) < NUM_BINS / 4
    assert entropy_bin(histogram_of("uniform")) > NUM_BINS * 0.95


def test_a_percentile_keeps_the_bin_that_holds_it() -> None:
    histogram = np.zeros(NUM_BINS, np.int64)
    histogram[[3, 10, 2000]] = [9_000, 999, 1]
    assert percentile_bin(histogram) == 10
    histogram[2000] = 2
    assert percentile_bin(histogram) == 2000


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_batches_of_any_size_give_the_same_table(method: Method, num_rows: int) -> None:
    core, rows = inferred(mlp((8, 16, 4))), feature_rows(90, seed=3)
    at_once = calibrate(core, whole(rows), method)
    table = calibrate(core, whole(rows, num_rows), method)
    assert table.num_rows == at_once.num_rows == 90
    for name, expected in at_once.ranges.items():
        np.testing.assert_allclose(table.ranges[name], expected, rtol=1e-5)


def test_columns_of_a_large_tensor_are_sampled_in_their_share() -> None:
    rows = np.ones((4, 1024, 512), np.float32)
    rows[:, :, 7] = 5.0  # one column of 512, which steps of a power of two would miss
    node = helper.make_node("Neg", ["x"], ["y"])
    shape = ("batch", 1024, 512)
    core = inferred(make_model([node], {}, list(shape), shape_in=shape))
    table = calibrate(core, whole(rows, 2), "percentile")
    assert table.ranges["x"][1] == 5.0


def test_a_graph_bound_to_a_batch_is_fed_full_batches_with_rows_from_the_front_again(
    tmp_path: Path,
) -> None:
    spec = features(save(linear(shape_in=(4, 8)), tmp_path / "m.onnx"))
    rows = feature_rows(10, seed=4)
    core = load_core(spec)
    feeds = feeds_of(core, spec, rows)
    last = list(feeds())[-1]["x"]
    np.testing.assert_array_equal(last, rows[[8, 9, 0, 1]])
    assert [len(feed["x"]) for feed in feeds()] == [4, 4, 4]
    free = features(save(linear(), tmp_path / "free.onnx"))
    expected = calibrate(load_core(free), whole(rows), "max")
    found = calibrate(core, feeds, "max")
    for name in ("x", "y"):
        np.testing.assert_allclose(found.ranges[name], expected.ranges[name], rtol=1e-5)


def test_pictures_are_fed_as_the_engines_graph_normalises_them(tmp_path: Path) -> None:
    flat = helper.make_node("Flatten", ["x"], ["y"])
    model = make_model([flat], {}, ["b", 432], shape_in=("b", 3, 12, 12))
    path = save(model, tmp_path / "m.onnx")
    spec = ModelSpec(source=str(path), input=IMAGES, head="scores")
    rows, core = image_rows(20, seed=5), load_core(spec)
    (scores,) = run_graph(wrap(core, spec, 20), rows)
    fed = np.concatenate([feed["x"] for feed in feeds_of(core, spec, rows)()])
    assert fed.dtype == np.float32
    np.testing.assert_allclose(fed.reshape(20, -1), scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("node", "shown"),
    [("Log", "tensor l: nan to nan"), ("Reciprocal", "tensor l: .*inf")],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_not_finite_is_named(node: str, shown: str, method: Method) -> None:
    core = make_model([helper.make_node(node, ["x"], ["l"]), gemm("l")], linear_weights(), ["b", 4])
    rows = feature_rows(20, seed=1)
    rows[3, 2] = 0.0
    with pytest.raises(ModelError, match=shown):
        calibrate(inferred(core), whole(rows, 6), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_a_mask_makes_infinite_has_no_range(method: Method) -> None:
    mask = np.where(np.arange(8) < 4, 0, -np.inf).astype(np.float32)
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["s"]),
        gemm("s"),
    ]
    core = inferred(make_model(nodes, linear_weights() | {"mask": mask}, ["batch", 4]))
    table = calibrate(core, whole(feature_rows(20, seed=1), 6), method)
    assert set(table.ranges) == {"x", "s", "y"}
    assert np.isfinite(list(table.ranges.values())).all()


def test_a_table_reads_back_from_its_json_to_the_last_bit() -> None:
    core = inferred(mlp((8, 16, 4)))
    table = calibrate(core, whole(feature_rows(40, seed=1)), "entropy")
    found = json.loads(table.to_json())
    assert found["method"] == "entropy"
    assert found["num_rows"] == 40
    ranges = {name: tuple(both) for name, both in found["ranges"].items()}
    assert ScaleTable(method="entropy", num_rows=40, ranges=ranges) == table
    assert table.to_json().count(b"\n") == len(table.ranges) + 2
