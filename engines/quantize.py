"""Static int8: explicit Q/DQ nodes from a scale table, placed as the runtime wants them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import (
    CalibrationMethod,
    TensorData,
    TensorsData,
    save_tensors_data,
)

from engines.calibrate import ScaleTable
from engines.devices import WeightBits
from engines.round_weights import Rounding, with_rounding
from engines.tensor_uses import uses

Placement = Literal["tensorrt", "cpu"]
WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TENSORRT_OPS = (*WEIGHTED_OPS, "Add", "MaxPool", "GlobalAveragePool", "AveragePool")
SYMMETRIC_ENOUGH = 0.75
"""Smaller side of a range against its larger one: at most 12 % of the levels are wasted."""
TENSORRT_OPTIONS = {
    # Symmetric, signed, float bias: all else its parser refuses.
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,  # weights stay float constants followed by Q and DQ
    "DedicatedQDQPair": True,  # a pair for each consumer, so that one can be removed alone
    # No Q/DQ between a convolution and its activation, so that they fuse.
    "OpTypesToExcludeOutputQuantization": list(TENSORRT_OPS),
}


def quantize(
    core: onnx.ModelProto,
    rounding: Rounding,
    table: ScaleTable,
    placement: Placement,
    float_layers: Sequence[str] = (),
    weight_bits: WeightBits = 8,
) -> onnx.ModelProto:
    """An int8 graph from a float one.

    Args:
        core: Float graph with shapes inferred.
        rounding: Of its layers.
        table: Ranges of its tensors.
        placement: `tensorrt`: symmetric int8 activations, float bias, Q/DQ where convolution, bias,
            residual Add and activation fuse. `cpu`: uint8 activations and Q/DQ on outputs too,
            which ONNX Runtime's x86 kernels need and OpenVINO runs fastest. In both weights are
            int8 per channel, every scale comes from the same table, and what follows the last
            weighted layer is float.
        float_layers: Names of nodes that stay in float.
        weight_bits: 7: int8 weights use half of their range; see `engines.devices.Cpu`.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        ranges, target = Path(folder, "ranges.json"), Path(folder, "int8.onnx")
        save_tensors_data(_as_tensors_data(table), ranges)
        options: dict[str, Any] = {
            "activation_type": QuantType.QUInt8,
            "extra_options": {"TensorQuantOverrides": _symmetric_input(core, table)},
        }
        if placement == "tensorrt":
            options = {
                "activation_type": QuantType.QInt8,
                "op_types_to_quantize": list(TENSORRT_OPS),
                "extra_options": TENSORRT_OPTIONS,
            }
        quantize_static(
            with_rounding(core, rounding, float_layers),
            target,
            None,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(float_layers),
            calibration_cache_path=ranges,
            **options,
        )
        model = onnx.load(target)
    if placement == "tensorrt":
        _free_one_leg_of_adds(model.graph)
    else:
        _free_the_head(model.graph)
    _drop_unread(model.graph)
    return model


def _symmetric_input(core: onnx.ModelProto, table: ScaleTable) -> dict[str, Any]:
    """Overrides that let the first layer read int8 around zero, where that costs little.

    OpenVINO 2026.4 runs a convolution whose padded uint8 input has a zero point in float, which
    took 12 % of EfficientNet-Lite0's time.
    """
    (name,) = {entry.name for entry in core.graph.input} - {t.name for t in core.graph.initializer}
    low, high = table.ranges[name]
    if min(-low, high) < SYMMETRIC_ENOUGH * max(-low, high):
        return {}
    return {name: [{"quant_type": QuantType.QInt8, "symmetric": True}]}


def quantizable_layers(core: onnx.ModelProto) -> list[str]:
    """Names of the nodes with weights, in the graph's order."""
    return [node.name for node in core.graph.node if node.op_type in WEIGHTED_OPS]


def _as_tensors_data(table: ScaleTable) -> TensorsData:
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in table.ranges.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)


def _free_one_leg_of_adds(graph: onnx.GraphProto) -> None:
    """Let one weighted leg of every residual Add, which fuses with it, bypass its Q/DQ pair.

    The other leg, the skip, keeps its pair: TensorRT then reads int8 there. Where no leg comes
    from a weighted layer both keep theirs.
    """
    producer = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    for add in [node for node in graph.node if node.op_type == "Add"]:
        is_free = False
        for position, name in enumerate(add.input):
            dequantize = producer.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            if dequantize.input[0] not in producer:  # a constant that the model has in int8
                continue
            source = producer[dequantize.input[0]].input[0]
            is_weighted = source in producer and producer[source].op_type in WEIGHTED_OPS
            # A constant leg is the bias of a MatMul: float, like every bias.
            if source in constants or (is_weighted and not is_free):
                is_free = is_free or is_weighted
                add.input[position] = source


def _free_the_head(graph: onnx.GraphProto) -> None:
    """Bypass every Q/DQ pair behind the last weighted layer: nobody reads int8 there.

    The quantiser leaves no output out; a score would have 256 values, and users would tie.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    before_a_layer: set[str] = set()
    for node in reversed(graph.node):  # a graph's nodes are in topological order
        followers = [reader for name in node.output for reader in readers.get(name, [])]
        if any(f.op_type in WEIGHTED_OPS or f.name in before_a_layer for f in followers):
            before_a_layer.add(node.name)
    producer = {output: node for node in graph.node for output in node.output}
    outputs = {entry.name for entry in graph.output}
    pairs = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in producer]
    for dequantize in [node for node in pairs if node.name not in before_a_layer]:
        quantize_node = producer[dequantize.input[0]]
        source, result = quantize_node.input[0], dequantize.output[0]
        graph.node.remove(dequantize)
        graph.node.remove(quantize_node)
        if result in outputs:
            producer[source].output[list(producer[source].output).index(source)] = result
            source, result = result, source
        for node in readers.get(result, []):
            node.input[:] = [source if name == result else name for name in node.input]


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove Q/DQ pairs and constants that no node reads any more.

    Not each where its one reader is led past it: Adds share constants, and a pair is read by the
    nodes beside a quantised one too.
    """
    for operator in ("DequantizeLinear", "QuantizeLinear"):
        read = uses(graph)
        for node in [node for node in graph.node if node.op_type == operator]:
            if node.output[0] not in read:
                graph.node.remove(node)
    read = uses(graph)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises on the root logger what has been done already."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
