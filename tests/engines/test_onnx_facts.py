"""What an ONNX file says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import ModelError
from engines.onnx_facts import read_onnx_facts


def test_shapes_are_those_of_a_row_and_weights_are_no_inputs(tmp_path: Path) -> None:
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 32])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])
    weights = numpy_helper.from_array(np.ones((32, 1), np.float32), "w")
    named = helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 1])  # as old exporters do
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [rows, named], [out], [weights])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    facts = read_onnx_facts(str(tmp_path / "m.onnx"))
    assert facts.row_shape == (32,)
    assert (facts.output_shape, facts.last_operator) == ((1,), "Sigmoid")


def test_sides_that_the_graph_leaves_open_are_none(tmp_path: Path) -> None:
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, "h", 64])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3, "h", 64])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [rows], [out])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    facts = read_onnx_facts(str(tmp_path / "m.onnx"))
    assert facts.row_shape == (3, None, 64)
    assert (facts.output_shape, facts.last_operator) == ((3, None, 64), "Relu")


def test_labels_before_the_scores_are_no_output_to_look_at(tmp_path: Path) -> None:
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3])
    label = helper.make_tensor_value_info("label", TensorProto.INT64, ["b"])
    shares = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])
    nodes = [
        helper.make_node("Softmax", ["x"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", [rows], [label, shares])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    facts = read_onnx_facts(str(tmp_path / "m.onnx"))
    assert (facts.output_shape, facts.last_operator) == ((3,), "Softmax")


def node(kind: str, sources: str, target: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, sources.split(), target.split(), **attributes)


SHARES = node("Sigmoid", "x", "p")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([SHARES, node("Sub", "one p", "q"), node("Concat", "q p", "y", axis=1)], "Sigmoid"),
        ([SHARES, node("Mul", "p one", "y")], "Sigmoid"),
        ([SHARES, node("Mul", "x p", "y")], ""),
        ([SHARES, node("MatMul", "p w", "y")], ""),
        ([node("Softmax", "x", "p"), node("Clip", "p low", "y")], "Softmax"),
        ([node("Softmax", "x", "p", axis=2), node("Squeeze", "p", "y")], "Softmax"),
        ([node("Softmax", "x", "p"), node("Identity", "p", "y")], ""),
        ([node("Identity", "x", "y")], ""),
    ],
    ids="two-of-one times-one gated logits clipped squeezed softmax none".split(),
)
def test_what_makes_the_output_probabilities_is_found_behind_simple_operators(
    nodes: list[onnx.NodeProto], expected: str, tmp_path: Path
) -> None:
    rows, out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 3]) for n in "xy")
    constants = [
        numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in {"one": (1,), "low": (), "w": (3, 3)}.items()
    ]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [rows], [out], constants)),
        tmp_path / "m.onnx",
    )
    assert read_onnx_facts(str(tmp_path / "m.onnx")).probabilities_from == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("TopK", "x two", "y places")], "TopK"),
        ([node("Softmax", "x", "p"), node("TopK", "p two", "y places")], "TopK"),
        ([node("ArgMax", "x", "best"), node("Cast", "best", "y", to=1)], "ArgMax"),
        ([node("TopK", "x two", "best places"), node("MatMul", "best w", "y")], ""),
    ],
    ids="top-k of-softmax best logits".split(),
)
def test_what_ranks_the_classes_is_found(
    nodes: list[onnx.NodeProto], expected: str, tmp_path: Path
) -> None:
    rows, out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2]) for n in "xy")
    constants = [
        numpy_helper.from_array(np.array([2]), "two"),
        numpy_helper.from_array(np.ones((2, 2), np.float32), "w"),
    ]
    graph = helper.make_graph(nodes, "g", [rows], [out], constants)
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert read_onnx_facts(str(tmp_path / "m.onnx")).ranks_from == expected


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx: No such file"):
        read_onnx_facts(str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("this is no model")
    with pytest.raises(ModelError, match=r"text\.onnx: .*expected"):
        read_onnx_facts(str(tmp_path / "text.onnx"))


def test_two_inputs_are_one_too_many(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2]) for n in "ab"]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "g", inputs, [out])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"inputs a, b; expected exactly one"):
        read_onnx_facts(str(tmp_path / "m.onnx"))
