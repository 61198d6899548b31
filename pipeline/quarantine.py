"""Read quarantine parts back, for the report: what was odd, with a few examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import one_line
from pipeline.ledger import CommitRecord, Ledger
from pipeline.part import QUARANTINE_SCHEMA
from pipeline.report import QuarantineSample
from pipeline.storage import Storage

log = logging.getLogger(__name__)

SAMPLES_PER_REASON = 2
SHOWN = ["file", "row", "reason", "message", "num_rows"]
BY_PLACE = [("file", "ascending"), ("row", "ascending")]
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
    import pyarrow.compute as pc  # 0.06 s, which most nights do not need

    tables = [_read(path, data) for path, data in zip(paths, output.read_many(paths), strict=True)]
    rows = pa.concat_tables(tables)
    samples: list[QuarantineSample] = []
    for reason in sorted(rows["reason"].unique().to_pylist()):
        of_reason = rows.filter(pc.field("reason") == reason).sort_by(BY_PLACE)
        chosen = of_reason.slice(0, SAMPLES_PER_REASON).to_pylist()
        samples.extend(QuarantineSample(**row) for row in chosen)
    return tuple(samples)


def _read(path: str, data: bytes | None) -> pa.Table:
    """Rows of a quarantine part; none of a damaged one, for which no report should fail."""
    try:
        return pq.read_table(pa.BufferReader(data or b""), page_checksum_verification=True).select(
            SHOWN
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        log.warning("%s: %s; the report gives no examples of its rows.", path, one_line(error))
        return QUARANTINE_SCHEMA.empty_table().select(SHOWN)
