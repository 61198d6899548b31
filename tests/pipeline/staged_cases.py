"""Imported ahead by a lane's process: decoder and engine are stages side by side, as on a GPU.

The decoder is slow where a row's first feature is `SLOW`. The device is lost to the process by a
row that has `BROKEN` there, and once by `UNLUCKY`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pipeline_cases import SumRunner

from engines.errors import CudaError
from engines.runner import Outputs
from pipeline import lane_child
from pipeline.blocks import Array
from pipeline.decode_features import FeatureDecoder
from pipeline.lane_messages import LaneSetup

SLOW, BROKEN, UNLUCKY = 1001.0, 1002.0, 1003.0
BLOCK_ROWS, SLOW_BLOCK_S = 20, 0.8
WAS_UNLUCKY = "TEST_LANE_WAS_UNLUCKY"
"""Names the file that says so."""


class Decoder(FeatureDecoder):
    def decode(self, rows: pa.RecordBatch) -> Any:
        time.sleep(SLOW_BLOCK_S * rows["f0"].to_pylist().count(SLOW) / BLOCK_ROWS)
        return super().decode(rows)


class Device(SumRunner):
    """One batch is a block, as on a GPU."""

    def __init__(self) -> None:
        super().__init__(BLOCK_ROWS)

    def infer(self, batches: Iterable[Array | None]) -> Iterator[Outputs]:
        def looked_at() -> Iterator[Array | None]:
            for batch in batches:
                if batch is not None:
                    _look_at(batch)
                yield batch

        return super().infer(looked_at())


def _look_at(batch: Array) -> None:
    flag = Path(os.environ[WAS_UNLUCKY])
    if np.any(batch[:, 0] == BROKEN) or (np.any(batch[:, 0] == UNLUCKY) and not flag.exists()):
        flag.touch()
        raise CudaError("CUDA, cudaEventSynchronize: cudaErrorIllegalAddress")


def _decoder(setup: LaneSetup) -> Decoder:
    assert setup.job.input.features is not None
    return Decoder(setup.job.input.features, setup.feature_columns, setup.num_features, BLOCK_ROWS)


if parent_process() is not None:
    lane_child.make_lane_decoder = _decoder
    lane_child.open_runner = lambda *_: Device()  # type: ignore[assignment]
