"""What the layers of a graph multiply with their weights, sampled over rows and positions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engines.calibrate import BATCH_ROWS, Feeds
from engines.probing import open_session, with_outputs
from engines.runner import Array

if TYPE_CHECKING:
    import onnx

Floats = npt.NDArray[np.float64]

SAMPLES_PER_ROW = 8
"""Positions of a picture, or of a sequence, that are looked at: neighbours say much the same."""
MOST_INPUTS = 4608
"""Weights of one output, such as those of a 3x3 convolution of 512 channels: to make up for the
rounding of so many takes a core 15 s, and of twice as many eight times as long."""
PASS_BYTES = 1 << 30
"""Of moments, and of what layers get for one batch, that one pass over the rows holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Of a layer's inputs, for each of its groups."""

    num_samples: int
    mean: Floats
    """[groups, inputs]."""
    second: Floats
    """Mean products of two inputs each: [groups, inputs, inputs]."""

    @property
    def covariance(self) -> Floats:
        """[groups, inputs, inputs]."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]


class Layer:
    """A convolution, Gemm or MatMul as products of matrices: one [outputs, inputs] a group.

    Args:
        node: The node.
        weight: Its constant.
    """

    def __init__(self, node: onnx.NodeProto, weight: Array) -> None:
        self.name = node.name
        self.source: str = node.input[0]
        self._constant = weight
        self._shape = weight.shape
        self._options = _attributes(node)
        self._is_convolution = node.op_type == "Conv"
        # Gemm takes [outputs, inputs] when it is told so, and [inputs, outputs] as MatMul does.
        self._is_turned = not self._is_convolution and not self._options.get("transB")
        self.num_groups: int = self._options.get("group", 1)
        num_outputs = self._shape[1 if self._is_turned else 0]
        self.num_inputs = weight.size // num_outputs
        """Of one output."""

    @property
    def weight(self) -> Floats:
        """[groups, outputs, inputs]."""
        matrix = self._constant.T if self._is_turned else self._constant
        return matrix.reshape(self.num_groups, -1, self.num_inputs).astype(np.float64)

    def as_constant(self, weight: Floats) -> npt.NDArray[np.float32]:
        """Weights like `self.weight` as the graph holds them."""
        flat = weight.reshape(-1, self.num_inputs)
        constant = (flat.T if self._is_turned else flat).reshape(self._shape)
        return np.ascontiguousarray(constant, np.float32)

    def samples(self, values: Array, rng: np.random.Generator) -> Array:
        """Inputs at some positions of each row: [groups, samples, inputs]."""
        windows = self._windows(values) if self._is_convolution else values
        num_rows = len(values)
        positions = windows.shape[1 : windows.ndim - (len(self._shape) - 1)]
        num = min(SAMPLES_PER_ROW, math.prod(positions))
        picked = [rng.integers(0, size, (num_rows, num)) for size in positions]
        found = np.asarray(windows[(np.arange(num_rows)[:, None], *picked)])
        return found.reshape(num_rows * num, self.num_groups, -1).transpose(1, 0, 2)

    def _windows(self, values: Array) -> Array:
        """A view [rows, *positions, channels, *kernel], whatever the strides: all of them count."""
        kernel = self._shape[2:]
        dilations = self._options.get("dilations", [1] * len(kernel))
        spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
        pads = self._pads(spans)
        padded = np.pad(values, [(0, 0), (0, 0), *pads]) if np.any(pads) else values
        axes = tuple(range(2, 2 + len(kernel)))
        view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)
        view = np.moveaxis(view, 1, 1 + len(kernel))
        steps = [slice(None)] * (view.ndim - len(kernel)) + [
            slice(None, None, s) for s in dilations
        ]
        return view[tuple(steps)]

    def _pads(self, spans: Sequence[int]) -> list[tuple[int, int]]:
        if self._options.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
            return [((span - 1) // 2, span // 2) for span in spans]
        pads = self._options.get("pads", [0] * 2 * len(spans))
        return list(zip(pads[: len(spans)], pads[len(spans) :], strict=True))


def layers_of(core: onnx.ModelProto) -> list[Layer]:
    """Layers whose weights are constants of their own and not too many, in the graph's order."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in core.graph.initializer}
    uses = Counter(name for node in core.graph.node for name in node.input)
    layers = [
        Layer(node, numpy_helper.to_array(constants[node.input[1]]))
        for node in core.graph.node
        if _is_product(node, constants) and uses[node.input[1]] == 1
    ]
    return [layer for layer in layers if layer.num_inputs <= MOST_INPUTS]


def _is_product(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it multiplies what it gets with constant weights, an output at a time."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or _attributes(node).get("transA"):
        return False
    source, weight = node.input[:2]
    if source in constants or weight not in constants:
        return False
    return node.op_type == "Conv" or len(constants[weight].dims) == 2


def measured(
    core: onnx.ModelProto, layers: Sequence[Layer], feeds: Feeds
) -> Iterator[tuple[Layer, Moments]]:
    """Each layer with the moments of its inputs in the float graph.

    Args:
        core: Float graph.
        layers: Some of its layers.
        feeds: Calibration rows; gone through once for as many layers as fit `PASS_BYTES`.
    """
    inputs = {entry.name for entry in core.graph.input}
    for some in _passes(core, layers):
        sums = {layer.name: _Sums() for layer in some}
        asked = sorted({layer.source for layer in some} - inputs)
        session = open_session(with_outputs(core, asked))
        rng = np.random.default_rng(0)  # the same rows make the same engine
        for feed in feeds():
            found = session.run(asked, feed) if asked else []
            values = feed | dict(zip(asked, found, strict=True))
            for layer in some:
                sums[layer.name].add(layer.samples(values[layer.source], rng))
        for layer in some:
            yield layer, sums.pop(layer.name).moments()


class _Sums:
    def __init__(self) -> None:
        self._num_samples = 0
        self._first: Any = 0.0
        self._second: Any = 0.0

    def add(self, samples: Array) -> None:
        self._num_samples += samples.shape[1]
        self._first = self._first + samples.sum(axis=1, dtype=np.float64)
        self._second = self._second + np.matmul(samples.transpose(0, 2, 1), samples)

    def moments(self) -> Moments:
        num = self._num_samples
        return Moments(num_samples=num, mean=self._first / num, second=self._second / num)


def _passes(core: onnx.ModelProto, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers in the graph's order, as many at a time as fit."""
    batch_bytes = _batch_bytes(core)
    some: list[Layer] = []
    num_bytes = 0
    for layer in layers:
        size = layer.num_groups * layer.num_inputs**2 * 8 + batch_bytes.get(layer.source, 0)
        if some and num_bytes + size > PASS_BYTES:
            yield some
            some, num_bytes = [], 0
        some.append(layer)
        num_bytes += size
    if some:
        yield some


def _batch_bytes(core: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the tensors of one batch, as far as their shapes are known."""
    sizes = {}
    for entry in (*core.graph.input, *core.graph.value_info):
        dims = entry.type.tensor_type.shape.dim
        sizes[entry.name] = 4 * math.prod(dim.dim_value or BATCH_ROWS for dim in dims)
    return sizes


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
