"""Bias correction: what the rounding of weights does to the mean of each channel is taken back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engines.bias_correction import corrected_biases, with_biases
from engines.devices import WeightBits
from engines.export import name_nodes
from engines.runner import Array
from tests.engines.small_graphs import (
    conv_net,
    gemm,
    linear,
    linear_weights,
    make_model,
    run_graph,
)
from tests.engines.small_models import labelled_pictures

LAYERS = ["c1", "c2", "c3", "y"]


def corrected(
    core: onnx.ModelProto, *batches: Array, weight_bits: WeightBits = 8
) -> onnx.ModelProto:
    name_nodes(core)
    return with_biases(core, corrected_biases(core, [{"x": rows} for rows in batches], weight_bits))


def planes(num_rows: int) -> Array:
    pixels = labelled_pictures(num_rows, seed=0).rows.astype(np.float32)
    return np.ascontiguousarray(((pixels - 127) / 64).transpose(0, 3, 1, 2))


def rounded(model: onnx.ModelProto, largest: int = 127) -> onnx.ModelProto:
    """The graph with each weight rounded to int8 per channel, and all else in float."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim > 1:
            axes = tuple(range(1, weight.ndim))
            scale = np.abs(weight).max(axis=axes, keepdims=True) / largest
            value = (np.round(weight / scale) * scale).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return copy


def biases(model: onnx.ModelProto) -> dict[str, list[float]]:
    tensors = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 1]
    return {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in tensors}


@pytest.mark.parametrize(("weight_bits", "largest"), [(8, 127), (7, 64)])
def test_corrected_biases_take_back_the_mean_error_of_each_layer(
    weight_bits: WeightBits, largest: int
) -> None:
    core, rows = conv_net(), planes(64)
    expected = run_graph(core, rows, LAYERS)
    nets = (core, corrected(core, rows, weight_bits=weight_bits))
    before, after = (run_graph(rounded(net, largest), rows, LAYERS) for net in nets)

    def error(found: list[Array]) -> list[float]:
        axes = [(0, 2, 3), (0, 2, 3), (0, 2, 3), (0,)]
        pairs = zip(found, expected, axes, strict=True)
        return [float(np.abs((a - b).mean(axis=axis)).mean()) for a, b, axis in pairs]

    for uncorrected, left in zip(error(before), error(after), strict=True):
        assert left < 0.75 * uncorrected


def test_correction_leaves_the_original_alone_and_changes_only_biases() -> None:
    core = conv_net()
    name_nodes(core)
    before = core.SerializeToString()
    changed = corrected(core, np.ones((2, 3, 12, 12), np.float32))
    assert core.SerializeToString() == before
    assert biases(changed) != biases(core)
    assert [t.name for t in changed.graph.initializer] == [t.name for t in core.graph.initializer]
    weights = zip(changed.graph.initializer, core.graph.initializer, strict=True)
    assert all(found == kept for found, kept in weights if len(kept.dims) > 1)


@pytest.mark.parametrize("case", ["no bias", "scaled", "shared"])
def test_layers_whose_bias_cannot_hold_the_correction_are_left_alone(case: str) -> None:
    weights = linear_weights()
    nodes = {
        "no bias": [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "scaled": [gemm(alpha=0.5)],
        "shared": [
            gemm(target="p"),
            helper.make_node("Gemm", ["x", "w2", "b"], ["q"], transB=1),
            helper.make_node("Add", ["p", "q"], ["y"]),
        ],
    }[case]
    core = make_model(nodes, {**weights, "w2": weights["w"] + 1}, ["batch", 4])
    rows = np.full((4, 8), 3.0, np.float32)
    assert corrected_biases(core, [{"x": rows}]) == {}
    assert biases(corrected(core, rows)) == biases(core)


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_biases_are_corrected_at_every_opset(opset: int) -> None:
    core = linear(opset=opset)
    rows = np.random.default_rng(0).standard_normal((16, 8), dtype=np.float32) + 3
    nets = (rounded(corrected(core, rows)), core)
    found, expected = (run_graph(net, rows)[0] for net in nets)
    np.testing.assert_allclose(found.mean(axis=0), expected.mean(axis=0), atol=1e-5)


def test_every_row_weighs_the_same_in_batches_of_any_size() -> None:
    core = linear()
    rows = np.random.default_rng(0).standard_normal((33, 8), dtype=np.float32)
    rows[-1] = 100.0
    at_once = biases(corrected(core, rows))["b"]
    in_two = biases(corrected(core, rows[:32], rows[32:]))["b"]
    np.testing.assert_allclose(in_two, at_once, rtol=1e-4)


def test_a_one_dimensional_convolution_is_corrected() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((4, 1, 3)).astype(np.float32),
        "b": np.zeros(4, np.float32),
        "axes": np.array([1]),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["u"]),
        helper.make_node("Conv", ["u", "w", "b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["y"]),
    ]
    core = make_model(nodes, arrays, ["batch", 24])
    assert biases(corrected(core, np.ones((4, 8), np.float32))) != biases(core)


def test_a_layer_that_stays_in_float_keeps_its_own_bias() -> None:
    core = conv_net()
    found = corrected_biases(core, [{"x": planes(16)}])
    assert set(found) == set(LAYERS)
    mixed = biases(with_biases(core, found, float_layers=["c2"]))
    own, all_changed = biases(core), biases(with_biases(core, found))
    assert mixed["b2"] == own["b2"] != all_changed["b2"]
    for name in ("b1", "b3", "b4"):
        assert mixed[name] == all_changed[name] != own[name]
