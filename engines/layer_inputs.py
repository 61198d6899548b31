"""What the layers of a graph multiply with their weights, sampled over rows and positions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engines.calibrate import Feeds
from engines.export import fixed_batch
from engines.gemms import is_plain
from engines.probing import open_session, with_outputs
from engines.runner import Array
from engines.tensor_uses import uses

if TYPE_CHECKING:
    import onnx

Floats = npt.NDArray[np.float64]

SAMPLES_PER_ROW = 8
"""Positions of a picture, or of a sequence, that are looked at: neighbours say much the same."""
MOST_INPUTS = 4608
"""Weights of one output, such as those of a 3x3 convolution of 512 channels: to make up for the
rounding of so many takes a core 15 s, and of twice as many eight times as long."""
PASS_BYTES = 1 << 30
"""Of products that are gathered in one pass over the rows."""
INPUT_BYTES = 1 << 29
"""Of what layers get at once: of large pictures it is a gigabyte a row, and few rows are run."""
FLOAT64_ERROR = 1e-12
"""Of mean products of numbers that are alike: their variance may come out below 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Of a layer's inputs, for each of its groups."""

    num_samples: int
    mean: Floats
    """[groups, inputs]."""
    second: Floats | None
    """Mean products of two inputs each: [groups, inputs, inputs]; None: not `rounds_together`."""

    @property
    def covariance(self) -> Floats | None:
        """[groups, inputs, inputs], positive."""
        if self.second is None:
            return None
        error = FLOAT64_ERROR * self.second * np.eye(self.second.shape[1])
        return self.second - self.mean[:, :, None] * self.mean[:, None, :] + error


