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
from engines.quantize import Placement, quantize
from engines.round_weights import round_layers
from engines.runner import Array
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
