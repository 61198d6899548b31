"""Models that no engine could score with are told by what fp32 answers to real rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.build import resolve_engine
from engines.candidates import CandidateFactory
from engines.devices import this_cpu
from engines.errors import ModelError
from engines.fp32 import reference_answers
from engines.model import Head
from engines.runner import Array
from tests.engines.small_graphs import features, linear_weights, make_model, save
from tests.engines.small_models import feature_rows, feature_sample, request_for
from tests.engines.small_stores import local_store

ROWS = feature_rows(40, seed=2)


def node(kind: str, sources: str, target: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, sources.split(), target.split(), **attributes)


LINEAR = node("Gemm", "x w b", "z", transB=1)


def answer(
    nodes: Sequence[onnx.NodeProto], folder: Path, head: Head = "classes", rows: Array = ROWS
) -> Array:
    """What fp32 answers to rows, in batches of 8: logits or scores."""
    arrays = {
        "low": np.array(1e-6, np.float32),
        "zero": np.array([0]),
        "million": np.array(1e6, np.float32),
        "scale": np.ones(4, np.float32),
    }
    read = {name for each in nodes for name in each.input}
    arrays = {name: array for name, array in arrays.items() if name in read} | linear_weights()
    spec = features(save(make_model(list(nodes), arrays, ["b", 4]), folder / "m.onnx"), head)
    factory = CandidateFactory(spec, rows, "max", folder, lambda _: None)
    return list(reference_answers(factory, rows, 8, this_cpu(2)).answers.values())[-1]


@pytest.mark.parametrize(
    "nodes",
    [
        [LINEAR, node("Softmax", "z", "p"), node("Clip", "p low", "y")],
        [LINEAR, node("Softmax", "z", "p"), node("Flatten", "p", "y")],
        [LINEAR, node("LogSoftmax", "z", "l"), node("Exp", "l", "y")],
        [
            LINEAR,
            node("Exp", "z", "e"),
            node("ReduceL1", "e", "s", axes=[1]),
            node("Div", "e s", "y"),
        ],
    ],
    ids="clipped flattened powers shares".split(),
)
def test_probabilities_are_told_by_their_sums_whatever_made_them(
    nodes: list[onnx.NodeProto], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"add up to 1.*expected logits.*`model\.head: scores`"):
        answer(nodes, tmp_path)
    np.testing.assert_allclose(answer(nodes, tmp_path, "scores").sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("last", ["Relu", "Tanh", "Identity"])
def test_logits_are_taken_whatever_made_them(last: str, tmp_path: Path) -> None:
    assert answer([LINEAR, node(last, "z", "y")], tmp_path).shape == (40, 4)


NOT_ALONE = {
    "batch's mean": [
        LINEAR,
        node("ReduceMean", "z", "m", axes=[0]),
        node("Sub", "z m", "y"),
    ],
    "batch's largest": [
        LINEAR,
        node("ReduceMax", "z", "m", axes=[0]),
        node("Div", "z m", "y"),
    ],
    "batch norm": [
        LINEAR,
        helper.make_node(
            "BatchNormalization",
            ["z", "scale", "b", "b", "scale"],
            ["y", "mean", "var"],
            training_mode=1,
        ),
    ],
    "chance": [LINEAR, node("RandomUniformLike", "z", "r"), node("Mul", "z r", "y")],
}


@pytest.mark.parametrize("kind", NOT_ALONE)
@pytest.mark.parametrize("num_rows", [2, 5, 8, 16, 40])
@pytest.mark.parametrize("head", ["classes", "scores"])
def test_answers_that_depend_on_the_rows_beside_are_refused(
    kind: str, num_rows: int, head: Head, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"depends on the rows beside it.*in eval mode"):
        answer(NOT_ALONE[kind], tmp_path, head, ROWS[:num_rows])


def test_a_model_that_is_quantised_by_batch_is_told_from_one_in_training_mode(
    tmp_path: Path,
) -> None:
    nodes = [
        LINEAR,
        node("DynamicQuantizeLinear", "z", "q s o"),
        node("DequantizeLinear", "q s o", "y"),
    ]
    with pytest.raises(ModelError, match=r"scaled by batch \(DynamicQ.*Name the float model"):
        answer(nodes, tmp_path, "scores", ROWS * np.linspace(1, 9, 40, dtype=np.float32)[:, None])


NOT_ONE_EACH = {
    "twice": [LINEAR, node("Concat", "z z", "y", axis=0)],
    "mean": [LINEAR, node("ReduceMean", "z", "y", axes=[0], keepdims=1)],
    "turned": [LINEAR, node("Transpose", "z", "y", perm=[1, 0])],
    "a leading axis": [LINEAR, node("Unsqueeze", "z zero", "y")],
}


@pytest.mark.parametrize("kind", NOT_ONE_EACH)
def test_a_model_without_one_answer_for_each_row_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"to a batch of 8 rows; expected .*one answer a row"):
        answer(NOT_ONE_EACH[kind], tmp_path, "scores")


@pytest.mark.parametrize("num_rows", [1, 2, 40])
def test_answers_that_are_far_from_zero_may_be_rounded(num_rows: int, tmp_path: Path) -> None:
    nodes = [LINEAR, node("Add", "z million", "y")]
    assert answer(nodes, tmp_path, "scores", ROWS[:num_rows]).min() > 9e5


def test_a_class_behind_a_mask_costs_no_row(tmp_path: Path) -> None:
    mask = {"mask": np.array([0, 0, -np.inf, 0], np.float32)}
    model = make_model([LINEAR, node("Add", "z mask", "y")], linear_weights() | mask, ["b", 4])
    request = request_for(features(save(model, tmp_path / "m.onnx"), "classes"))
    engine = resolve_engine(request, local_store(tmp_path / "s"), feature_sample, print).engine
    assert [(rung.passed, rung.error) for rung in engine.manifest.rungs] == [(True, None)] * 4
    assert engine.manifest.accuracy.num_rows == 64
