"""Graphs that a quantiser trips over: int8 of what can be int8, and answers as in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.calibrate import calibrate, feeds_of
from engines.devices import this_cpu
from engines.export import load_core, name_nodes
from engines.graph import wrap
from engines.quantize import Placement, quantizable_layers, quantize
from engines.round_weights import round_layers
from engines.runner import Array
from tests.engines.fitted_nets import kinds_of
from tests.engines.small_graphs import (
    constants_of,
    features,
    make_model,
    run_graph,
    save,
)
from tests.engines.small_models import feature_rows

PLACEMENTS: list[Placement] = ["tensorrt", "cpu"]
BITS = this_cpu(1).weight_bits
"""Or this machine's int8 kernels answer apart from the graph."""


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


class Case:
    """A model as it is loaded, and what int8 makes of it."""

    def __init__(self, model: onnx.ModelProto, folder: Path, rows: Array | None = None) -> None:
        self.spec = features(save(model, folder / "m.onnx"))
        self.rows = feature_rows(64, seed=1) if rows is None else rows
        self.core = load_core(self.spec)
        name_nodes(self.core)

    def int8(self, placement: Placement, float_layers: tuple[str, ...] = ()) -> onnx.ModelProto:
        feeds = feeds_of(self.core, self.spec, self.rows)
        table = calibrate(self.core, feeds, "max")
        rounding = round_layers(self.core, feeds, BITS)
        return quantize(self.core, rounding, table, placement, float_layers, BITS)

    def assert_answers_alike(self, int8: onnx.ModelProto) -> None:
        wrap(int8, self.spec, len(self.rows))  # a runtime takes it
        (expected,), (found,) = (run_graph(graph, self.rows) for graph in (self.core, int8))
        error = np.square(found - expected).mean() / expected.var()
        assert 0 < error < 0.01


def rounded_for(model: onnx.ModelProto, node: onnx.NodeProto) -> list[bool]:
    """For each input of a node whether it is rounded to int8."""
    made_by = {output: each.op_type for each in model.graph.node for output in each.output}
    return [made_by.get(name) == "DequantizeLinear" for name in node.input]


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if node.name == name)
    return node


def skip_of_a_layer_that_others_read() -> onnx.ModelProto:
    """As residual nets with activations before their layers have it, and GELU by tanh."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"], name="g1", transB=1),
        helper.make_node("Sigmoid", ["h"], ["s"], name="s"),
        helper.make_node("Mul", ["s", "h"], ["t"], name="t"),
        helper.make_node("Add", ["h", "t"], ["a"], name="a"),
        helper.make_node("Gemm", ["a", "w2"], ["y"], name="g2", transB=1),
    ]
    return make_model(nodes, {"w1": normal(16, 8), "w2": normal(4, 16)}, ["batch", 4])


def constant_of_two_adds() -> onnx.ModelProto:
    """As the 3 of hard-swish, and the epsilon of LayerNorms before opset 17."""
    arrays = {"w1": normal(16, 8), "w2": normal(4, 16), "three": np.array(3, np.float32)}
    nodes = [
        helper.make_node("Add", ["x", "three"], ["a"], name="a"),
        helper.make_node("Gemm", ["a", "w1"], ["h"], name="g1", transB=1),
        helper.make_node("Add", ["h", "three"], ["b"], name="b"),
        helper.make_node("Relu", ["b"], ["r"], name="r"),
        helper.make_node("Gemm", ["r", "w2"], ["y"], name="g2", transB=1),
    ]
    return make_model(nodes, arrays, ["batch", 4])


@pytest.mark.parametrize("make", [skip_of_a_layer_that_others_read, constant_of_two_adds])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_add_leaves_its_pair_to_whom_else_reads_it(
    make: Callable[[], onnx.ModelProto], placement: Placement, tmp_path: Path
) -> None:
    case = Case(make(), tmp_path)
    int8 = case.int8(placement)
    case.assert_answers_alike(int8)
    for name in ("g1", "g2"):
        assert rounded_for(int8, named(int8, name))[:2] == [True, True]
    if placement == "tensorrt":
        read = {name for node in int8.graph.node for name in node.input}
        assert set(constants_of(int8)) <= read
        assert {node.output[0] for node in int8.graph.node} <= read | {"y"}


@pytest.mark.parametrize("bias", [normal(1, 16), np.full((1,), 0.7), np.full((1, 1), 0.7)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_biases_of_two_axes_are_one_number_an_output(
    bias: Array, placement: Placement, tmp_path: Path
) -> None:
    """As scikit-learn's networks are written: a MatMul and an Add, which become a Gemm."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], name="m1"),
        helper.make_node("Add", ["m", "b1"], ["h"], name="a1"),
        helper.make_node("Relu", ["h"], ["r"], name="r"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="g2"),
    ]
    arrays = {"w1": normal(8, 16), "b1": bias, "w2": normal(16, 4), "b2": np.full((1, 1), 0.3)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    case = Case(make_model(nodes, arrays, ["batch", 4]), tmp_path)
    assert len(quantizable_layers(case.core)) == 2
    case.assert_answers_alike(case.int8(placement))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_scales_a_gemm_goes_into_its_constants(placement: Placement, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="g1", beta=4.0),
        helper.make_node("Relu", ["h"], ["r"], name="r"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="g2", alpha=0.5, beta=-2.0),
    ]
    arrays = {"w1": normal(8, 16), "b1": normal(16), "w2": normal(16, 4), "b2": normal(4)}
    model = make_model(nodes, arrays, ["batch", 4])
    case = Case(model, tmp_path)
    (expected,), (found,) = (run_graph(graph, case.rows) for graph in (model, case.core))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(constants_of(case.core)["b1"], 4 * arrays["b1"])
    assert len(round_layers(case.core, feeds_of(case.core, case.spec, case.rows))) == 2
    case.assert_answers_alike(case.int8(placement))


