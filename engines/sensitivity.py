"""Which layers a model can least afford in int8.

One graph holds every layer in both forms, with a switch for each: the float layer plus the switch
times what int8 changes of its input, weights and bias. Throwing one switch at a time shows what
that layer alone does to the model's output, without building a graph for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.calibrate import Feeds, ScaleTable
from engines.devices import WeightBits
from engines.probing import open_session
from engines.quantize import channel_axis, quantizable_layers
from engines.round_weights import Rounding, nearest

PREFIX = "nightscore_switch_"
SWITCHES = f"{PREFIX}all"


def rank_layers(
    core: onnx.ModelProto,
    rounding: Rounding,
    table: ScaleTable,
    feeds: Feeds,
    weight_bits: WeightBits = 8,
) -> list[tuple[str, float]]:
    """Layers and the mean squared error that each alone puts on the output, worst first.

    Args:
        core: Float graph.
        rounding: Of its layers.
        table: Ranges of its tensors.
        feeds: A few calibration rows in batches.
        weight_bits: Of the weights in int8.
    """
    model, layers = with_switches(core, rounding, table, weight_bits)
    session = open_session(model)
    output = core.graph.output[0].name
    errors = np.zeros(len(layers))
    for feed in feeds():
        off = np.zeros(len(layers), np.float32)
        (expected,) = session.run([output], {**feed, SWITCHES: off})
        for position in range(len(layers)):
            on = off.copy()
            on[position] = 1
            (found,) = session.run([output], {**feed, SWITCHES: on})
            same = np.zeros_like(expected)  # also where both are -inf, behind a mask
            change = np.subtract(found, expected, out=same, where=found != expected)
            errors[position] += float(np.sum(np.square(change, dtype=np.float64)))
    return sorted(zip(layers, errors.tolist(), strict=True), key=lambda item: -item[1])


def fewest_float_layers(
    ranked: Sequence[str], passes: Callable[[Sequence[str]], bool]
) -> tuple[str, ...] | None:
    """The shortest beginning of `ranked` that must stay in float; None when half is not enough.

    Doubles until it passes, then bisects: about 2 log2(n) calls of `passes`, each a gate.
    """
    fails, num = 0, 1
    most = len(ranked) // 2
    while num <= most and not passes(ranked[:num]):
        fails, num = num, num * 2
    if num > most:
        if fails == most or not passes(ranked[:most]):
            return None
        num = most
    while num - fails > 1:
        middle = (fails + num) // 2
        fails, num = (fails, middle) if passes(ranked[:middle]) else (middle, num)
    return tuple(ranked[:num])


def with_switches(
    core: onnx.ModelProto, rounding: Rounding, table: ScaleTable, weight_bits: WeightBits = 8
) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with one switch a layer, input `SWITCHES` float32 [layers], and the layers."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    board = _Board(model.graph, rounding, table, weight_bits)
    names = set(quantizable_layers(core))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name in names and board.can_switch(node):
            nodes.extend(board.switch(node))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shape = [len(board.layers)]
    entry = helper.make_tensor_value_info(SWITCHES, TensorProto.FLOAT, shape)
    model.graph.input.append(entry)
    return model, board.layers


class _Board:
    def __init__(
        self,
        graph: onnx.GraphProto,
        rounding: Rounding,
        table: ScaleTable,
        weight_bits: WeightBits,
    ) -> None:
        self.layers: list[str] = []
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._rounding = rounding
        self._ranges = table.ranges
        self._weight_bits = weight_bits

    def can_switch(self, node: onnx.NodeProto) -> bool:
        return node.input[0] in self._ranges and node.input[1] in self._constants

    def switch(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Nodes to put before a layer, whose inputs then go through its switch."""
        name = f"{PREFIX}{len(self.layers)}"
        index = self._constant(f"{name}_index", np.array(len(self.layers), np.int64))
        nodes = [helper.make_node("Gather", [SWITCHES, index], [name])]
        nodes += self._switched_input(node, name)
        weight = self._array(node.input[1])
        rounded = self._rounding.get(node.name)
        if rounded is None or rounded.weight is None:
            change = nearest(weight, channel_axis(node) % weight.ndim, self._weight_bits) - weight
        else:
            change = rounded.weight - weight
        nodes += self._switched_constant(node, 1, change, name)
        if rounded is not None and rounded.bias is not None:
            shift = rounded.bias - self._array(node.input[2])
            nodes += self._switched_constant(node, 2, shift, name)
        self.layers.append(node.name)
        return nodes

    def _switched_input(self, node: onnx.NodeProto, switch: str) -> list[onnx.NodeProto]:
        source = node.input[0]
        low, high = self._ranges[source]
        scale = max(abs(low), abs(high)) / 127 or 1.0
        parts = [f"{switch}_x_{part}" for part in ("q", "dq", "error", "part", "sum")]
        scale_name = self._constant(f"{switch}_scale", np.array(scale, np.float32))
        zero = self._constant(f"{switch}_zero", np.array(0, np.int8))
        node.input[0] = parts[-1]
        return [
            helper.make_node("QuantizeLinear", [source, scale_name, zero], [parts[0]]),
            helper.make_node("DequantizeLinear", [parts[0], scale_name, zero], [parts[1]]),
            helper.make_node("Sub", [parts[1], source], [parts[2]]),
            helper.make_node("Mul", [parts[2], switch], [parts[3]]),
            helper.make_node("Add", [source, parts[3]], [parts[4]]),
        ]

    def _switched_constant(
        self, node: onnx.NodeProto, position: int, change: npt.NDArray[np.float64], switch: str
    ) -> list[onnx.NodeProto]:
        prefix, source = f"{switch}_{position}", node.input[position]
        delta = self._constant(f"{prefix}_change", change.astype(np.float32))
        node.input[position] = f"{prefix}_sum"
        return [
            helper.make_node("Mul", [delta, switch], [f"{prefix}_part"]),
            helper.make_node("Add", [source, f"{prefix}_part"], [f"{prefix}_sum"]),
        ]

    def _array(self, name: str) -> npt.NDArray[np.float64]:
        return numpy_helper.to_array(self._constants[name]).astype(np.float64)

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name
