"""The one output of a graph that an engine's head reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from engines.errors import ModelError
from engines.model import ModelSpec
from engines.tensor_uses import drop_unread

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

ANSWERS = ("logits", "probabilities", "scores", "output")
"""Names of the output that is wanted of several, in any case."""
PASSED_ON = ("Identity", "Cast")
"""Operators that leave logits logits, and probabilities probabilities."""
CLASSIFIERS = ("TreeEnsembleClassifier", "LinearClassifier", "SVMClassifier", "Normalizer")
"""Operators of ai.onnx.ml that make logits or probabilities: only who exported them knows."""
NO_LOGITS = ("Sigmoid", *CLASSIFIERS)
"""Whose answers a softmax would turn into wrong probabilities; what Softmax reads is taken."""
RESHAPED = ("Squeeze", "Unsqueeze", "Flatten", "Reshape", "Clip")
"""Operators whose first input is what they give in another shape, or within limits."""
RANKED = ("TopK", "ArgMax", "ArgMin", "Hardmax")
"""Operators in whose answers no class has a logit: they are sorted by rank, or name the best."""
COMBINED = ("Concat", "Sub", "Mul", "Div")
"""Operators that give probabilities when all that they read are: 1 - p beside p, p times 1."""


def keep_answer(model: onnx.ModelProto, spec: ModelSpec) -> None:
    """Leave a graph one float32 output alone, and what that is computed from.

    The head for classes has a Softmax of its own: of a graph that ends in one the input is kept,
    the logits.

    Args:
        model: Changed in place.
        spec: Its description.

    Raises:
        ModelError: No output is float32, or it is or may be no logits where logits are needed.
    """
    import onnx

    graph = model.graph
    answers = float_outputs(graph)
    if not answers:
        kinds = {entry.name: entry.type.tensor_type.elem_type for entry in graph.output}
        found = ", ".join(f"{n} ({onnx.TensorProto.DataType.Name(k)})" for n, k in kinds.items())
        advice = "with its scores as one; skl2onnx does so with options={'zipmap': False}"
        if ranker := next(filter(None, (ranks_from(graph, name) for name in kinds)), ""):
            advice = f"with the logits before {ranker} as one"
        raise ModelError(
            f"model {spec.source}: its output is {found}; expected a float32 tensor. Export it "
            f"{advice}."
        )
    answer = answers[0]
    if len(answers) > 1:
        others = ", ".join(entry.name for entry in answers[1:])
        log.warning("model %s: output %s is taken, not %s", spec.source, answer.name, others)
    if spec.head == "classes":
        _take_logits(graph, answer, spec)
    del graph.output[:]
    graph.output.append(answer)
    drop_unread(graph)


def float_outputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Copies of the float32 outputs, the answer first: classifiers often give labels before it.

    Of several that is the one whose name says so, if one does, and else the first.
    """
    import onnx

    found = []
    for output in graph.output:
        if output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            found.append(onnx.ValueInfoProto())
            found[-1].CopyFrom(output)
    named = [entry for entry in found if entry.name.lower() in ANSWERS]
    if len(named) == 1:
        found.sort(key=lambda entry: entry is not named[0])
    return found


def _take_logits(graph: onnx.GraphProto, answer: onnx.ValueInfoProto, spec: ModelSpec) -> None:
    if ranker := ranks_from(graph, answer.name):
        raise ModelError(
            f"model {spec.source}: its output {answer.name} comes from {ranker}, whose positions "
            "are ranks, and no classes; expected logits. Export the model up to its logits."
        )
    makers = _makers(graph)
    reader, maker = None, makers.get(answer.name)
    while maker is not None and maker.op_type in PASSED_ON:
        reader, maker = maker, makers.get(maker.input[0])
    if maker is None:
        return
    if maker.op_type in NO_LOGITS:
        raise no_logits(spec, f"its output {answer.name} comes from {maker.op_type}")
    if is_softmax_of_classes(maker):
        log.info("model %s ends in Softmax: what that reads are the logits", spec.source)
        if reader is None:
            answer.name = maker.input[0]
        else:
            reader.input[0] = maker.input[0]


def is_softmax_of_classes(node: onnx.NodeProto) -> bool:
    """Whether it is one over the classes of logits [batch, C]."""
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), -1)
    return node.op_type == "Softmax" and axis in (-1, 1)


def no_logits(spec: ModelSpec, found: str) -> ModelError:
    """Of an output that a softmax would turn into wrong probabilities; `found` says why."""
    return ModelError(
        f"model {spec.source}: {found} and may be probabilities already; expected logits. Set "
        "`model.head: scores`, or export the model up to its logits."
    )


def ranks_from(graph: onnx.GraphProto, name: str) -> str:
    """The operator that ranks a tensor's classes, such as `TopK`; empty: none is found."""
    maker = _maker_behind((*PASSED_ON, *RESHAPED), _makers(graph), name)
    return maker.op_type if maker is not None and maker.op_type in RANKED else ""


def _makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def _maker_behind(
    operators: Sequence[str], makers: Mapping[str, onnx.NodeProto], name: str
) -> onnx.NodeProto | None:
    """The first node on the way back from a tensor that is none of these operators."""
    maker = makers.get(name)
    while maker is not None and maker.op_type in operators:
        maker = makers.get(maker.input[0])
    return maker


def probabilities_from(graph: onnx.GraphProto, name: str) -> str:
    """The operator that makes a tensor probabilities, as far as a walk back over the graph tells.

    Returns:
        Such as `Sigmoid`; empty: none is found, or it is a Softmax whose logits the head can take.
    """
    constants = {tensor.name for tensor in graph.initializer}
    makers = _makers(graph)
    maker = _maker_behind(PASSED_ON, makers, name)
    if maker is None or is_softmax_of_classes(maker):
        return ""

    @cache
    def found(name: str) -> str:
        node = makers.get(name)
        if node is None or node.op_type in ("Softmax", *NO_LOGITS):
            return node.op_type if node else ""
        if node.op_type in (*PASSED_ON, *RESHAPED):
            return found(node.input[0])
        if node.op_type not in COMBINED:
            return ""
        sources = [found(each) for each in node.input if not is_constant(each)]
        return sources[0] if sources and all(sources) else ""

    def is_constant(name: str) -> bool:
        return name in constants or (name in makers and makers[name].op_type == "Constant")

    return found(name)
