"""Static int8: explicit Q/DQ nodes from a scale table, placed as the runtime wants them."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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

from engines.calibrate import ScaleTable, activations
from engines.devices import WeightBits
from engines.errors import ModelError
from engines.gemms import is_plain, is_turned
from engines.round_weights import Rounding, with_rounding
from engines.tensor_uses import drop_unread, inputs_of, uses

Placement = Literal["tensorrt", "cpu"]
WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TENSORRT_OPS = (*WEIGHTED_OPS, "Add", "MaxPool", "GlobalAveragePool", "AveragePool")
REMOVED_OPS = ("Relu", "Clip")
"""The quantiser does so where a zero point of uint8 cuts off what they would."""
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

    Raises:
        ModelError: Nothing in the graph can be int8, but what is there already.
    """
    in_float = {*float_layers, *_unfit_nodes(core), *_unmeasured_nodes(core, table)}
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
            with_rounding(core, rounding, in_float),
            target,
            None,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(in_float if placement == "tensorrt" else in_float | _head(core)),
            calibration_cache_path=ranges,
            **options,
        )
        model = onnx.load(target)
    _restore_constants(model.graph, core.graph, in_float)
    if placement == "tensorrt":
        _free_one_leg_of_adds(model.graph)
    else:
        _free_the_head(model.graph)
    # Pairs past which their readers are led; Adds share some, and their constants.
    drop_unread(model.graph)
    if not float_layers and _num_rounded(model) <= _num_rounded(core):
        raise ModelError(
            "int8: nothing in the model can be int8; expected a Conv, ConvTranspose, Gemm or "
            "MatMul with float weights."
        )
    return model


def _num_rounded(model: onnx.ModelProto) -> int:
    """Tensors that are rounded while it runs."""
    return sum(node.op_type == "QuantizeLinear" for node in model.graph.node)


def _symmetric_input(core: onnx.ModelProto, table: ScaleTable) -> dict[str, Any]:
    """Overrides that let the first layer read int8 around zero, where that costs little.

    OpenVINO 2026.4 runs a convolution whose padded uint8 input has a zero point in float, which
    took 12 % of EfficientNet-Lite0's time.
    """
    name = inputs_of(core.graph)[0].name
    low, high = table.ranges.get(name, (0.0, np.inf))
    if min(-low, high) < SYMMETRIC_ENOUGH * max(-low, high):
        return {}
    return {name: [{"quant_type": QuantType.QInt8, "symmetric": True}]}


def quantizable_layers(core: onnx.ModelProto) -> list[str]:
    """Names of the nodes with weights that int8 can hold, in the graph's order."""
    unfit = _unfit_nodes(core)
    weighted = [node.name for node in core.graph.node if node.op_type in WEIGHTED_OPS]
    return [name for name in weighted if name not in unfit]


def channel_axis(node: onnx.NodeProto) -> int:
    """Of a weight's axes, the one along which each channel has a scale of its own."""
    of_gemm = 0 if is_turned(node) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}.get(node.op_type, of_gemm)


def _unfit_nodes(core: onnx.ModelProto) -> set[str]:
    """Names of the nodes that the quantiser would get wrong, or make a graph of that does not run.

    These are Gemms that could not be made plain, nodes that read a layer's weight along another
    axis, such as the table of an embedding, grouped transposed convolutions with a bias, and what
    an activation gives to a branch: the quantiser may remove it, and looks into no branch.
    """
    constants = {tensor.name: tensor for tensor in core.graph.initializer}
    direct = Counter(name for node in core.graph.node for name in node.input)
    for_branches = (uses(core.graph) - direct).keys() - {e.name for e in core.graph.output}
    axes: dict[str, int] = {}
    for node in core.graph.node:
        if node.op_type in WEIGHTED_OPS and node.input[1] in constants:
            axes.setdefault(node.input[1], channel_axis(node) % len(constants[node.input[1]].dims))
    return {
        node.name
        for node in core.graph.node
        if not is_plain(node, constants)
        or _is_grouped_with_bias(node)
        or (node.op_type in REMOVED_OPS and node.output[0] in for_branches)
        or any(axes.get(name, axis) != axis for name, axis in _read_along(node, constants))
    }


def _read_along(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> Iterator[tuple[str, int | None]]:
    """Constants that a node reads, and along which axis each has its scales; None: it has one."""
    for position, name in enumerate(node.input):
        if name in constants:
            is_weight = position == 1 and node.op_type in WEIGHTED_OPS
            yield name, channel_axis(node) % len(constants[name].dims) if is_weight else None


def _is_grouped_with_bias(node: onnx.NodeProto) -> bool:
    """Whether it has more biases than its weights have channels."""
    is_grouped = any(entry.name == "group" and entry.i > 1 for entry in node.attribute)
    return node.op_type == "ConvTranspose" and is_grouped and len(node.input) > 2


def _unmeasured_nodes(core: onnx.ModelProto, table: ScaleTable) -> set[str]:
    """Names of the nodes beside a tensor that has no range."""
    unmeasured = set(activations(core)) - table.ranges.keys()
    return {
        node.name
        for node in core.graph.node
        if not unmeasured.isdisjoint([*node.input, *node.output])
    }


def _as_tensors_data(table: ScaleTable) -> TensorsData:
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in table.ranges.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)


def _restore_constants(
    graph: onnx.GraphProto, original: onnx.GraphProto, names: Collection[str]
) -> None:
    """Let nodes in float read constants as they were: the quantiser rounds one for all readers."""
    constants = {tensor.name: tensor for tensor in original.initializer}
    inputs = {node.name: node.input for node in original.node if node.name in names}
    for node in graph.node:
        for position, name in enumerate(inputs.get(node.name, ())):
            if name in constants:
                node.input[position] = name
    known = {tensor.name for tensor in graph.initializer}
    known.update(name for node in graph.node for name in node.output)
    missing = constants.keys() & uses(graph).keys() - known
    graph.initializer.extend(constants[name] for name in sorted(missing))


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


def _head(core: onnx.ModelProto) -> set[str]:
    """Names of the nodes behind the last weighted layer.

    The quantiser removes a Relu or Clip before a pair that does its work; there is none here.
    """
    behind = _behind_all_layers(core.graph)
    return behind - {node.name for node in core.graph.node if node.op_type in WEIGHTED_OPS}


def _behind_all_layers(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes whose results no layer with weights depends on."""
    readers, behind = _readers(graph), set()
    for node in reversed(graph.node):  # a graph's nodes are in topological order
        followers = [reader for name in node.output for reader in readers.get(name, [])]
        if all(f.name in behind and f.op_type not in WEIGHTED_OPS for f in followers):
            behind.add(node.name)
    return behind


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _free_the_head(graph: onnx.GraphProto) -> None:
    """Bypass every Q/DQ pair behind the last weighted layer: nobody reads int8 there.

    The quantiser leaves no output out; a score would have 256 values, and users would tie.
    """
    readers, behind = _readers(graph), _behind_all_layers(graph)
    producer = {output: node for node in graph.node for output in node.output}
    outputs = {entry.name for entry in graph.output}
    pairs = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in producer]
    for dequantize in [node for node in pairs if node.name in behind]:
        quantize_node = producer[dequantize.input[0]]
        source, result = quantize_node.input[0], dequantize.output[0]
        graph.node.remove(dequantize)
        graph.node.remove(quantize_node)
        if result in outputs:
            producer[source].output[list(producer[source].output).index(source)] = result
            source, result = result, source
        for node in readers.get(result, []):
            node.input[:] = [source if name == result else name for name in node.input]


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
