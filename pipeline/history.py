"""The history of a job: one row for each published version of a date, in a small file of its own.

    <output>/<job>/_history/<date>_v<version>_<run_id>.parquet

All files together are the history: `pl.read_parquet("<output>/<job>/_history/*.parquet")`. None is
ever rewritten, so nobody who writes can disturb anybody else, on a disk or in a bucket; and the
name of a file says which night it is about, so that a reader opens those that it needs.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.report import RunReport
from pipeline.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "_history"
NUM_NIGHTS = 13
"""That a report shows beside its own: two weeks."""
FILE_NAME = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)_v(?P<version>\d+)_(?P<run_id>[^/]+)\.parquet", re.ASCII
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryRow:
    """What is kept of a night to compare it with others. None: unknown, or not measured."""

    job: str
    date: str
    """ISO date that was scored."""
    run_id: str
    version: int
    """Of the date: 1, or more after `--force`, `requeue` and `rollback`."""
    status: str
    published_at: str
    """ISO 8601, UTC."""
    rows: int
    scored: int
    quarantined: int
    examples_per_sec: float
    """Rows that were scored for it / wall_s: everything included, engine build too."""
    wall_s: float
    """Of all attempts, from process start to publication."""
    scoring_s: float
    """Wall-clock seconds of scoring, of all attempts."""
    building_s: float
    """Wall-clock seconds of building the engine, of all attempts; 0 when it was in the store."""
    usd: float
    usd_per_100k: float
    usd_per_hour: float
    instance: str
    market: str
    """`on_demand`, `spot` or `own`."""
    currency: str
    price_as_of: str
    """ISO date on which the price was read."""
    num_lanes: int
    device: str
    bottleneck: str
    engine_key: str
    runtime: str
    precision: str
    model_fingerprint: str | None
    """None when no row was scored."""
    psi: float | None
    """Largest population stability index against the nights before; None without such nights."""
    psi_chance: float | None
    """What of `psi` chance explains."""
    drift_agreement: float | None
    """Of what was published with fp32."""
    interruptions: int
    rows_replayed: int
    joules_per_1000: float | None
    """Per 1,000 rows, by the meters that the report names."""
    degraded: bool
    """Whether rows are missing because a file is damaged."""
    shards: int
    shards_reused: int
    """Whose parts an earlier attempt, or the version before, had committed."""
    rows_taken_over: int = 0
    """Rows that `score requeue` left as the version before had scored them: in no rate or price."""
    machine_share: float = 1.0
    """Of the machine that it had, and paid: less where a backfill scored dates at once."""


_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
SCHEMA = pa.schema(
    (field.name, _TYPES[str(field.type).removesuffix(" | None")])
    for field in dataclasses.fields(HistoryRow)
)
"""Fixed, so that a night without a value has the same columns as all others."""


def row_of(report: RunReport, *, version: int, published_at: str) -> HistoryRow:
    """A night's row.

    Args:
        report: Of the night.
        version: Of the date.
        published_at: ISO 8601, UTC.
    """
    cost, engine, scores = report.cost, report.engine, report.distribution
    moved = max(scores.psi, key=lambda name: scores.psi[name], default=None) if scores else None
    return HistoryRow(
        job=report.job,
        date=report.date,
        run_id=report.run_id,
        version=version,
        status="published",
        published_at=published_at,
        rows=report.rows,
        scored=report.scored,
        quarantined=report.quarantined,
        examples_per_sec=report.examples_per_sec,
        wall_s=report.wall_s,
        scoring_s=report.scoring_s,
        building_s=report.building_s,
        usd=cost.usd,
        usd_per_100k=report.usd_per_100k,
        usd_per_hour=cost.price.usd_per_hour,
        instance=cost.price.instance,
        market=cost.price.market,
        currency=cost.price.currency,
        price_as_of=cost.price.as_of,
        num_lanes=report.num_lanes,
        device=report.device,
        bottleneck=report.bottleneck,
        engine_key=engine.key,
        runtime=engine.runtime,
        precision=engine.precision,
        model_fingerprint=scores.model if scores else None,
        psi=scores.psi[moved] if scores and moved else None,
        psi_chance=scores.chance[moved] if scores and moved else None,
        drift_agreement=report.drift.agreement if report.drift else None,
        interruptions=report.interruptions,
        rows_replayed=report.rows_replayed,
        joules_per_1000=report.joules_per_1000_rows,
        degraded=report.degraded,
        shards=report.shards,
        shards_reused=report.shards_reused,
        rows_taken_over=report.rows_taken_over,
        machine_share=cost.price.machine_share,
    )


def write_row(output: Storage, row: HistoryRow) -> bool:
    """Add a row to the history; False when it is there already.

    Raises:
        PipelineError: The store is full, broken or out of reach.
    """
    path = f"{row.job}/{FOLDER}/{row.date}_v{row.version}_{row.run_id}.parquet"
    if output.info(path) is not None:  # who only reads is not refused
        return False
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dataclasses.asdict(row)], SCHEMA), file)
    return output.create(path, file.getvalue())


def record_night(output: Storage, report: RunReport, *, version: int, published_at: str) -> None:
    """Add a published night to the history, unless it is there.

    The night is published whatever comes of this: what the store refuses is logged, and the next
    command that looks at the date writes it.

    Args:
        output: Of the job.
        report: Of the night.
        version: Of the date that was published.
        published_at: ISO 8601, UTC.
    """
    try:
        write_row(output, row_of(report, version=version, published_at=published_at))
    except (PipelineError, OSError) as error:
        log.warning("%s, %s: not written to the history (%s).", report.job, report.date, error)


def read_history(
    output: Storage, job_name: str, until: str | None = None, last: int | None = None
) -> tuple[HistoryRow, ...]:
    """The nights of a job by date, of each the version that is published.

    A file that cannot be read is left out, and logged.

    Args:
        output: Of the job.
        job_name: Its name.
        until: ISO date of the last night wanted; None: the newest.
        last: How many nights at most, the newest; None: all.

    Raises:
        PipelineError: The store is out of reach.
    """
    newest: dict[str, tuple[int, str]] = {}
    for info in output.list_files(f"{job_name}/{FOLDER}"):
        name = FILE_NAME.fullmatch(info.path.removeprefix(f"{job_name}/{FOLDER}/"))
        if name is not None and (until is None or name["date"] <= until):
            version = (int(name["version"]), info.path)
            newest[name["date"]] = max(version, newest.get(name["date"], version))
    dates = sorted(newest)
    if last is not None:
        dates = dates[max(len(dates) - last, 0) :]
    paths = [newest[date][1] for date in dates]
    read = zip(paths, output.read_many(paths), strict=True)
    rows = (_parse(f"{output.uri}/{path}", data) for path, data in read if data is not None)
    return tuple(row for row in rows if row is not None)


def nights_before(
    output: Storage, job_name: str, date: str, last: int = NUM_NIGHTS
) -> tuple[HistoryRow, ...]:
    """The last nights before a date; none, and a word in the log, where they cannot be read."""
    try:
        found = read_history(output, job_name, until=date, last=last + 1)
    except (PipelineError, OSError) as error:
        log.warning("%s: its history cannot be read (%s).", job_name, error)
        return ()
    return tuple(row for row in found if row.date < date)[-last:]


def _parse(where: str, data: bytes) -> HistoryRow | None:
    """Columns that this program does not know are left out, newer ones have their defaults."""
    try:
        (found,) = pq.read_table(io.BytesIO(data)).to_pylist()
        known: dict[str, Any] = {name: found[name] for name in SCHEMA.names if name in found}
        return HistoryRow(**known)
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        log.warning("%s: left out of the history (%s: %s).", where, type(error).__name__, error)
        return None
