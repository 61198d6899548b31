from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engines.bias_correction import correct_biases
from engines.export import load_core
from engines.graph import wrap
from engines.model import ImageInput, ModelSpec
from engines.quantize import normalised, quantize_for_cpu
from engines.runner import Array
from tests.engines.small_graphs import (
    conv_net,
    features,
    gemm,
    linear,
    linear_weights,
    make_model,
    run_graph,
    save,
)

IMAGES = ImageInput(height=12, width=12, mean=(127.0,) * 3, std=(64.0,) * 3)
LAYERS = ["c1", "c2", "c3", "y"]


def pixels(num_rows: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    tint = rng.integers(0, 256, (num_rows, 1, 1, 3))
    noise = rng.integers(-30, 30, (num_rows, 12, 12, 3))
    return np.clip(tint + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    path = save(conv_net(), tmp_path / "m.onnx")
    return ModelSpec(source=str(path), input=IMAGES, head="classes")


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with each weight rounded to int8 per channel, and all else in float."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim > 1:
            axes = tuple(range(1, weight.ndim))
            scale = np.abs(weight).max(axis=axes, keepdims=True) / 127
            value = (np.round(weight / scale) * scale).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return copy


def biases(model: onnx.ModelProto) -> dict[str, list[float]]:
    tensors = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 1]
    return {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in tensors}


def test_activations_are_uint8_and_weights_int8_per_channel(spec: ModelSpec) -> None:
    graph = quantize_for_cpu(load_core(spec), spec, pixels(48), None).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantize
    assert {arrays[node.input[2]].dtype for node in quantize} == {np.dtype(np.uint8)}
    sources = {node.output[0]: node for node in graph.node}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 4
    for layer in layers:
        weight = sources[layer.input[1]]
        assert weight.op_type == "DequantizeLinear"
        values, scales = (arrays[name] for name in weight.input[:2])
        assert (values.dtype, scales.shape) == (np.int8, (len(values),))


def test_int8_mostly_picks_the_classes_of_fp32(spec: ModelSpec) -> None:
    core, rows = load_core(spec), pixels(200, seed=5)
    int8 = quantize_for_cpu(core, spec, pixels(48), None)
    expected, _ = run_graph(wrap(core, spec, 200), rows)
    found, _ = run_graph(wrap(int8, spec, 200), rows)
    assert len(set(expected[:, 0].tolist())) > 1, "a net with one answer would prove nothing"
    assert (expected == found).mean() >= 0.9


def test_corrected_biases_take_back_the_mean_error_of_each_layer(spec: ModelSpec) -> None:
    core, rows = conv_net(), normalised(spec, pixels(64))
    corrected = correct_biases(core, [{"x": rows}])
    expected = run_graph(core, rows, LAYERS)
    before, after = (run_graph(rounded(m), rows, LAYERS) for m in (core, corrected))

    def error(found: list[Array]) -> list[float]:
        axes = [(0, 2, 3), (0, 2, 3), (0, 2, 3), (0,)]
        pairs = zip(found, expected, axes, strict=True)
        return [float(np.abs((a - b).mean(axis=axis)).mean()) for a, b, axis in pairs]

    for uncorrected, left in zip(error(before), error(after), strict=True):
        assert left < 0.75 * uncorrected


def test_correction_leaves_the_original_alone_and_changes_only_biases() -> None:
    core = conv_net()
    before = core.SerializeToString()
    corrected = correct_biases(core, [{"x": np.ones((2, 3, 12, 12), np.float32)}])
    assert core.SerializeToString() == before
    assert biases(corrected) != biases(core)
    assert [t.name for t in corrected.graph.initializer] == [t.name for t in core.graph.initializer]
    weights = zip(corrected.graph.initializer, core.graph.initializer, strict=True)
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
    assert biases(correct_biases(core, [{"x": rows}])) == biases(core)


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_biases_are_corrected_at_every_opset(opset: int) -> None:
    core = linear(opset=opset)
    rows = np.random.default_rng(0).standard_normal((16, 8), dtype=np.float32) + 3
    corrected = correct_biases(core, [{"x": rows}])
    found, expected = (run_graph(m, rows)[0] for m in (rounded(corrected), core))
    np.testing.assert_allclose(found.mean(axis=0), expected.mean(axis=0), atol=1e-5)


def test_every_row_weighs_the_same_in_batches_of_any_size() -> None:
    core = linear()
    rows = np.random.default_rng(0).standard_normal((33, 8), dtype=np.float32)
    rows[-1] = 100.0
    at_once = biases(correct_biases(core, [{"x": rows}]))["b"]
    in_two = biases(correct_biases(core, [{"x": rows[:32]}, {"x": rows[32:]}]))["b"]
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
    assert biases(correct_biases(core, [{"x": np.ones((4, 8), np.float32)}])) != biases(core)


@pytest.mark.parametrize("num_rows", [1, 6, 50])
@pytest.mark.parametrize("batch", ["batch", 6])
def test_a_graph_without_biases_is_quantised_with_any_number_of_rows(
    tmp_path: Path, batch: int | str, num_rows: int
) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weights = {"w": np.ascontiguousarray(linear_weights()["w"].T)}
    model = make_model([node], weights, [batch, 4], shape_in=(batch, 8))
    spec = features(save(model, tmp_path / "m.onnx"))
    rows = np.random.default_rng(1).standard_normal((num_rows, 8), dtype=np.float32)
    fixed = batch if isinstance(batch, int) else None
    int8 = quantize_for_cpu(load_core(spec), spec, rows, fixed)
    assert "DequantizeLinear" in {node.op_type for node in int8.graph.node}
