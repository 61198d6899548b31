"""The half-precision graph: fp16 inside, float32 outside, and the same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.gate import GateSpec
from engines.half import to_half
from tests.engines.fitted_nets import NETS, kinds_of, make_net
from tests.engines.small_graphs import constants_of, linear_weights, make_model, run_graph
from tests.engines.small_models import feature_rows

STRICT = GateSpec(min_agreement=0.999, min_cosine=0.9999, max_divergence=1e-3, max_metric_loss=0)


@pytest.mark.parametrize("kind", NETS)
def test_a_net_in_half_precision_answers_as_in_fp32(kind: str, tmp_path: Path) -> None:
    net = make_net(kind, tmp_path)
    core = net.factory.core
    before = core.SerializeToString()
    half = to_half(core)
    assert core.SerializeToString() == before
    judged = net.judge(net.answers(half))
    assert judged.failures(STRICT) == ()
    assert judged.max_abs_diff > 0, "it was computed in float32"


def test_weights_are_float16_and_input_and_output_float32(tmp_path: Path) -> None:
    half = to_half(make_net("resnet", tmp_path).factory.core)
    onnx.checker.check_model(half, full_check=True)
    arrays = constants_of(half)
    layers = [node for node in half.graph.node if node.op_type in ("Conv", "Gemm")]
    kinds = {arrays[name].dtype for node in layers for name in node.input[1:]}
    assert kinds == {np.dtype(np.float16)}
    for entry in (*half.graph.input, *half.graph.output):
        assert entry.type.tensor_type.elem_type == TensorProto.FLOAT
    assert kinds_of(half).count("Cast") == 2


def test_nodes_come_after_what_they_read(tmp_path: Path) -> None:
    """TensorRT's parser takes them in the file's order."""
    half = to_half(make_net("conv", tmp_path).factory.core)
    known = {entry.name for entry in half.graph.input} | set(constants_of(half))
    for node in half.graph.node:
        assert set(node.input) <= known
        known.update(node.output)


def test_sums_and_exponentials_are_computed_in_float32() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["l"], name="l", transB=1),
        helper.make_node("Exp", ["l"], ["e"], name="e"),
        helper.make_node("Relu", ["e"], ["y"], name="y"),
    ]
    half = to_half(make_model(nodes, linear_weights(), ["batch", 4]))
    made_by = {output: node for node in half.graph.node for output in node.output}
    (exponential,) = (node for node in half.graph.node if node.op_type == "Exp")
    cast = made_by[exponential.input[0]]
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.FLOAT)
    rows = 0.5 * feature_rows(50, seed=1)
    (expected,), (found,) = (
        run_graph(make_model(nodes, linear_weights(), ["batch", 4]), rows),
        run_graph(half, rows),
    )
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_nodes_in_float32_may_read_the_same_tensors() -> None:
    """As LayerNormalizations do where a model runs one block twice, or all are without weights."""
    arrays = linear_weights() | {"ones": np.ones(8, np.float32)}
    nodes = [
        helper.make_node("Mul", ["x", "ones"], ["m"], name="m"),
        helper.make_node("LayerNormalization", ["m", "ones"], ["n1"], name="n1"),
        helper.make_node("LayerNormalization", ["m", "ones"], ["n2"], name="n2"),
        helper.make_node("Add", ["n1", "n2"], ["a"], name="a"),
        helper.make_node("Gemm", ["a", "w", "b"], ["y"], name="y", transB=1),
    ]
    core = onnx.shape_inference.infer_shapes(make_model(nodes, arrays, ["batch", 4]))
    half, rows = to_half(core), feature_rows(50, seed=1)
    onnx.checker.check_model(half, full_check=True)
    assert kinds_of(half).count("Cast") == 6, "rows, m, ones, n1, n2 and the answers"
    (expected,), (found,) = (run_graph(graph, rows) for graph in (core, half))
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_weights_outside_of_the_range_of_float16_are_clipped_to_it() -> None:
    """Infinite ones would make every answer NaN; what is lost is for the gate to judge."""
    weights = linear_weights()
    weights["w"][0, 0], weights["w"][1, 1] = 1e6, 1e-9
    half = to_half(make_model([_gemm()], weights, ["batch", 4]))
    values = constants_of(half)["w"]
    assert np.isfinite(values).all()
    assert values.max() == np.finfo(np.float16).max
    assert values[1, 1] > 0


def _gemm() -> onnx.NodeProto:
    return helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="y", transB=1)
