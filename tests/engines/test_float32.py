"""Graphs of other floats are computed in float32, so that int8 can be made from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.build import resolve_engine
from engines.export import load_core
from tests.engines.small_graphs import constants_of, features, make_model, mlp, run_graph, save
from tests.engines.small_models import feature_rows, feature_sample, request_for
from tests.engines.small_stores import local_store

FLOATS = {"float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}
KINDS = {**FLOATS, "bfloat16": TensorProto.BFLOAT16}
ROWS = feature_rows(100, seed=1)


def other_floats(kind: str, ends: str = "both") -> onnx.ModelProto:
    """A net whose weights are of a kind, behind a cast and before one; `ends` names these."""
    model = mlp()
    graph = model.graph
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if kind == "bfloat16":
            tensor.CopyFrom(helper.make_tensor(tensor.name, KINDS[kind], values.shape, values))
        else:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(kind), tensor.name))
    if ends == "none":
        graph.input[0].type.tensor_type.elem_type = KINDS[kind]
    else:
        graph.node[0].input[0] = "cast"
        graph.node.insert(0, helper.make_node("Cast", ["x"], ["cast"], to=KINDS[kind]))
    if ends == "both":
        graph.node[-1].output[0] = "last"
        graph.node.append(helper.make_node("Cast", ["last"], ["y"], to=TensorProto.FLOAT))
    else:
        graph.output[0].type.tensor_type.elem_type = KINDS[kind]
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", ["both", "input", "none"])
def test_weights_of_other_floats_become_float32(kind: str, ends: str, tmp_path: Path) -> None:
    model = other_floats(kind, ends)
    core = load_core(features(save(model, tmp_path / "m.onnx")))
    assert {array.dtype for array in constants_of(core).values()} == {np.dtype(np.float32)}
    assert "Cast" not in [node.op_type for node in core.graph.node][:-1], "two may be fused"
    expected, found = run_graph(mlp(), ROWS)[0], run_graph(core, ROWS)[0]
    digits = {"float64": 1e-6, "float16": 3e-3, "bfloat16": 3e-2}[kind]
    assert abs(found - expected).max() <= digits * abs(expected).max()


@pytest.mark.parametrize("kind", FLOATS)
def test_answers_are_those_of_the_model_within_the_digits_of_float16(
    kind: str, tmp_path: Path
) -> None:
    model = other_floats(kind)
    core = load_core(features(save(model, tmp_path / "m.onnx")))
    expected, found = run_graph(model, ROWS)[0], run_graph(core, ROWS)[0]
    assert abs(found - expected).max() <= 5e-3 * abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_int8_of_such_a_net_is_int8(kind: str, tmp_path: Path) -> None:
    request = request_for(features(save(other_floats(kind), tmp_path / "m.onnx")))
    engine = resolve_engine(request, local_store(tmp_path / "s"), feature_sample, print).engine
    assert [(rung.passed, rung.error) for rung in engine.manifest.rungs] == [(True, None)] * 4


def test_floats_in_branches_and_constants_of_nodes_become_float32_too(tmp_path: Path) -> None:
    def branch(name: str, factor: float) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.DOUBLE, None)
        value = numpy_helper.from_array(np.array([factor]), f"{name}_value")
        nodes = [
            helper.make_node("Constant", [], [f"{name}_factor"], value=value),
            helper.make_node("Mul", ["d", f"{name}_factor"], [name]),
        ]
        return helper.make_graph(nodes, name, [], [out])

    branches = {"then_branch": branch("then", 2.0), "else_branch": branch("else", 3.0)}
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("ReduceMax", ["d"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "lowest"], ["is_any"]),
        helper.make_node("If", ["is_any"], ["z"], **branches),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT),
    ]
    lowest = {"lowest": np.array(np.finfo(np.float64).min)}
    core = load_core(features(save(make_model(nodes, lowest, ["b", 8]), tmp_path / "m.onnx")))
    types = {entry.type.tensor_type.elem_type for entry in core.graph.value_info}
    assert TensorProto.DOUBLE not in types
    np.testing.assert_allclose(run_graph(core, ROWS)[0], 2 * ROWS)


def test_a_graph_that_needs_the_digits_of_double_keeps_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Add", ["d", "far"], ["f"]),
        helper.make_node("Sub", ["f", "far"], ["z"]),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT),
    ]
    model = make_model(nodes, {"far": np.array(1e9)}, ["b", 8])
    core = load_core(features(save(model, tmp_path / "m.onnx")))
    np.testing.assert_allclose(run_graph(core, ROWS)[0], ROWS, atol=1e-6)
    assert "not computed in float32: output y differs by" in caplog.text


def test_a_graph_that_needs_them_for_large_features_only_keeps_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Noise from 0 to 1 would not tell; 0.25 = x * x - (x + 0.5) * (x - 0.5)."""
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["d", "d"], ["square"]),
        helper.make_node("Add", ["d", "half"], ["above"]),
        helper.make_node("Sub", ["d", "half"], ["below"]),
        helper.make_node("Mul", ["above", "below"], ["less"]),
        helper.make_node("Sub", ["square", "less"], ["z"]),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT),
    ]
    model = make_model(nodes, {"half": np.array(0.5)}, ["b", 8])
    core = load_core(features(save(model, tmp_path / "m.onnx")))
    np.testing.assert_allclose(run_graph(core, 1e5 * ROWS)[0], 0.25, atol=1e-4)
    assert "not computed in float32: output y differs by" in caplog.text


def test_where_nothing_can_be_int8_no_engine_is_called_so(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("ReduceSum", ["e", "one"], ["y"], keepdims=1),
    ]
    model = make_model(nodes, {"one": np.array([1])}, ["b", 1])
    request = request_for(features(save(model, tmp_path / "m.onnx")))
    engine = resolve_engine(request, local_store(tmp_path / "s"), feature_sample, print).engine
    errors = {rung.error for rung in engine.manifest.rungs if rung.precision == "int8"}
    assert engine.manifest.precision == "fp32"
    assert len(errors) == 1
    assert "nothing in the model can be int8" in str(errors)
