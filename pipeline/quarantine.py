"""Read quarantine parts back, for the report: what was odd, with a few examples."""

from __future__ import annotations

import io
from collections.abc import Mapping

import polars as pl

from pipeline.ledger import CommitRecord, Ledger
from pipeline.report import QuarantineSample
from pipeline.storage import Storage

SAMPLES_PER_REASON = 2
MAX_PARTS_READ = 64
"""A night with thousands of bad shards needs no thousand downloads for a few examples."""


def read_samples(
    ledger: Ledger, records: Mapping[int, CommitRecord], output: Storage
) -> tuple[QuarantineSample, ...]:
    """A few quarantined rows of each reason, in order of reason, file and row."""
    files = [records[shard].quarantine for shard in sorted(records)]
    paths = [ledger.part_path(file) for file in files if file is not None][:MAX_PARTS_READ]
    if not paths:
        return ()
    parts = [pl.read_parquet(io.BytesIO(data)) for data in output.read_many(paths)]
    samples = (
        pl.concat(parts)
        .sort("reason", "file", "row")
        .group_by("reason", maintain_order=True)
        .head(SAMPLES_PER_REASON)
        .select("file", "row", "reason", "message")
    )
    return tuple(QuarantineSample(**row) for row in samples.iter_rows(named=True))
