"""The fingerprint of a row, by which it is found again in quarantine."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from pipeline.image_column import encoded_images, holds_images


def digest_of(row: pa.RecordBatch) -> str:
    """sha256 of the encoded image, or of the features' bytes; empty for a null.

    Args:
        row: One row of the columns that the decoder takes.
    """
    columns = [encoded_images(c) if holds_images(c.type) else c for c in row.columns]
    values = [column[0].as_py() for column in columns]
    if any(value is None for value in values):
        return ""
    if isinstance(values[0], bytes):
        return hashlib.sha256(values[0]).hexdigest()
    return hashlib.sha256(np.asarray(values, np.float32).tobytes()).hexdigest()
