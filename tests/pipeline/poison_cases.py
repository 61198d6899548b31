"""Imported ahead by a lane's process: some rows then do it harm, as bugs in native code would."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import parent_process
from typing import Any

import pyarrow as pa

from pipeline.decode_features import FeatureDecoder
from pipeline.read import BlockReader
from pipeline.screen_images import ImageScreen

CRASH, HANG, EAT, SLOW = 1001.0, 1002.0, 1003.0, 1004.0
SLOW_S = 0.3
TORN = 10_000.0
"""Added to them in a row's second feature: reading the row group does the harm."""
"""Values of a row's first feature; an image ends with their ASCII digits."""


def harm(kind: float) -> None:
    """Crash, hang, take all memory, or take some time and no harm done."""
    if kind == CRASH:
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == HANG:
        time.sleep(600)
    if kind == SLOW:
        time.sleep(SLOW_S)
    if kind == EAT:
        eaten = []
        while True:
            eaten.append(b"x" * (64 << 20))
            time.sleep(0.01)


def _kind_of(image: bytes) -> float:
    tail = image[-6:]
    return float(tail) if tail in (b"1001.0", b"1002.0", b"1003.0") else 0.0


def _decode(self: FeatureDecoder, rows: pa.RecordBatch) -> Any:
    for value in rows.column(self.columns[0]).to_pylist():
        harm(value)
    return _decode_features(self, rows)


def _screen(self: ImageScreen, rows: pa.RecordBatch) -> Any:
    for image in rows.column(self._images.column).to_pylist():
        harm(_kind_of(image or b""))
    return _screen_images(self, rows)


def _batches(self: BlockReader, *args: Any) -> Any:
    for rows in _batches_of_groups(self, *args):
        if "f01" in rows.schema.names:
            for value in rows["f01"].to_pylist():
                harm(value - TORN)
        yield rows


_decode_features, _screen_images = FeatureDecoder.decode, ImageScreen.screen
_batches_of_groups = BlockReader._batches
if parent_process() is not None:  # tests, which import the values only, come to no harm
    FeatureDecoder.decode = _decode  # type: ignore[method-assign]
    ImageScreen.screen = _screen  # type: ignore[method-assign]
    BlockReader._batches = _batches  # type: ignore[method-assign]
