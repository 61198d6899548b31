"""A graph of other floats in float32: what int8 is made from, and what all engines are judged by.

Quantiser and calibration know float32 alone: half-precision weights would stay as they are, and an
engine be called int8 that is none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.model import FeatureInput, ModelSpec, shown
from engines.probing import open_session
from engines.tensor_uses import all_graphs, inputs_of

if TYPE_CHECKING:
    import onnx
    import onnxruntime

    from engines.runner import Array

log = logging.getLogger(__name__)

OTHER_FLOATS = ("FLOAT16", "BFLOAT16", "DOUBLE")
"""Types that become float32, as ONNX names them."""
KINDS = ("to", "dtype", "output_dtype")
"""Attributes that name the type of what a node gives."""
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
"""What ONNX Runtime calls the floats that numpy knows."""
TOLERANCE = 0.01
"""Of the largest answer: float16 has three digits, and a net's layers add up what they round."""
NUM_ROWS = 8
"""That both graphs answer; a graph that is bound to a batch gets that."""
SCALES = (1.0, 1e3, 1e6)
"""Of the features that a graph with doubles is tried with: large ones may be why it has them."""


def in_float32(model: onnx.ModelProto, spec: ModelSpec) -> onnx.ModelProto:
    """The model with float32 in place of all other floats, if its answers stay what they are.

    Args:
        model: Left as it is.
        spec: Its description.

    Returns:
        The model itself where it has no other floats, or needs them: it computes with more digits
        than float32 has, say.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    others = _convert(copy)
    if not others:
        return model
    are_scaled = "DOUBLE" in others and isinstance(spec.input, FeatureInput)
    try:
        problem = _difference(model, copy, spec, SCALES if are_scaled else (1.0,))
    except Exception as error:  # ONNX Runtime may raise anything
        problem = shown(error)
    if problem:
        log.warning("model %s: not computed in float32: %s", spec.source, problem)
        return model
    log.info("model %s: its weights of other floats are computed in float32", spec.source)
    return copy


def _convert(model: onnx.ModelProto) -> set[str]:
    """Change all floats in place; the others that there were."""
    graphs = list(all_graphs(model.graph))
    typed = [e for graph in graphs for e in (*graph.input, *graph.output, *graph.value_info)]
    nodes = [node for part in (*graphs, *model.functions) for node in part.node]
    attributes = [attribute for node in nodes for attribute in node.attribute]
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    tensors += [attribute.t for attribute in attributes if attribute.HasField("t")]
    found = [
        *[_rename(entry.type.tensor_type, "elem_type") for entry in typed],
        *[_rename(attribute, "i") for attribute in attributes if attribute.name in KINDS],
        *[_round(tensor) for tensor in tensors],
    ]
    return set(filter(None, found))


def _rename(holder: Any, field: str) -> str | None:
    """The other float that it named, if it did."""
    from onnx import TensorProto

    other = next(
        (n for n in OTHER_FLOATS if getattr(holder, field) == TensorProto.DataType.Value(n)), None
    )
    if other:
        setattr(holder, field, TensorProto.FLOAT)
    return other


def _round(tensor: onnx.TensorProto) -> str | None:
    """The other float that its values were, if they were."""
    from onnx import TensorProto, numpy_helper

    kind = TensorProto.DataType.Name(tensor.data_type)
    if kind not in OTHER_FLOATS:
        return None
    values = numpy_helper.to_array(tensor).astype(np.float64)
    largest = float(np.finfo(np.float32).max)
    # A mask's lowest double stays finite: minus infinity times zero would be NaN.
    bounded = np.where(np.isfinite(values), values.clip(-largest, largest), values)
    tensor.CopyFrom(numpy_helper.from_array(bounded.astype(np.float32), tensor.name))
    return str(kind)


def _difference(
    model: onnx.ModelProto, copy: onnx.ModelProto, spec: ModelSpec, scales: Sequence[float]
) -> str:
    """How answers to noise differ, in words; empty: they do not, or the model has none to it.

    Raises:
        Exception: ONNX Runtime cannot load or run the copy.
    """
    num_rows = inputs_of(model.graph)[0].type.tensor_type.shape.dim[0].dim_value or NUM_ROWS
    noise = np.random.default_rng(0).random((num_rows, *spec.input.model_row_shape), np.float32)
    batches = [noise * np.float32(scale) for scale in scales]
    session = open_session(copy)
    try:
        original = open_session(model)
        expected = [_answers(original, rows) for rows in batches]
    except Exception:  # bfloat16 that no CPU kernel takes, say
        return ""
    for rows, wanted in zip(batches, expected, strict=True):
        for name, found in _answers(session, rows).items():
            known = np.isfinite(wanted[name])
            finite = np.where(known, wanted[name], 0)
            largest = abs(np.where(known, found, 0) - finite).max(initial=0)
            if not largest <= TOLERANCE * abs(finite).max(initial=0):
                return f"output {name} differs by {largest:.3g}; expected less than float16 rounds"
    return ""


def _answers(session: onnxruntime.InferenceSession, rows: Array) -> dict[str, Array]:
    """The float outputs for rows, as float64."""
    (taken,) = session.get_inputs()
    names = [output.name for output in session.get_outputs() if output.type in DTYPES]
    answers = session.run(names, {taken.name: rows.astype(DTYPES[taken.type])})
    return {n: np.asarray(a, np.float64) for n, a in zip(names, answers, strict=True)}