def test_a_gemm_with_a_scale_on_a_constant_of_two_stays_float(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="g1", beta=4.0),
        helper.make_node("Relu", ["h"], ["r"], name="r"),
        helper.make_node("Gemm", ["r", "w2", "b"], ["y"], name="g2"),
    ]
    arrays = {"w": normal(8, 16), "b": normal(16), "w2": normal(16, 16)}
    case = Case(make_model(nodes, arrays, ["batch", 16]), tmp_path)
    assert quantizable_layers(case.core) == ["g2"]
    int8 = case.int8("cpu")
    case.assert_answers_alike(int8)
    assert named(int8, "g1").input[1] == "w"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_table_that_is_a_layers_weight_too_is_read_in_float(
    placement: Placement, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["c"], name="c", axis=1),
        helper.make_node("Cast", ["c"], ["ids"], name="ids", to=onnx.TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("Gemm", ["x", "w"], ["h"], name="g1"),
        helper.make_node("Add", ["e", "h"], ["s"], name="s"),
        helper.make_node("Relu", ["s"], ["r"], name="r"),
        helper.make_node("Gemm", ["r", "table"], ["y"], name="g2", transB=1),
    ]
    arrays = {"first": np.array(0), "table": normal(20, 6), "w": normal(8, 6)}
    rows = feature_rows(64, seed=1)
    rows[:, 0] = np.arange(64) % 20
    rows[:, 1:] *= 8
    case = Case(make_model(nodes, arrays, ["batch", 20]), tmp_path, rows)
    int8 = case.int8(placement)
    case.assert_answers_alike(int8)
    assert named(int8, "embed").input[0] == "table"
    assert rounded_for(int8, named(int8, "g2"))[:2] == [True, True]


def test_two_layers_that_read_a_weight_along_its_two_axes_are_not_both_int8(
    tmp_path: Path,
) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="g1", transB=1),
        helper.make_node("Relu", ["h"], ["r"], name="r"),
        helper.make_node("Gemm", ["r", "w"], ["y"], name="g2"),
    ]
    case = Case(make_model(nodes, {"w": normal(8, 8)}, ["batch", 8]), tmp_path)
    assert quantizable_layers(case.core) == ["g1"]
    case.assert_answers_alike(case.int8("cpu"))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_grouped_transposed_convolution_with_a_bias_stays_float(
    placement: Placement, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["planes"], name="planes"),
        helper.make_node("ConvTranspose", ["planes", "k", "b"], ["c"], name="c", group=2),
        helper.make_node("Flatten", ["c"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "w"], ["y"], name="g"),
    ]
    arrays = {"shape": np.array([-1, 2, 4]), "k": normal(2, 3, 2), "b": normal(6)}
    case = Case(make_model(nodes, arrays | {"w": normal(30, 4)}, ["batch", 4]), tmp_path)
    assert quantizable_layers(case.core) == ["g"]
    case.assert_answers_alike(case.int8(placement))


