"""Calibration: one look at real rows gives a range for every tensor, whatever is made of it.

The ranges are the scale table. From one table come the symmetric graph for TensorRT and the one
with uint8 activations for CPU runtimes (engines/quantize.py), so that both round alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from engines.errors import ModelError
from engines.export import fixed_batch
from engines.model import ImageInput, ModelSpec
from engines.probing import open_session, with_outputs, with_reductions
from engines.runner import Array
from engines.tensor_uses import inputs_of

if TYPE_CHECKING:
    import onnx

Method = Literal["max", "percentile", "entropy"]
Feeds = Callable[[], Iterable[dict[str, Array]]]
"""Calibration rows in batches as the graph takes them; may be asked for several times."""

BATCH_ROWS = 16
"""All tensors of a batch are in memory at once for histograms: 27 MB a row for
EfficientNet-Lite0."""
PERCENTILE = 99.99
"""Share of a tensor's values, by magnitude, that its range keeps."""
NUM_BINS = 2048
NUM_LEVELS = 128
"""Of int8 on one side of zero."""
SAMPLE_VALUES = 65_536
"""Values of a tensor taken from a batch for its histogram, evenly spread: 32 batches of them put
210 values beyond the 99.99th percentile, and all values would take half a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleTable:
    """Ranges of a graph's float tensors over the calibration rows."""

    method: Method
    num_rows: int
    ranges: Mapping[str, tuple[float, float]]
    """Tensor -> lowest and highest value that its scale covers."""

    def to_json(self) -> bytes:
        """UTF-8 JSON, one line a tensor."""
        rows = ",\n".join(
            f"  {json.dumps(name)}: [{low!r}, {high!r}]"
            for name, (low, high) in self.ranges.items()
        )
        head = f'"method": "{self.method}", "num_rows": {self.num_rows}'
        return f'{{{head}, "ranges": {{\n{rows}\n}}}}\n'.encode()


def feeds_of(core: onnx.ModelProto, spec: ModelSpec, rows: Array) -> Feeds:
    """Rows in the engine's input dtype, in batches as the float graph takes them."""
    name = inputs_of(core.graph)[0].name
    bound = fixed_batch(core)

    def feeds() -> Iterator[dict[str, Array]]:
        num_rows = bound or BATCH_ROWS
        for start in range(0, len(rows), num_rows):
            batch = rows[start : start + num_rows]
            if bound:  # rows from the front again: no row weighs much more than others
                batch = rows.take(range(start, start + num_rows), axis=0, mode="wrap")
            yield {name: normalised(spec, batch)}

    return feeds


def normalised(spec: ModelSpec, rows: Array) -> Array:
    """Rows as the model itself takes them."""
    if not isinstance(spec.input, ImageInput):
        return rows
    mean, std = (np.asarray(values, np.float32) for values in (spec.input.mean, spec.input.std))
    planes = (rows.astype(np.float32) - mean) / std
    return np.ascontiguousarray(planes.transpose(0, 3, 1, 2))


def calibrate(core: onnx.ModelProto, feeds: Feeds, method: Method) -> ScaleTable:
    """Measure the ranges of all float activations.

    Args:
        core: Float graph with shapes inferred.
        feeds: Calibration rows.
        method: `max` covers all values seen. `percentile` leaves out the largest 0.01 % by
            magnitude. `entropy` clips where the clipped and rounded distribution is nearest to
            the real one.

    Returns:
        No range for a tensor with infinite values, such as scores behind a mask, if the answers
        are finite nevertheless.

    Raises:
        ModelError: A tensor is NaN on the calibration rows, or the answers are not finite.
    """
    num_rows, extremes = _extremes(core, activations(core), feeds)
    ranges = extremes
    if method != "max":
        largest = np.array([max(-low, high) for low, high in extremes.values()])
        histograms = _histograms(core, list(extremes), largest, feeds)
        pick = percentile_bin if method == "percentile" else entropy_bin
        limits = [
            (pick(histogram) + 1) / NUM_BINS * top
            for histogram, top in zip(histograms, largest, strict=True)
        ]
        ranges = {
            name: (float(max(low, -limit)), float(min(high, limit)))
            for (name, (low, high)), limit in zip(extremes.items(), limits, strict=True)
        }
    return ScaleTable(method=method, num_rows=num_rows, ranges=ranges)


def activations(core: onnx.ModelProto) -> list[str]:
    """Float tensors that nodes make, and the graph's input: those that have a range if finite."""
    constants = {tensor.name for tensor in core.graph.initializer}
    entries = (*core.graph.input, *core.graph.value_info, *core.graph.output)
    floats = {entry.name for entry in entries if entry.type.tensor_type.elem_type == 1}
    made = [name for node in core.graph.node for name in node.output]
    inputs = [entry.name for entry in core.graph.input]
    return [name for name in (*inputs, *made) if name in floats and name not in constants]


