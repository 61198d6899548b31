"""Two int8 graphs from one table: how each is placed, and that both answer as fp32 does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.calibrate import Method, calibrate, feeds_of
from engines.devices import this_cpu
from engines.export import load_core, name_nodes
from engines.gate import GateSpec
from engines.quantize import Placement, quantizable_layers, quantize
from engines.round_weights import LARGEST_WEIGHT
from engines.runner import Array
from tests.engines.fitted_nets import NETS, Net, make_net, num_classes_seen
from tests.engines.small_graphs import (
    constants_of,
    features,
    linear_weights,
    make_model,
    mlp,
    run_graph,
    save,
)
from tests.engines.small_models import feature_rows

PLACEMENTS: list[Placement] = ["tensorrt", "cpu"]
CONVS = 7
"""Of the ResNet; its Gemm comes on top."""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Net]:
    folder = tmp_path_factory.mktemp("nets")
    return {kind: make_net(kind, folder) for kind in NETS}


@pytest.fixture(scope="module")
def graphs(nets: dict[str, Net]) -> dict[Placement, onnx.ModelProto]:
    """The ResNet in int8."""
    return {placement: nets["resnet"].factory.graph("int8", placement) for placement in PLACEMENTS}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def nodes_of(model: onnx.ModelProto, *kinds: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in kinds]


def activation_scales(model: onnx.ModelProto) -> Iterator[tuple[str, float, Array]]:
    """Tensor, scale and zero point of each activation that is rounded."""
    arrays = constants_of(model)
    for node in nodes_of(model, "QuantizeLinear"):
        if node.input[0] not in arrays:
            tensor = node.input[0].removesuffix("_QuantizeLinear_Input")  # of a graph's output
            yield tensor, float(arrays[node.input[1]]), arrays[node.input[2]]


def test_the_tensorrt_graph_is_symmetric_int8_all_over(
    graphs: dict[Placement, onnx.ModelProto],
) -> None:
    arrays = constants_of(graphs["tensorrt"])
    pairs = nodes_of(graphs["tensorrt"], "QuantizeLinear", "DequantizeLinear")
    assert len(pairs) > 2 * (CONVS + 1)
    for node in pairs:
        zero_point = arrays[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()


def test_the_tensorrt_graph_rounds_inputs_and_weights_and_leaves_biases_in_float(
    graphs: dict[Placement, onnx.ModelProto],
) -> None:
    model = graphs["tensorrt"]
    arrays, made_by = constants_of(model), producers(model)
    layers = nodes_of(model, "Conv", "Gemm")
    most = LARGEST_WEIGHT[this_cpu(1).weight_bits]
    assert len(layers) == CONVS + 1
    for layer in layers:
        assert [made_by[name].op_type for name in layer.input[:2]] == ["DequantizeLinear"] * 2
        assert arrays[layer.input[2]].dtype == np.float32
        weight = made_by[made_by[layer.input[1]].input[0]]  # a float constant, then Q and DQ
        scales, values = arrays[weight.input[1]], arrays[weight.input[0]]
        assert values.dtype == np.float32
        largest = np.abs(values).reshape(len(values), -1).max(axis=1)
        np.testing.assert_allclose(scales, largest / most, rtol=1e-5)


def test_nothing_lies_between_a_layer_and_its_activation_for_tensorrt(
    graphs: dict[Placement, onnx.ModelProto],
) -> None:
    model = graphs["tensorrt"]
    made_by = producers(model)
    activations = nodes_of(model, "Relu", "Clip")
    assert len(activations) == 6
    assert {made_by[node.input[0]].op_type for node in activations} == {"Conv", "Add"}


def test_a_residual_add_has_one_leg_in_int8_and_one_straight_from_its_convolution(
    graphs: dict[Placement, onnx.ModelProto],
) -> None:
    model = graphs["tensorrt"]
    made_by = producers(model)
    adds = nodes_of(model, "Add")
    assert len(adds) == 2
    for add in adds:
        kinds = sorted(made_by[name].op_type for name in add.input)
        assert kinds == ["Conv", "DequantizeLinear"]
    used = {name for node in model.graph.node for name in node.input}
    assert set(constants_of(model)) <= used, "the scales of a pair that was removed are left"


def test_means_are_taken_of_int8_for_tensorrt(graphs: dict[Placement, onnx.ModelProto]) -> None:
    model = graphs["tensorrt"]
    (pool,) = nodes_of(model, "GlobalAveragePool")
    assert producers(model)[pool.input[0]].op_type == "DequantizeLinear"


def test_an_add_without_a_weighted_leg_keeps_both_in_int8(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Add", ["r", "x"], ["s"]),
        helper.make_node("Gemm", ["s", "w", "b"], ["y"], transB=1),
    ]
    spec = features(save(make_model(nodes, linear_weights(), ["batch", 4]), tmp_path / "m.onnx"))
    core = load_core(spec)
    table = calibrate(core, feeds_of(core, spec, feature_rows(16, seed=0)), "max")
    model = quantize(core, {}, table, "tensorrt")
    (add,) = nodes_of(model, "Add")
    made_by = producers(model)
    assert [made_by[name].op_type for name in add.input] == ["DequantizeLinear"] * 2


def test_the_bias_of_a_matmul_stays_float_for_tensorrt(tmp_path: Path) -> None:
    bias = np.array([100, 0.01, 0.02, 0.03], np.float32)  # one int8 scale would lose three of them
    weights = {"w": np.eye(8, 4, dtype=np.float32), "b": bias}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    spec = features(save(make_model(nodes, weights, ["batch", 4]), tmp_path / "m.onnx"))
    core = load_core(spec)
    table = calibrate(core, feeds_of(core, spec, feature_rows(16, seed=0)), "max")
    model = quantize(core, {}, table, "tensorrt")
    for add in nodes_of(model, "Add"):
        constant = next(name for name in add.input if name in constants_of(model))
        np.testing.assert_array_equal(constants_of(model)[constant], bias)


def test_the_cpu_graph_has_uint8_activations_and_int8_weights_per_channel(
    graphs: dict[Placement, onnx.ModelProto],
) -> None:
    model = graphs["cpu"]
    arrays, made_by = constants_of(model), producers(model)
    inner = [zero.dtype for name, _, zero in activation_scales(model) if name != "x"]
    assert set(inner) == {np.dtype(np.uint8)}
    assert len(inner) > CONVS
    layers = nodes_of(model, "Conv", "Gemm")
    assert len(layers) == CONVS + 1
    for layer in layers:
        weight = made_by[layer.input[1]]
        assert weight.op_type == "DequantizeLinear"
        values, scales = (arrays[name] for name in weight.input[:2])
        assert (values.dtype, scales.shape) == (np.int8, (len(values),))


def test_the_cpu_graph_rounds_what_every_convolution_gives(
    graphs: dict[Placement, onnx.ModelProto],
) -> None:
    """Without that, ONNX Runtime would run float convolutions between Q and DQ."""
    rounded = {name for name, _, _ in activation_scales(graphs["cpu"])}
    for node in nodes_of(graphs["cpu"], "Conv", "Add"):
        assert node.output[0] in rounded


@pytest.mark.parametrize(("shift", "dtype"), [(0.0, np.int8), (2.0, np.uint8)])
def test_the_cpu_graph_reads_int8_where_the_input_lies_evenly_round_zero(
    tmp_path: Path, shift: float, dtype: type
) -> None:
    spec = features(save(mlp((8, 16, 1)), tmp_path / "m.onnx"))
    core = load_core(spec)
    rows = np.clip(feature_rows(64, seed=1), -2, 2) + np.float32(shift)
    table = calibrate(core, feeds_of(core, spec, rows), "max")
    scales = {name: zero for name, _, zero in activation_scales(quantize(core, {}, table, "cpu"))}
    assert scales["x"].dtype == dtype
    assert {zero.dtype for name, zero in scales.items() if name != "x"} == {np.dtype(np.uint8)}


@pytest.mark.parametrize("kind", NETS)
def test_both_graphs_have_the_scales_that_follow_from_one_range(
    nets: dict[str, Net], kind: str
) -> None:
    factory = nets[kind].factory
    names = []
    for placement in PLACEMENTS:
        scales = list(activation_scales(factory.graph("int8", placement)))
        names.append({name for name, _, _ in scales})
        for name, scale, zero_point in scales:
            low, high = factory.scales.ranges[name]
            is_symmetric = zero_point.dtype == np.int8
            assert is_symmetric or placement == "cpu"
            wanted = max(-low, high) / 127 if is_symmetric else (max(high, 0) - min(low, 0)) / 255
            assert scale == pytest.approx(wanted, rel=1e-5), name
    assert len(names[0] & names[1]) >= 4, "tensors that both graphs round"


@pytest.mark.parametrize(
    ("kind", "method"),
    [*((kind, "max") for kind in NETS), ("resnet", "percentile"), ("mlp", "entropy")],
)
def test_both_graphs_answer_as_fp32_and_as_each_other(
    kind: str, method: Method, tmp_path: Path
) -> None:
    net = make_net(kind, tmp_path, method)
    expected = net.answers(net.factory.core)
    if net.spec.head == "classes":
        assert num_classes_seen(expected) == 5
    gate = GateSpec()
    found = [net.answers(net.factory.graph("int8", placement)) for placement in PLACEMENTS]
    for answers in found:
        assert net.judge(answers, expected).failures(gate) == ()
        assert net.judge(answers, expected).max_abs_diff > 0, "it was computed in float"
    assert net.judge(found[0], found[1]).failures(gate) == ()


@pytest.mark.parametrize("kind", NETS)
def test_onnx_runtimes_int8_kernels_answer_as_the_graph_says(
    nets: dict[str, Net], kind: str
) -> None:
    net = nets[kind]
    graph = net.factory.graph("int8", "cpu")
    literal, fused = (net.answers(graph, is_literal=each) for each in (True, False))
    assert net.judge(fused, literal).failures(GateSpec(min_agreement=0.99)) == ()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("is_literal", [True, False], ids=["literal", "optimised"])
def test_layers_in_float_stay_float_with_their_own_bias(
    nets: dict[str, Net], placement: Placement, is_literal: bool
) -> None:
    net = nets["resnet"]
    core = net.factory.core
    kept = ["stem_node", "a2_node"]
    model = net.factory.graph("mixed", placement, kept)
    arrays, original, made_by = constants_of(model), constants_of(core), producers(model)
    for node in nodes_of(model, "Conv", "Gemm"):
        assert (node.input[1] in original) is (node.name in kept)
        if node.name in kept:
            for name in node.input[1:]:
                np.testing.assert_array_equal(arrays[name], original[name])
        else:
            assert made_by[node.input[1]].op_type == "DequantizeLinear"
    found = net.answers(model, is_literal=is_literal)
    assert net.judge(found).failures(GateSpec()) == ()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_all_layers_in_float_are_nearer_to_fp32_than_none(
    nets: dict[str, Net], placement: Placement
) -> None:
    net = nets["mlp"]
    layers = quantizable_layers(net.factory.core)
    assert layers == ["g1", "g2", "g3", "g4", "g5"]
    all_float = net.answers(net.factory.graph("mixed", placement, layers))
    int8 = net.answers(net.factory.graph("int8", placement))
    assert net.judge(all_float).max_abs_diff < 1e-6 < net.judge(int8).max_abs_diff


def test_a_float_layer_is_not_rounded_by_onnx_runtimes_optimiser(tmp_path: Path) -> None:
    """Its WeightBiasQuantization would, and with one scale for all channels."""
    net = make_net("mlp", tmp_path)
    core = net.factory.core
    weights = constants_of(core)["w3"]
    weights = weights * np.where(np.arange(len(weights)) == 0, 1000, 1)[:, None]
    for tensor in core.graph.initializer:
        if tensor.name == "w3":
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights.astype(np.float32), "w3"))
        if tensor.name == "w4":
            without = constants_of(core)["w4"].copy()
            without[:, 0] /= 1000
            tensor.CopyFrom(onnx.numpy_helper.from_array(without, "w4"))
    graph = net.factory.graph("mixed", "cpu", ["g3", "g4"])
    literal, optimised = (net.answers(graph, is_literal=each) for each in (True, False))
    assert net.judge(optimised, literal).agreement > 0.999


@pytest.mark.parametrize("num_rows", [1, 6, 50])
@pytest.mark.parametrize("batch", ["batch", 6])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_graph_without_biases_is_quantised_with_any_number_of_rows(
    tmp_path: Path, batch: int | str, num_rows: int, placement: Placement
) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weights = {"w": np.ascontiguousarray(linear_weights()["w"].T)}
    model = make_model([node], weights, [batch, 4], shape_in=(batch, 8))
    spec = features(save(model, tmp_path / "m.onnx"))
    core = load_core(spec)
    name_nodes(core)
    table = calibrate(core, feeds_of(core, spec, feature_rows(num_rows, seed=1)), "max")
    int8 = quantize(core, {}, table, placement)
    (layer,) = nodes_of(int8, "MatMul")
    made_by = producers(int8)
    assert [made_by[name].op_type for name in layer.input] == ["DequantizeLinear"] * 2


def test_quantising_changes_neither_the_float_graph_nor_the_root_logger(
    nets: dict[str, Net],
) -> None:
    core = nets["resnet"].factory.core
    before, level = core.SerializeToString(), logging.getLogger().level
    nets["resnet"].factory.graph("int8", "cpu")
    assert core.SerializeToString() == before
    assert logging.getLogger().level == level


def test_what_follows_the_last_layer_is_float_so_that_scores_do_not_tie(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Sigmoid", ["h"], ["y"]),
    ]
    model = make_model(nodes, linear_weights(1), ["batch", 1])
    spec = features(save(model, tmp_path / "m.onnx"))
    core, rows = load_core(spec), feature_rows(4_096, seed=0)
    table = calibrate(core, feeds_of(core, spec, rows), "max")
    for placement in PLACEMENTS:
        int8 = quantize(core, {}, table, placement)
        assert [node.op_type for node in int8.graph.node][-2:] == ["Gemm", "Sigmoid"]
        used = {name for node in int8.graph.node for name in node.input}
        assert set(constants_of(int8)) <= used
        (scores,) = run_graph(int8, rows)
        assert len(np.unique(scores)) > 1_000