def branch(name: str, source: str, weight: str) -> onnx.GraphProto:
    node = helper.make_node("MatMul", [source, weight], [name], name=name)
    kind = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [kind])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_branches_read_is_left_to_them(placement: Placement, tmp_path: Path) -> None:
    """Constants of theirs, a layer's weight, and what a Relu gives to them and a layer."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"], name="g1"),
        helper.make_node("Relu", ["h"], ["r"], name="r"),
        helper.make_node("Gemm", ["r", "w2"], ["z"], name="g2"),
        helper.make_node("ReduceMax", ["z"], ["top"], name="top", keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["is_up"], name="is_up"),
        helper.make_node(
            "If",
            ["is_up"],
            ["b"],
            name="if",
            then_branch=branch("up", "r", "w2"),
            else_branch=branch("down", "r", "w3"),
        ),
        helper.make_node("Sub", ["z", "b"], ["d"], name="d"),
        helper.make_node("Sub", ["d", "z"], ["y"], name="y"),
    ]
    arrays = {"w1": normal(8, 16), "w2": normal(16, 4), "w3": normal(16, 4) + 1}
    arrays["zero"] = np.array(-1e9, np.float32)
    case = Case(make_model(nodes, arrays, ["batch", 4]), tmp_path)
    int8 = case.int8(placement)
    case.assert_answers_alike(int8)
    np.testing.assert_array_equal(constants_of(int8)["w2"], arrays["w2"])


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_activation_behind_the_last_layer_is_kept(
    activation: str, placement: Placement, tmp_path: Path
) -> None:
    """The quantiser takes a zero point for its work, and behind that layer there is none."""
    limits = ["zero", "ten"] if activation == "Clip" else []
    arrays = {"w": normal(8, 16), "zero": np.float32(0), "ten": np.float32(10)}
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="g"),
        helper.make_node(activation, ["h", *limits], ["r"], name="r"),
        helper.make_node("ReduceMean", ["r"], ["y"], name="y", axes=[1]),
    ]
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    case = Case(make_model(nodes, arrays, ["batch", 1]), tmp_path)
    int8 = case.int8(placement)
    assert kinds_of(int8)[-3:] == ["Gemm", activation, "ReduceMean"]
    case.assert_answers_alike(int8)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_mask_costs_the_nodes_beside_it_and_no_layer_else(
    placement: Placement, tmp_path: Path
) -> None:
    """As scores of causal attention have it; a layer that reads infinite values is float, too."""
    mask = np.where(np.arange(16) < 12, 0, -np.inf).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"], name="g1"),
        helper.make_node("Add", ["h", "mask"], ["masked"], name="masked"),
        helper.make_node("Softmax", ["masked"], ["s"], name="s"),
        helper.make_node("Gemm", ["s", "w2"], ["z"], name="g2"),
        helper.make_node("MatMul", ["masked", "w3"], ["m"], name="m"),
        helper.make_node("Sigmoid", ["m"], ["gate"], name="gate"),
        helper.make_node("Mul", ["z", "gate"], ["y"], name="y"),
    ]
    arrays = {"w1": normal(8, 16), "mask": mask, "w2": normal(16, 4), "w3": abs(normal(16, 4))}
    arrays["w3"][:, 1::2] *= -1
    case = Case(make_model(nodes, arrays, ["batch", 4]), tmp_path)
    int8 = case.int8(placement)
    case.assert_answers_alike(int8)
    for name in ("g1", "g2"):
        assert rounded_for(int8, named(int8, name)) == [True, True]
    assert rounded_for(int8, named(int8, "m")) == [False, False]
