"""Assemble numeric feature columns into the engine's input, without a loop over rows."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from pipeline.block_size import BLOCK_ROWS
from pipeline.blocks import Array, BadRow, Decoder
from pipeline.config import FeaturesInput


class FeatureDecoder(Decoder):
    """Numeric columns, or one column of fixed-size lists -> float32 [rows, features].

    A row with a null or a NaN is bad unless the job gives a value to fill in; infinity is always
    bad. Bad rows hold zeros.
    """

    def __init__(
        self,
        features: FeaturesInput,
        columns: tuple[str, ...],
        num_features: int,
        block_rows: int = BLOCK_ROWS["features"],
    ) -> None:
        self.columns = columns
        self.block_rows = block_rows
        self._fill = features.fill_missing
        self._num_features = num_features
        self._last_schema: tuple[pa.Schema | None, bool] = None, False

    def __enter__(self) -> FeatureDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def decode(self, rows: pa.RecordBatch) -> tuple[Array, dict[int, BadRow]]:
        """Assemble at most `block_rows` rows; see `pipeline.blocks.Decoder`."""
        with np.errstate(over="ignore", invalid="ignore"):  # infinite values are found below
            matrix = self._assemble(rows)
            total = matrix.sum()
        if np.isfinite(total):  # one pass; an overflow only costs a look
            return matrix, {}
        if self._fill is not None:
            matrix[np.isnan(matrix)] = self._fill
        bad_rows: dict[int, BadRow] = {}
        infinite = "infinite" if self._are_float32(rows.schema) else "infinite, or beyond float32"
        for row in np.flatnonzero(~np.isfinite(matrix).all(axis=1)).tolist():
            feature = int(np.flatnonzero(~np.isfinite(matrix[row]))[0])
            missing = bool(np.isnan(matrix[row, feature]))
            bad_rows[row] = BadRow(
                stage="decode",
                reason="feature_missing" if missing else "feature_infinite",
                message=f"{self._name(feature)} is {'null or NaN' if missing else infinite}",
                sha256=hashlib.sha256(matrix[row].tobytes()).hexdigest(),
            )
        matrix[list(bad_rows)] = 0
        return matrix, bad_rows

    def _assemble(self, rows: pa.RecordBatch) -> Array:
        """A matrix of our own that may be written to."""
        if self._are_float32(rows.schema):
            # Arrow interleaves columns twice as fast as assignments to strided columns do.
            columns = rows.select(list(self.columns))
            interleaved = columns.to_tensor(null_to_nan=True, row_major=True)
            return np.asarray(interleaved.to_numpy())
        first = rows.column(self.columns[0])
        matrix = np.empty((rows.num_rows, self._num_features), np.float32)
        if pa.types.is_fixed_size_list(first.type):
            # `flatten` leaves null lists out, so they are put in as rows of NaN.
            values = _numbers(first.flatten())
            valid = first.is_valid().to_numpy(zero_copy_only=False)
            matrix[valid] = values.reshape(-1, self._num_features)
            matrix[~valid] = np.nan
        else:
            for position, name in enumerate(self.columns):
                matrix[:, position] = _numbers(rows.column(name))
        return matrix

    def _are_float32(self, schema: pa.Schema) -> bool:
        """Whether all columns are; looked at once for all batches of a file."""
        seen, answer = self._last_schema
        if seen is None or not schema.equals(seen):
            types = [schema.field(name).type for name in self.columns]
            answer = all(pa.types.is_float32(each) for each in types)
            self._last_schema = schema, answer
        return answer

    def _name(self, feature: int) -> str:
        if len(self.columns) == 1:
            return f"{self.columns[0]}[{feature}]"
        return self.columns[feature]


def _numbers(column: pa.Array) -> Array:
    """NaN for nulls; a column without any value may be of the type null."""
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan, np.float32)
    return np.asarray(column.to_numpy(zero_copy_only=False))
