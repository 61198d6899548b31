"""The half-precision graph: TensorRT types strongly, so fp16 is a graph of its own, not a flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

LARGEST_HALF = 65_504.0
"""Constants beyond it are clipped to it."""
KEPT_IN_FLOAT = ("Softmax", "LogSoftmax", "ReduceMean", "LayerNormalization", "Pow", "Exp")
"""Sums over many values, and values that leave the range of fp16 easily."""


def to_half(core: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in fp16; input and output stay float32, behind casts.

    Weights below the smallest normal fp16 (6e-5) lose bits: the gate judges what that costs.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(core)
    blocked = [*DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FLOAT]
    half = ONNXModel(
        convert_float_to_float16(
            copy, max_finite_val=LARGEST_HALF, keep_io_types=True, op_block_list=blocked
        )
    )
    # The converter writes the cast of a tensor once for each node that reads it, all at the end.
    nodes = {tuple(node.output): node for node in half.model.graph.node}
    del half.model.graph.node[:]
    half.model.graph.node.extend(nodes.values())
    half.topological_sort()
    result: onnx.ModelProto = half.model
    return result
