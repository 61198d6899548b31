"""Gemms as a quantiser takes them: products plus one number for each output, unscaled.

ONNX Runtime's sets beta to 1 and leaves the bias as it is, and stumbles over a bias of two axes,
which its optimiser makes of MatMul and Add as networks of scikit-learn are written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from engines.tensor_uses import uses

if TYPE_CHECKING:
    import onnx

SCALES = {"alpha": 1, "beta": 2}
"""Attribute -> which input it scales: the weight, the bias."""


def make_gemms_plain(graph: onnx.GraphProto) -> None:
    """Multiply alpha and beta into weights and biases, and make biases [outputs].

    What is no float32 constant, or is read by another node too, stays as it is.
    """
    from onnx import helper

    read = uses(graph)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    own = {n for n, t in constants.items() if t.data_type == t.FLOAT and read[n] == 1}
    for node in graph.node:
        if node.op_type == "Gemm":
            _fold_scales(node, constants, own)
            _flatten_bias(node, constants, own)
    for entry in graph.value_info:  # torch describes constants there, too
        if entry.name in own:
            tensor = constants[entry.name]
            entry.CopyFrom(helper.make_tensor_value_info(entry.name, tensor.FLOAT, tensor.dims))


def is_plain(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it is no Gemm, or one without scales whose bias, if any, is constant [outputs]."""
    if node.op_type != "Gemm":
        return True
    is_scaled = any(entry.name in SCALES and entry.f != 1 for entry in node.attribute)
    biases = _inputs(node)[2:]
    return not is_scaled and all(n in constants and len(constants[n].dims) == 1 for n in biases)


def is_turned(node: onnx.NodeProto) -> bool:
    """Whether a Gemm's weight is [outputs, inputs]."""
    return any(entry.name == "transB" and entry.i for entry in node.attribute)


def _inputs(node: onnx.NodeProto) -> list[str]:
    """Without a bias that is left out."""
    return [name for name in node.input if name]


def _fold_scales(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], own: Collection[str]
) -> None:
    from onnx import numpy_helper

    for entry in [entry for entry in node.attribute if entry.name in SCALES]:
        position = SCALES[entry.name]
        scaled = _inputs(node)[position : position + 1]
        if all(name in own for name in scaled):
            for name in scaled:
                array = numpy_helper.to_array(constants[name]) * np.float32(entry.f)
                constants[name].CopyFrom(numpy_helper.from_array(array, name))
            entry.f = 1


def _flatten_bias(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], own: Collection[str]
) -> None:
    from onnx import numpy_helper

    _, weight, *biases = _inputs(node)
    if weight not in constants:
        return
    num_outputs = constants[weight].dims[0 if is_turned(node) else 1]
    for name in [name for name in biases if name in own]:
        array = numpy_helper.to_array(constants[name])
        if array.size == 1 or array.shape == (1, num_outputs):
            flat = np.ascontiguousarray(np.broadcast_to(array.reshape(-1), num_outputs))
            constants[name].CopyFrom(numpy_helper.from_array(flat, name))