class Layer:
    """A convolution, Gemm or MatMul as products of matrices: one [outputs, inputs] a group.

    Args:
        node: The node.
        constants: The graph's, by name.
        own: Those that no other node uses: others cannot be changed as suits each.
    """

    def __init__(
        self, node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], own: Collection[str]
    ) -> None:
        from onnx import numpy_helper

        self.name = node.name
        self.source, weight = node.input[:2]
        self._constant = numpy_helper.to_array(constants[weight])
        self._shape = self._constant.shape
        self._options = _attributes(node)
        self._is_convolution = node.op_type == "Conv"
        # Gemm takes [outputs, inputs] when it is told so, and [inputs, outputs] as MatMul does.
        self._is_turned = not self._is_convolution and not self._options.get("transB")
        self.num_groups: int = self._options.get("group", 1)
        num_outputs = self._shape[1 if self._is_turned else 0]
        self.num_inputs = self._constant.size // num_outputs
        """Of one output."""
        self.rounds_together = weight in own and self.num_inputs <= MOST_INPUTS
        """Whether its weights make up for each other's rounding."""
        self.bias: Array | None = None
        """[outputs]; None where it has none that could hold a correction."""
        if len(node.input) > 2 and node.input[2] in own:
            self.bias = numpy_helper.to_array(constants[node.input[2]])

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

    def samples(self, values: Array, num_rows: int, rng: np.random.Generator) -> Array:
        """Inputs at some positions of each row: [groups, samples, inputs].

        Args:
            values: What the layer gets for `num_rows` rows; the first axis may be more than these.
            num_rows: Of the batch.
            rng: Chooses the positions.
        """
        most = SAMPLES_PER_ROW * num_rows
        values = np.atleast_2d(values)
        if len(values) > most:
            values = values[rng.choice(len(values), most, replace=False)]
        windows = self._windows(values) if self._is_convolution else values
        num = len(values)
        positions = windows.shape[1 : windows.ndim - (len(self._shape) - 1)]
        num_each = min(max(1, most // num), math.prod(positions))
        picked = [rng.integers(0, size, (num, num_each)) for size in positions]
        found = np.asarray(windows[(np.arange(num)[:, None], *picked)])
        return found.reshape(num * num_each, self.num_groups, -1).transpose(1, 0, 2)

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
        auto_pad = self._options.get("auto_pad", b"NOTSET")
        if auto_pad == b"SAME_UPPER":
            return [((span - 1) // 2, span // 2) for span in spans]
        if auto_pad == b"SAME_LOWER":
            return [(span // 2, (span - 1) // 2) for span in spans]
        pads = self._options.get("pads", [0] * 2 * len(spans))
        return list(zip(pads[: len(spans)], pads[len(spans) :], strict=True))


def layers_of(core: onnx.ModelProto) -> list[Layer]:
    """Layers with constant weights, in the graph's order."""
    constants = {tensor.name: tensor for tensor in core.graph.initializer}
    read = uses(core.graph)
    own = {name for name in constants if read[name] == 1}
    return [Layer(node, constants, own) for node in core.graph.node if _is_product(node, constants)]


def _is_product(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it multiplies what it gets with constant float32 weights, an output at a time."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or _attributes(node).get("transA"):
        return False
    if not is_plain(node, constants):
        return False
    source, weight = node.input[:2]
    if source in constants or weight not in constants:
        return False
    if constants[weight].data_type != constants[weight].FLOAT:
        return False
    return node.op_type == "Conv" or len(constants[weight].dims) == 2


def measured(
    core: onnx.ModelProto, layers: Sequence[Layer], feeds: Feeds
) -> Iterator[tuple[Layer, Moments]]:
    """Each layer with the moments of its inputs in the float graph, if these are finite.

    Args:
        core: Float graph.
        layers: Some of its layers.
        feeds: Calibration rows; gone through once for as many layers as fit `PASS_BYTES`.
    """
    for some in _passes(layers):
        sums = {layer.name: _Sums() for layer in some}
        sources = {layer.source for layer in some}
        asked = sorted(sources - {entry.name for entry in core.graph.input})
        session = open_session(with_outputs(core, asked))
        rng = np.random.default_rng(0)  # the same rows make the same engine
        for feed in _fitting(core, sources, feeds):
            found = session.run(asked, feed) if asked else []
            values = feed | dict(zip(asked, found, strict=True))
            num_rows = len(next(iter(feed.values())))
            for layer in some:
                samples = layer.samples(values[layer.source], num_rows, rng)
                with np.errstate(invalid="ignore"):  # masks are infinite
                    sums[layer.name].add(samples, with_products=layer.rounds_together)
        for layer in some:
            moments = sums.pop(layer.name).moments()
            if np.isfinite(moments.mean).all():
                yield layer, moments


class _Sums:
    def __init__(self) -> None:
        self._num_samples = 0
        self._first: Any = 0.0
        self._second: Any = None

    def add(self, samples: Array, *, with_products: bool) -> None:
        exact = samples.astype(np.float64)  # a time in seconds has a variance, too
        self._num_samples += exact.shape[1]
        self._first = self._first + exact.sum(axis=1)
        if with_products:
            products = exact.transpose(0, 2, 1) @ exact
            self._second = products if self._second is None else self._second + products

    def moments(self) -> Moments:
        num = self._num_samples
        second = None if self._second is None else self._second / num
        return Moments(num_samples=num, mean=self._first / num, second=second)


def _passes(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers in the graph's order, as many at a time as fit."""
    some: list[Layer] = []
    num_bytes = 0
    for layer in layers:
        size = layer.num_groups * layer.num_inputs**2 * 8 if layer.rounds_together else 0
        if some and num_bytes + size > PASS_BYTES:
            yield some
            some, num_bytes = [], 0
        some.append(layer)
        num_bytes += size
    if some:
        yield some


def _fitting(core: onnx.ModelProto, names: set[str], feeds: Feeds) -> Iterator[dict[str, Array]]:
    """The rows in batches for which tensors `names` fit `INPUT_BYTES`, if the graph takes any."""
    if fixed_batch(core):
        yield from feeds()
        return
    tensors = [entry for entry in core.graph.value_info if entry.name in names]
    shapes = [entry.type.tensor_type.shape.dim[1:] for entry in tensors]
    row_bytes = sum(4 * math.prod(dim.dim_value or 1 for dim in shape) for shape in shapes)
    most = max(1, INPUT_BYTES // max(1, row_bytes))
    for feed in feeds():
        num_rows = len(next(iter(feed.values())))
        for start in range(0, num_rows, most):
            yield {name: array[start : start + most] for name, array in feed.items()}


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
