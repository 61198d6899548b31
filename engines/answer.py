"""The one output of a graph that an engine's head reads."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engines.errors import ModelError
from engines.model import ModelSpec
from engines.tensor_uses import drop_unread

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

PASSED_ON = ("Identity", "Cast")
"""Operators that leave logits logits, and probabilities probabilities."""
CLASSIFIERS = ("TreeEnsembleClassifier", "LinearClassifier", "SVMClassifier", "Normalizer")
"""Operators of ai.onnx.ml that make logits or probabilities: only who exported them knows."""
NO_LOGITS = ("Sigmoid", *CLASSIFIERS)
"""Whose answers a softmax would turn into wrong probabilities; what Softmax reads is taken."""


def keep_answer(model: onnx.ModelProto, spec: ModelSpec) -> None:
    """Leave a graph its first float32 output alone, and what that is computed from.

    The head for classes has a Softmax of its own: of a graph that ends in one the input is kept,
    the logits.

    Args:
        model: Changed in place.
        spec: Its description.

    Raises:
        ModelError: No output is float32, or it may be no logits where logits are needed.
    """
    import onnx

    graph = model.graph
    answer = first_float(graph)
    if answer is None:
        kinds = {entry.name: entry.type.tensor_type.elem_type for entry in graph.output}
        found = ", ".join(f"{n} ({onnx.TensorProto.DataType.Name(k)})" for n, k in kinds.items())
        raise ModelError(
            f"model {spec.source}: its output is {found}; expected a float32 tensor. Export it "
            "with its scores as one; skl2onnx does so with options={'zipmap': False}."
        )
    if spec.head == "classes":
        _take_logits(graph, answer, spec)
    del graph.output[:]
    graph.output.append(answer)
    drop_unread(graph)


def first_float(graph: onnx.GraphProto) -> onnx.ValueInfoProto | None:
    """A copy of the first float32 output: classifiers often give labels before it."""
    import onnx

    for output in graph.output:
        if output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            found = onnx.ValueInfoProto()
            found.CopyFrom(output)
            return found
    return None


def _take_logits(graph: onnx.GraphProto, answer: onnx.ValueInfoProto, spec: ModelSpec) -> None:
    makers = {name: node for node in graph.node for name in node.output}
    reader, maker = None, makers.get(answer.name)
    while maker is not None and maker.op_type in PASSED_ON:
        reader, maker = maker, makers.get(maker.input[0])
    if maker is None:
        return
    if maker.op_type in NO_LOGITS:
        raise ModelError(
            f"model {spec.source}: its output {answer.name} comes from {maker.op_type} and may be "
            "probabilities already; expected logits. Set `model.head: scores`, or export the "
            "model without it."
        )
    axis = next((entry.i for entry in maker.attribute if entry.name == "axis"), -1)
    if maker.op_type == "Softmax" and axis in (-1, 1):  # logits are [batch, C]
        log.info("model %s ends in Softmax: what that reads are the logits", spec.source)
        if reader is None:
            answer.name = maker.input[0]
        else:
            reader.input[0] = maker.input[0]