def _extremes(
    core: onnx.ModelProto, tensors: Sequence[str], feeds: Feeds
) -> tuple[int, dict[str, tuple[float, float]]]:
    """Number of rows, and lowest and highest value of each tensor that is finite."""
    wanted = [(kind, name) for kind in ("ReduceMin", "ReduceMax") for name in tensors]
    probed, names = with_reductions(core, wanted)
    session = open_session(probed)
    num_rows, low, high = 0, np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    for feed in feeds():
        values = np.array(session.run(names, feed), np.float64)
        low = np.minimum(low, values[: len(tensors)])
        high = np.maximum(high, values[len(tensors) :])
        num_rows += len(next(iter(feed.values())))
    extremes = dict(zip(tensors, zip(low.tolist(), high.tolist(), strict=True), strict=True))
    infinite = [name for name, both in extremes.items() if not np.isfinite(both).all()]
    wrong = [name for name in infinite if np.isnan(extremes[name]).any()]
    answer = core.graph.output[0].name
    # Classes may be masked: -inf.
    if not wrong and answer in infinite and not math.isfinite(extremes[answer][1]):
        wrong = infinite
    if wrong:
        bottom, top = extremes[wrong[0]]
        raise ModelError(
            f"tensor {wrong[0]}: {bottom} to {top} on the calibration rows; expected finite "
            "values. Look at the model and the rows."
        )
    return num_rows, {name: both for name, both in extremes.items() if name not in infinite}


def _histograms(
    core: onnx.ModelProto, tensors: Sequence[str], largest: npt.NDArray[np.float64], feeds: Feeds
) -> npt.NDArray[np.int64]:
    """Histograms [tensor, bin] of magnitudes, each from 0 to the tensor's largest."""
    session = open_session(with_outputs(core, tensors))
    histograms = np.zeros((len(tensors), NUM_BINS), np.int64)
    for feed in feeds():
        for position, values in enumerate(session.run(tensors, feed)):
            flat = values.reshape(-1)
            sample = np.abs(flat[:: _stride(flat.size)])
            factor = np.float32(NUM_BINS / (largest[position] or 1.0))
            bins = np.minimum((sample * factor).astype(np.int32), NUM_BINS - 1)
            histograms[position] += np.bincount(bins, minlength=NUM_BINS)
    return histograms


def _stride(size: int) -> int:
    """Distance between samples; coprime to `size`, or some columns and rows are never seen."""
    stride = max(1, size // SAMPLE_VALUES)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


def percentile_bin(histogram: npt.NDArray[np.int64]) -> int:
    """The last bin that is kept when the largest 0.01 % of the values are clipped."""
    shares = np.cumsum(histogram) / max(1, histogram.sum())
    return int(np.searchsorted(shares, PERCENTILE / 100))


def entropy_bin(histogram: npt.NDArray[np.int64]) -> int:
    """The last bin to keep so that int8 levels lose the least information.

    For every cut from 128 bins on, the values beyond are added to the last bin kept, and the
    distribution is compared with itself rounded to 128 levels, by Kullback-Leibler divergence.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017; details, such as which of equally
    good cuts, as in NVIDIA's pytorch-quantization (`_compute_amax_entropy`).
    """
    counts = histogram.astype(np.float64)
    counts[0] = counts[1]  # exact zeros (after Relu) cost nothing at any scale
    beyond = counts.sum() - np.cumsum(counts)
    divergences = [
        _divergence(counts[:num_bins], beyond[num_bins - 1])
        for num_bins in range(NUM_LEVELS, NUM_BINS + 1)
    ]
    widest = len(divergences) - 1 - int(np.argmin(divergences[::-1]))  # of equally good ones
    return NUM_LEVELS - 1 + widest


def _divergence(kept: npt.NDArray[np.float64], beyond: float) -> float:
    starts = -(-np.arange(NUM_LEVELS) * len(kept) // NUM_LEVELS)
    sums = np.add.reduceat(kept, starts)
    filled = np.add.reduceat((kept > 0).astype(np.float64), starts)
    level = np.repeat(sums / np.maximum(filled, 1), np.diff([*starts, len(kept)]))
    rounded = np.where(kept > 0, level, 0.0)
    clipped = kept.copy()
    clipped[-1] += beyond
    total, rounded_total = clipped.sum(), rounded.sum()
    if total == 0 or rounded_total == 0:
        return np.inf
    seen = clipped > 0
    if (rounded[seen] == 0).any():  # the last bin, when nothing but what was clipped lies there
        return np.inf
    p, q = clipped[seen] / total, rounded[seen] / rounded_total
    return float(np.sum(p * np.log(p / q)))
