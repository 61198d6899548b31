"""What layers multiply with their weights: the right windows of each, and moments of all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from engines import layer_inputs
from engines.export import name_nodes
from engines.layer_inputs import SAMPLES_PER_ROW, Floats, Layer, Moments, layers_of, measured
from engines.runner import Array
from tests.engines.small_graphs import (
    constants_of,
    conv_net,
    linear_weights,
    make_model,
    mlp,
    run_graph,
)

PLANES = ("batch", 6, 9, 8)
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one by one": ((5, 6, 1, 1), {}),
    "three by five": ((5, 6, 3, 5), {}),
    "padded": ((5, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    "padded on one side": ((5, 6, 3, 3), {"pads": [0, 2, 1, 0]}),
    "same, lower": ((5, 6, 2, 4), {"auto_pad": "SAME_LOWER"}),
    "same, even": ((5, 6, 2, 4), {"auto_pad": "SAME_UPPER"}),
    "dilated": ((5, 6, 3, 2), {"dilations": [2, 3]}),
    "depthwise": ((6, 1, 3, 3), {"group": 6, "pads": [1, 1, 1, 1]}),
    "two outputs a channel": ((12, 1, 3, 3), {"group": 6}),
    "grouped": ((4, 3, 3, 3), {"group": 2}),
}


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def one_layer(node: onnx.NodeProto, weight: Array, shape_in: tuple[int | str, ...]) -> Any:
    """A net of one layer, and the layer."""
    shape_out: list[int | str] = [f"size{axis}" for axis in range(len(shape_in))]
    core = make_model([node], {"w": weight}, shape_out, shape_in=shape_in)
    name_nodes(core)
    (layer,) = layers_of(core)
    return core, layer


def assert_samples_give_outputs(core: onnx.ModelProto, layer: Layer, rows: Array) -> None:
    """What a layer makes of each sample is among what it gives for its row."""
    (outputs,) = run_graph(core, rows)
    if layer._is_convolution:
        outputs = np.moveaxis(outputs, 1, -1)
    outputs = outputs.reshape(len(rows), -1, outputs.shape[-1])
    samples = layer.samples(rows, len(rows), np.random.default_rng(0))
    found = np.einsum("goi,gsi->sgo", layer.weight, samples).reshape(
        len(rows), -1, outputs.shape[2]
    )
    num_positions = outputs.shape[1]
    assert found.shape[1] == min(SAMPLES_PER_ROW, num_positions)
    apart = np.abs(found[:, :, None] - outputs[:, None]).max(axis=3).min(axis=2)
    assert apart.max() < 1e-4
    if num_positions > 1:
        assert len(np.unique(found[:, :, 0])) > len(rows), "always the same position"


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolutions_samples_are_windows_that_it_sees(case: str) -> None:
    shape, options = CONVOLUTIONS[case]
    node = helper.make_node("Conv", ["x", "w"], ["y"], **options)
    core, layer = one_layer(node, normal(*shape), PLANES)
    assert_samples_give_outputs(core, layer, normal(4, 6, 9, 8))


@pytest.mark.parametrize("pads", [[0, 0], [1, 1]])
def test_so_are_those_of_a_one_dimensional_one(pads: list[int]) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=pads)
    core, layer = one_layer(node, normal(4, 6, 3), ("batch", 6, 20))
    assert_samples_give_outputs(core, layer, normal(4, 6, 20))


def test_windows_of_a_convolution_with_strides_are_taken_from_everywhere() -> None:
    rows = normal(4, 6, 9, 8)
    weight = normal(5, 6, 3, 3)
    found = []
    for strides in ([1, 1], [3, 2]):
        node = helper.make_node("Conv", ["x", "w"], ["y"], strides=strides)
        _, layer = one_layer(node, weight, PLANES)
        found.append(layer.samples(rows, len(rows), np.random.default_rng(0)))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("operator", ["Gemm", "Gemm turned", "MatMul"])
def test_the_samples_of_a_row_of_numbers_are_that_row(operator: str) -> None:
    turned = {"transB": 1} if operator == "Gemm turned" else {}
    node = helper.make_node(operator.split()[0], ["x", "w"], ["y"], **turned)
    shape = (4, 8) if turned else (8, 4)
    core, layer = one_layer(node, normal(*shape), ("batch", 8))
    rows = normal(5, 8)
    np.testing.assert_array_equal(
        layer.samples(rows, len(rows), np.random.default_rng(0)), rows[None]
    )
    assert_samples_give_outputs(core, layer, rows)


def test_of_a_sequence_some_positions_are_taken() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    core, layer = one_layer(node, normal(8, 4), ("batch", 30, 8))
    assert_samples_give_outputs(core, layer, normal(5, 30, 8))


@pytest.mark.parametrize("core", [conv_net(), mlp()], ids=["conv", "mlp"])
def test_weights_go_back_as_they_came(core: onnx.ModelProto) -> None:
    name_nodes(core)
    weights = {name: array for name, array in constants_of(core).items() if array.ndim > 1}
    layers = layers_of(core)
    assert len(layers) == len(weights)
    for layer, weight in zip(layers, weights.values(), strict=True):
        np.testing.assert_array_equal(layer.as_constant(layer.weight), weight)


@pytest.mark.parametrize(
    "case", ["transposed", "constant input", "transposed conv", "float64", "scaled"]
)
def test_layers_that_are_no_such_product_are_left_out(case: str) -> None:
    weights = linear_weights() | {"k": normal(3, 8), "t": normal(8, 4, 1)}
    weights["d"] = normal(8, 4).astype(np.float64)
    nodes = {
        "scaled": [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5)],
        "float64": [helper.make_node("MatMul", ["x", "d"], ["y"])],
        "transposed": [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)],
        "constant input": [helper.make_node("MatMul", ["k", "x"], ["y"])],
        "transposed conv": [helper.make_node("ConvTranspose", ["x", "t"], ["y"])],
    }[case]
    core = make_model(nodes, weights, ["batch", 4])
    name_nodes(core)
    assert layers_of(core) == []


def test_of_layers_whose_weights_are_not_rounded_together_only_means_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = normal(16, 8)
    weights = linear_weights() | {"w2": normal(4, 8)}
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["p"], name="a", transB=1),
        helper.make_node("Gemm", ["x", "w"], ["q"], name="b", transB=1),
        helper.make_node("Gemm", ["x", "w2"], ["r"], name="c", transB=1),
        helper.make_node("Sum", ["p", "q", "r"], ["y"]),
    ]
    shared = moments(make_model(nodes, weights, ["batch", 4]), rows)
    monkeypatch.setattr(layer_inputs, "MOST_INPUTS", 31)
    large = moments(mlp((8, 32, 4)), rows)
    measured_together = {name: found.second is not None for name, found in (shared | large).items()}
    assert measured_together == {"a": False, "b": False, "c": True, "g1": True, "g2": False}
    np.testing.assert_allclose(shared["a"].mean, rows.mean(axis=0)[None], atol=1e-6)
    assert large["g2"].mean.shape == (1, 32)


@pytest.mark.parametrize("num_rows", [16, 40])
def test_of_rows_that_the_graph_laid_end_to_end_no_more_are_taken(num_rows: int) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "w"], ["y"], name="m"),
    ]
    arrays = {"shape": np.array([-1, 8]), "w": normal(8, 4)}
    core = make_model(nodes, arrays, ["tokens", 4], shape_in=("batch", 30, 8))
    assert moments(core, normal(num_rows, 30, 8))["m"].num_samples == SAMPLES_PER_ROW * num_rows


def test_a_vector_is_one_row() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["v"], axes=[0], keepdims=0),
        helper.make_node("MatMul", ["v", "w"], ["y"], name="m"),
    ]
    core = make_model(nodes, {"w": normal(8, 4)}, [4])
    found = moments(core, normal(16, 8))["m"]
    np.testing.assert_allclose(found.mean, normal(16, 8).mean(axis=0)[None], atol=1e-6)


def moments(core: onnx.ModelProto, *batches: Array) -> dict[str, Moments]:
    feeds = [{"x": rows} for rows in batches]
    return {layer.name: found for layer, found in measured(core, layers_of(core), lambda: feeds)}


def products(found: Moments) -> Floats:
    assert found.second is not None
    return found.second


def spread(found: Moments) -> Floats:
    assert found.covariance is not None
    return found.covariance


def test_moments_are_those_of_all_rows_in_batches_of_any_size() -> None:
    core, rows = mlp((8, 16, 4)), normal(33, 8)
    rows[-1] *= 30
    arrays = constants_of(core)
    hidden = np.maximum(rows @ arrays["w1"].T + arrays["b1"], 0)
    for found in (moments(core, rows), moments(core, rows[:20], rows[20:])):
        for name, inputs in (("g1", rows), ("g2", hidden)):
            assert found[name].num_samples == 33
            np.testing.assert_allclose(found[name].mean, inputs.mean(axis=0)[None], rtol=1e-4)
            second = inputs.T.astype(np.float64) @ inputs / 33
            np.testing.assert_allclose(products(found[name])[0], second, rtol=1e-3, atol=1e-4)
            covariance = np.cov(inputs.T, bias=True)
            np.testing.assert_allclose(spread(found[name])[0], covariance, rtol=1e-3, atol=1e-3)


def test_a_column_far_from_zero_has_the_variance_that_it_has() -> None:
    rows = normal(64, 8)
    rows[:, 2] = 1.6e9 + 1e5 * rows[:, 2]  # when a user came, in seconds
    found = moments(mlp((8, 4)), rows)["g1"]
    covariance = np.cov(rows.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(spread(found)[0], covariance, rtol=1e-3, atol=1e3)


def test_moments_that_do_not_fit_at_once_are_measured_in_several_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, rows = onnx.shape_inference.infer_shapes(mlp()), normal(16, 8)
    num_passes = 0

    def feeds() -> list[dict[str, Array]]:
        nonlocal num_passes
        num_passes += 1
        return [{"x": rows}]

    at_once = dict(zip("12345", measured(core, layers_of(core), feeds), strict=True))
    assert num_passes == 1
    monkeypatch.setattr(layer_inputs, "PASS_BYTES", 2 * 32 * 32 * 8)
    found = dict(zip("12345", measured(core, layers_of(core), feeds), strict=True))
    assert num_passes == 1 + 3  # 8 and 32 inputs, 32 and 32, 32
    for (layer, expected), (again, moments) in zip(at_once.values(), found.values(), strict=True):
        assert layer.name == again.name
        assert moments.second is not None
        np.testing.assert_array_equal(moments.second, expected.second)


def test_the_same_rows_have_the_same_moments() -> None:
    rows = normal(4, 3, 12, 12)
    first, second = (moments(conv_net(), rows) for _ in range(2))
    assert set(first) == {"c1", "c2", "c3", "y"}
    for name, found in first.items():
        np.testing.assert_array_equal(products(found), products(second[name]))


def test_rows_are_run_few_at_a_time_when_what_layers_get_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, rows = onnx.shape_inference.infer_shapes(mlp((8, 16, 4))), normal(10, 8)
    at_once = moments(core, rows)
    num_runs = 0
    open_session = layer_inputs.open_session

    class Counting:
        def __init__(self, model: onnx.ModelProto) -> None:
            self._session = open_session(model)

        def run(self, names: list[str], feed: dict[str, Array]) -> list[Array]:
            nonlocal num_runs
            num_runs += 1
            assert len(feed["x"]) <= 3
            found: list[Array] = self._session.run(names, feed)
            return found

    monkeypatch.setattr(layer_inputs, "open_session", Counting)
    monkeypatch.setattr(layer_inputs, "INPUT_BYTES", 3 * 16 * 4)
    few = moments(core, rows)
    assert num_runs == 4
    np.testing.assert_allclose(products(few["g2"]), products(at_once["g2"]), rtol=1e-6)
