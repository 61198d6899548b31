"""Which output of a model the head reads, and as what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import ModelError
from engines.export import load_core
from engines.graph import output_specs, wrap
from engines.runner import Array
from tests.engines.small_graphs import (
    NUM_FEATURES,
    features,
    gemm,
    linear,
    linear_weights,
    make_model,
    run_graph,
    save,
)

ROWS = np.random.default_rng(3).standard_normal((4, NUM_FEATURES), dtype=np.float32)


def shares() -> Array:
    weights = linear_weights()
    powers = np.exp((ROWS @ weights["w"].T + weights["b"]).astype(np.float64))
    found: Array = powers / powers.sum(axis=1, keepdims=True)
    return found


def ends_in(*operators: str, opset: int = 17, **attributes: int) -> onnx.ModelProto:
    """A linear layer, then the operators."""
    names = ["z", *(f"z{n}" for n in range(1, len(operators))), "y"]
    nodes = [gemm(target="z")]
    for operator, source, target in zip(operators, names[:-1], names[1:], strict=True):
        more = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
        more |= attributes if operator.endswith("oftmax") else {}
        nodes.append(helper.make_node(operator, [source], [target], **more))
    ir_version = 4 if opset < 13 else 8
    return make_model(nodes, linear_weights(), ["b", 4], opset=opset, ir_version=ir_version)


@pytest.mark.parametrize(
    "model",
    [
        ends_in("Softmax"),
        ends_in("Softmax", axis=1),
        ends_in("Softmax", opset=9),
        ends_in("LogSoftmax"),
        ends_in("Softmax", "Identity", "Cast"),
        ends_in("Identity", "Softmax"),
    ],
    ids=["plain", "axis 1", "old opset", "LogSoftmax", "passed on", "logits passed on"],
)
def test_the_probabilities_of_a_model_that_ends_in_softmax_are_its_own(
    tmp_path: Path, model: onnx.ModelProto
) -> None:
    spec = features(save(model, tmp_path / "m.onnx"), "classes", 2)
    graph = wrap(load_core(spec), spec, batch_size=4)
    class_id, probability, logits = run_graph(graph, ROWS)
    np.testing.assert_allclose(probability, -np.sort(-shares(), axis=1)[:, :2], atol=1e-6)
    np.testing.assert_array_equal(class_id, np.argsort(-shares(), axis=1)[:, :2])
    assert logits.min() < 0


def test_the_scores_of_a_model_that_ends_in_softmax_are_its_shares(tmp_path: Path) -> None:
    spec = features(save(ends_in("Softmax"), tmp_path / "m.onnx"))
    (score,) = run_graph(wrap(load_core(spec), spec, batch_size=4), ROWS)
    np.testing.assert_allclose(score, shares(), atol=1e-6)


def test_other_outputs_and_what_only_they_need_are_left_out(tmp_path: Path) -> None:
    model = linear()
    model.graph.node.extend(
        [
            helper.make_node("ArgMax", ["y"], ["label"], axis=1, keepdims=0),
            helper.make_node("Log", ["y"], ["log"]),
        ]
    )
    model.graph.output.insert(0, helper.make_tensor_value_info("label", TensorProto.INT64, ["b"]))
    model.graph.output.append(helper.make_tensor_value_info("log", TensorProto.FLOAT, ["b", 4]))
    spec = features(save(model, tmp_path / "m.onnx"))
    core = load_core(spec)
    assert [entry.name for entry in core.graph.output] == ["y"]
    assert [node.op_type for node in core.graph.node] == ["Gemm"]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("hidden", "logits"), "logits"),
        (("hidden", "Output", "more"), "Output"),
        (("hidden", "more"), "hidden"),
        (("hidden", "scores", "logits"), "hidden"),
    ],
)
def test_of_several_float_outputs_the_one_that_is_named_as_the_answer_is_taken(
    names: tuple[str, ...], taken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [gemm(target="z"), *(helper.make_node("Relu", ["z"], [name]) for name in names)]
    model = make_model(nodes, linear_weights(), ["b", 4])
    del model.graph.output[:]
    for name in names:
        kind = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4])
        model.graph.output.append(kind)
    spec = features(save(model, tmp_path / "m.onnx"), "classes")
    assert [entry.name for entry in load_core(spec).graph.output] == [taken]
    left = ", ".join(name for name in names if name != taken)
    assert f"output {taken} is taken, not {left}" in caplog.text


def test_what_only_a_branch_reads_is_kept(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        nodes = [helper.make_node("Identity", ["z"], [name])]
        return helper.make_graph(nodes, name, [], [out])

    branches = {"then_branch": branch("then"), "else_branch": branch("else")}
    nodes = [
        gemm(target="z"),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["is_any"], to=TensorProto.BOOL),
        helper.make_node("If", ["is_any"], ["y"], **branches),
    ]
    spec = features(save(make_model(nodes, linear_weights(), ["b", 4]), tmp_path / "m.onnx"))
    assert "Gemm" in [node.op_type for node in load_core(spec).graph.node]


def trees(operator: str, opset: int) -> onnx.ModelProto:
    """One tree of ai.onnx.ml that asks whether the first feature is positive."""
    tree = {
        "nodes_treeids": [0, 0, 0],
        "nodes_nodeids": [0, 1, 2],
        "nodes_featureids": [0, 0, 0],
        "nodes_values": [0.0, 0.0, 0.0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0],
    }
    names, kind = ["y"], "target"
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2])]
    leaves = {"ids": [0, 1, 0, 1], "nodeids": [1, 1, 2, 2], "treeids": [0] * 4}
    leaves["weights"] = [0.75, 0.25, 0.125, 0.875]  # type: ignore[list-item]
    if operator == "TreeEnsembleClassifier":
        names, kind = ["label", "y"], "class"
        outputs.insert(0, helper.make_tensor_value_info("label", TensorProto.INT64, ["b"]))
        tree["classlabels_int64s"] = [0, 1]
    else:
        tree["n_targets"] = 2  # type: ignore[assignment]
    tree |= {f"{kind}_{name}": values for name, values in leaves.items()}
    node = helper.make_node(operator, ["x"], names, domain="ai.onnx.ml", **tree)
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", NUM_FEATURES])
    graph = helper.make_graph([node], "trees", [rows], outputs)
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("operator", ["TreeEnsembleRegressor", "TreeEnsembleClassifier"])
@pytest.mark.parametrize("opset", [1, 3])
def test_trees_give_scores_whose_shape_only_the_model_knows(
    tmp_path: Path, operator: str, opset: int
) -> None:
    spec = features(save(trees(operator, opset), tmp_path / "m.onnx"))
    graph = wrap(load_core(spec), spec, batch_size=4)
    assert [output.shape for output in output_specs(graph, spec)] == [(4, 2)]
    (score,) = run_graph(graph, ROWS)
    expected = np.where(ROWS[:, :1] <= 0, [0.75, 0.25], [0.125, 0.875])
    np.testing.assert_allclose(score, expected)


def test_probabilities_of_a_classifier_of_trees_are_not_taken_for_logits(tmp_path: Path) -> None:
    spec = features(save(trees("TreeEnsembleClassifier", 3), tmp_path / "m.onnx"), "classes")
    with pytest.raises(
        ModelError, match=r"y comes from TreeEnsembleClassifier.*`model\.head: scores"
    ):
        load_core(spec)


@pytest.mark.parametrize("last", [("Sigmoid",), ("Sigmoid", "Identity")])
def test_probabilities_of_labels_that_exclude_nothing_are_not_taken_for_logits(
    tmp_path: Path, last: tuple[str, ...]
) -> None:
    spec = features(save(ends_in(*last), tmp_path / "m.onnx"), "classes")
    with pytest.raises(ModelError, match=r"y comes from Sigmoid.*`model\.head: scores`"):
        load_core(spec)


@pytest.mark.parametrize("shares", [(), ("Softmax",)])
def test_ranks_are_not_taken_for_classes(tmp_path: Path, shares: tuple[str, ...]) -> None:
    model = ends_in(*shares, "Identity")
    model.graph.node[-1].CopyFrom(
        helper.make_node("TopK", [model.graph.node[-1].input[0], "two"], ["y", "places"])
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "two"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    path = save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"y comes from TopK.*no classes; expected logits"):
        load_core(features(path, "classes"))
    assert load_core(features(path, "scores")).graph.output[0].name == "y"


def test_an_operator_of_onnx_runtime_alone_needs_no_more_than_a_declared_output(
    tmp_path: Path,
) -> None:
    weights = linear_weights()
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1)
    model = make_model([node], {"w": weights["w"]}, ["b", 4])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    spec = features(save(model, tmp_path / "m.onnx"), "classes")
    logits = run_graph(wrap(load_core(spec), spec, batch_size=4), ROWS)[2]
    np.testing.assert_allclose(logits, ROWS @ weights["w"].T, atol=1e-5)


def test_a_shape_that_is_declared_wrongly_does_no_harm(tmp_path: Path) -> None:
    model = make_model([gemm()], linear_weights(), ["b", 7])
    spec = features(save(model, tmp_path / "m.onnx"))
    graph = wrap(load_core(spec), spec, batch_size=4)
    assert [output.shape for output in output_specs(graph, spec)] == [(4, 4)]
