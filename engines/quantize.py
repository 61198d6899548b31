"""Static int8 quantisation: scales from real rows, explicit Q/DQ nodes in the graph."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from engines.bias_correction import correct_biases
from engines.model import ImageInput, ModelSpec
from engines.runner import Array

CALIBRATION_BATCH_ROWS = 32


def quantize_for_cpu(
    core: onnx.ModelProto, spec: ModelSpec, rows: Array, fixed_batch: int | None
) -> onnx.ModelProto:
    """The graph that CPU runtimes run as real int8: uint8 activations, int8 weights per channel.

    TensorRT wants another one (symmetric activations, float bias); see ARCHITECTURE.md.

    Args:
        core: Float graph, simplified.
        spec: The model's description.
        rows: Calibration rows in the engine's input dtype; min and max of every activation over
            them give the scales.
        fixed_batch: Batch that `core` is bound to, if any.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        corrected = correct_biases(core, _Rows(spec, core, rows, fixed_batch).feeds())
        onnx.save(corrected, source)
        quiet = logging.getLogger()
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # the quantiser advises what has been done already
        try:
            quantize_static(
                source,
                target,
                _Rows(spec, core, rows, fixed_batch),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            quiet.setLevel(level)
        return onnx.load(target)


def normalised(spec: ModelSpec, rows: Array) -> Array:
    """Rows as the model itself takes them; the same sums as in the graph."""
    if not isinstance(spec.input, ImageInput):
        return rows
    mean, std = (np.asarray(values, np.float32) for values in (spec.input.mean, spec.input.std))
    planes = (rows.astype(np.float32) - mean) / std
    return np.ascontiguousarray(planes.transpose(0, 3, 1, 2))


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    """Calibration rows in batches, as ONNX Runtime's quantiser asks for them."""

    def __init__(
        self, spec: ModelSpec, core: onnx.ModelProto, rows: Array, fixed_batch: int | None
    ) -> None:
        self._name = core.graph.input[0].name
        self._spec = spec
        self._rows = rows
        self._fixed_batch = fixed_batch
        self._left = self.feeds()

    def feeds(self) -> Iterator[dict[str, Any]]:
        """All batches, as the graph takes them."""
        batch_rows = self._fixed_batch or CALIBRATION_BATCH_ROWS
        for start in range(0, len(self._rows), batch_rows):
            batch = self._rows[start : start + batch_rows]
            if self._fixed_batch:  # rows from the front again: no row weighs much more than others
                batch = self._rows.take(range(start, start + batch_rows), axis=0, mode="wrap")
            yield {self._name: normalised(self._spec, batch)}

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)
