"""Publish a run: check that every row is accounted for, then one create-only manifest."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import Job
from pipeline.delta import update_table
from pipeline.errors import InputError, VerifyError
from pipeline.history import HistoryRow, record_night
from pipeline.ledger import CommitRecord, Ledger, PartFile, utc_now
from pipeline.plan import Plan
from pipeline.report import RunReport, report_from_dict
from pipeline.report_html import render_html
from pipeline.storage import Storage
from pipeline.versions import (
    REPORT_HTML,
    REPORT_JSON,
    Published,
    find_published,
    published_folder,
    replace,
    withdraw,
)

log = logging.getLogger(__name__)

MANIFEST_FORMAT = 1
QUARANTINE_FOLDER = "_quarantine"
"""Readers ignore names that begin with `_`, so that `dt=*/*.parquet` is one schema."""


def expect_published(output: Storage, job: str, date: str) -> Published:
    """The current version of a date.

    Raises:
        InputError: The date is not published.
    """
    published = find_published(output, job, date)
    if published is None:
        raise InputError(
            f"{output.uri}/{published_folder(job, date)}: not published; expected a finished run. "
            f"Run `score run JOB --date {date}` first."
        )
    return published


def read_report(output: Storage, job: str, date: str) -> RunReport:
    """The report of a published run, from its manifest.

    Raises:
        InputError: The date is not published.
    """
    return report_from_dict(expect_published(output, job, date).manifest["report"])


def find_report(output: Storage, job: str, date: str) -> RunReport | None:
    """The report beside a published run's parts, one small file; None also where it is damaged."""
    path = f"{published_folder(job, date)}/{REPORT_JSON}"
    data = output.read(path)
    try:
        return None if data is None else report_from_dict(json.loads(data))
    except (KeyError, TypeError, ValueError) as error:  # or of another version of this program
        log.warning("%s/%s: cannot be read (%s).", output.uri, path, error)
        return None


def check_complete(plan: Plan, records: Mapping[int, CommitRecord]) -> None:
    """Every shard committed, every row scored or quarantined; for the guards see guards.py.

    Raises:
        VerifyError: The sums do not agree.
    """
    missing = [shard.name for shard in plan.shards if shard.index not in records]
    if missing:
        raise VerifyError(
            f"{len(missing)} of {len(plan.shards)} shards have no commit record (first: "
            f"{missing[0]}); expected all. Run the same command again."
        )
    for shard in plan.shards:
        record = records[shard.index]
        accounted = record.num_scored + record.num_quarantined
        if (record.file, accounted) != (shard.file.path, shard.num_rows):
            raise VerifyError(
                f"shard {shard.name}: {accounted} rows of {record.file} in the ledger; expected "
                f"{shard.num_rows} of {shard.file.path}. Report this: it is a defect."
            )


def count_reasons(records: Mapping[int, CommitRecord]) -> dict[str, int]:
    """Quarantined rows by reason, most frequent first."""
    total: Counter[str] = Counter()
    for record in records.values():
        total.update(record.reasons)
    return dict(total.most_common())


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A version of a date, ready to be published."""

    manifest: dict[str, Any]
    files: dict[str, str]
    """Path in the published folder -> where the part is, below the output's root."""


def draft_of(
    job: Job, plan: Plan, ledger: Ledger, records: Mapping[int, CommitRecord], report: RunReport
) -> Draft:
    """What is published of a run that is complete."""
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": 1,
        "run_id": ledger.run_id,
        "job": job.name,
        "date": plan.date,
        "published_at": utc_now(),
        "rows": report.rows,
        "scored": report.scored,
        "quarantined": report.quarantined,
        "input": {
            "uri": job.input.uri,
            "files": [asdict(file) for file in plan.files],
            "unreadable": [asdict(file) for file in plan.unreadable],
            "columns_sha256": plan.columns_sha256,
        },
        "passthrough": list(job.input.passthrough),
        "parts": [_manifest_entry(records[shard.index]) for shard in plan.shards],
        "report": report.to_dict(),
    }
    files = {
        path: ledger.part_path(file)
        for record in records.values()
        for path, file in _published_files(record)
    }
    return Draft(manifest=manifest, files=files)


def publish(draft: Draft, output: Storage, replaces: Published | None = None) -> bool:
    """Make a run appear for readers, in the place of `replaces` where that is given.

    Returns:
        False when another run of the date was first.
    """
    manifest, files = draft.manifest, draft.files
    if replaces is not None:
        return replace(output, replaces, manifest, files) is not None
    folder = published_folder(manifest["job"], manifest["date"])
    # Without indentation: with it Python's slow encoder is used, for seconds in 100,000 shards.
    if output.publish(files, json.dumps(manifest).encode(), folder):
        return True
    withdraw(output, manifest["job"], manifest["date"], set(files))
    return False


def write_reports(output: Storage, report: RunReport, past: Sequence[HistoryRow] = ()) -> None:
    """`_report.json` and `_report.html` beside the parts; harmless when they are there already.

    Args:
        output: Of the job.
        report: Of the night.
        past: Nights before it, by date, for the page.
    """
    folder = published_folder(report.job, report.date)
    output.create(f"{folder}/{REPORT_JSON}", report.to_json().encode())
    output.create(f"{folder}/{REPORT_HTML}", render_html(report, past).encode())


def note_publication(
    job: Job, output: Storage, report: RunReport, *, version: int, published_at: str
) -> None:
    """Enter a published version into the history and the Delta table, unless it is there.

    Args:
        job: The job.
        output: Of it.
        report: Of the night.
        version: Of the date.
        published_at: ISO 8601, UTC.

    Raises:
        StorageError: The Delta table cannot be written; the date is published, and in the history.
    """
    record_night(output, report, version=version, published_at=published_at)
    update_table(job, output, report.date)


def _published_files(record: CommitRecord) -> list[tuple[str, PartFile]]:
    files = [(record.part.name, record.part)]
    if record.quarantine is not None:
        files.append((f"{QUARANTINE_FOLDER}/{record.quarantine.name}", record.quarantine))
    return files


def _manifest_entry(record: CommitRecord) -> dict[str, Any]:
    entry = asdict(record)
    for (path, _), key in zip(_published_files(record), ("part", "quarantine"), strict=False):
        entry[key]["path"] = path
    del entry["scores"]  # the report has their sum
    return entry
