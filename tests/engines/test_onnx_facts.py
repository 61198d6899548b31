"""What an ONNX file says of itself."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from engines.demo_models import write_ranking_onnx
from engines.errors import ModelError
from engines.onnx_facts import read_onnx_facts


def test_shapes_are_those_of_a_row(tmp_path: Path) -> None:
    write_ranking_onnx(tmp_path / "m.onnx")
    facts = read_onnx_facts(str(tmp_path / "m.onnx"))
    assert facts.row_shape == (32,)
    assert facts.last_operator == "Sigmoid"


def test_sides_that_the_graph_leaves_open_are_none(tmp_path: Path) -> None:
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, "h", 64])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3, "h", 64])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [rows], [out])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    facts = read_onnx_facts(str(tmp_path / "m.onnx"))
    assert (facts.input_name, facts.row_shape) == ("x", (3, None, 64))
    assert (facts.output_shape, facts.last_operator) == ((3, None, 64), "Relu")


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
