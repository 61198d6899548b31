"""Measure what a shard costs besides being scored: plan, ledger and publication up to 10^5 shards.

    python benchmarks/plan_scaling.py [--shards 100 1000 10000 100000] [--folder URI] [--columns 33]

The dataset is one small Parquet file under many names: only footers are read. All other times are
those of the pipeline's own functions. A commit makes two files durable, so only `NUM_COMMITS` are
made by the ledger, the last of each size; the records before them are written without a flush.
Writes a Markdown table to standard output. `--folder s3://bucket/prefix` measures an object store.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import resource
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Job
from pipeline.ledger import Attempt, CommitRecord, Ledger, PartFile, utc_now
from pipeline.part import ShardParts
from pipeline.plan import Plan, Shard, make_plan, run_id_of
from pipeline.publish import check_complete, draft_of, publish
from pipeline.report import RunReport
from pipeline.storage import Storage, open_storage

DATE = "2026-11-21"
SHARDS_PER_FILE = 100
NUM_COMMITS = 100
PART = ShardParts(part=b"part", quarantine=None, num_scored=1, num_quarantined=0, reasons={})

Measures = dict[str, float]


@contextmanager
def timed(measures: Measures, name: str) -> Iterator[None]:
    """Seconds of the block, under `name`."""
    began = time.perf_counter()
    yield
    measures[name] = time.perf_counter() - began


def make_input(folder: Path, num_shards: int, num_columns: int) -> None:
    """A dataset of row groups of one row, and of `num_columns` columns."""
    partition = folder / f"dt={DATE}"
    partition.mkdir(parents=True)
    names = ["user_id", *(f"f{number:02d}" for number in range(num_columns - 1))]
    table = pa.table({name: np.arange(SHARDS_PER_FILE, dtype=np.float32) for name in names})
    first = partition / "users-00000.parquet"
    pq.write_table(table, first, row_group_size=1)
    for number in range(1, num_shards // SHARDS_PER_FILE):
        (partition / f"users-{number:05d}.parquet").hardlink_to(first)


def make_job(source: Path, output: str) -> Job:
    """A features job with one row group a shard."""
    return Job.model_validate(
        {
            "name": "scaling",
            "input": {
                "uri": str(source),
                "passthrough": ["user_id"],
                "features": {"columns": ["f*"]},
            },
            "model": {"source": "none.onnx", "head": "scores"},
            "output": {"uri": output},
            "lanes": {"shard_rows": 1},
            "cost": {"instance": "none"},
        }
    )


def fill(output: Storage, ledger: Ledger, shards: Sequence[Shard]) -> None:
    """Parts and records of `shards`, as the ledger writes them, but not flushed to the disk."""
    root = Path(output.uri)
    for folder in ("parts", "commits"):
        (root / ledger.folder / folder).mkdir(parents=True, exist_ok=True)
    for shard in shards:
        name = f"part-{shard.name}-{uuid.uuid4().hex[:12]}.parquet"
        part = PartFile(name=name, num_bytes=4, sha256="0" * 64, num_rows=1)
        record = CommitRecord(
            shard=shard.index,
            file=shard.file.path,
            row_groups=shard.row_groups,
            first_row=shard.first_row,
            num_rows=1,
            num_scored=1,
            num_quarantined=0,
            reasons={},
            part=part,
            quarantine=None,
            owner="filler",
            committed_at=utc_now(),
        )
        (root / ledger.part_path(part)).write_bytes(b"part")
        (root / ledger.folder / "commits" / f"{shard.name}.json").write_bytes(record.to_json())


def measure(num_shards: int, folder: str | None, num_columns: int) -> Measures:
    """Seconds and bytes of every step for one number of shards."""
    found: Measures = {"shards": num_shards}
    with tempfile.TemporaryDirectory(dir=None if _remote(folder) else folder) as scratch:
        source = Path(scratch, "in")
        make_input(source, num_shards, num_columns)
        where = f"{folder}/{uuid.uuid4().hex}" if _remote(folder) else str(Path(scratch, "out"))
        job, output = make_job(source, where), open_storage(where)
        with timed(found, "plan_s"):
            plan = make_plan(job, DATE, open_storage(str(source)))
        assert len(plan.shards) == num_shards
        with timed(found, "run_id_s"):
            run_id = run_id_of(plan, job, "engine")
        ledger = Ledger(output, job.name, run_id)
        _measure_ledger(found, plan, ledger, output)
        _measure_publication(found, plan, ledger, output, job)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def _remote(folder: str | None) -> bool:
    return folder is not None and "://" in folder


def _measure_ledger(found: Measures, plan: Plan, ledger: Ledger, output: Storage) -> None:
    files = [dataclasses.asdict(file) for file in plan.files]
    attempt = Attempt(id="first", started_at=utc_now(), host="here", pid=1)
    with timed(found, "open_s"):
        ledger.open({"run_id": ledger.run_id, "files": files}, attempt)
    num_filled = 0 if _remote(output.uri) else max(0, len(plan.shards) - NUM_COMMITS)
    fill(output, ledger, plan.shards[:num_filled])
    with timed(found, "commit_s"):
        for shard in plan.shards[num_filled:]:
            ledger.commit(shard, PART, "owner")
    found["commit_s"] /= len(plan.shards) - num_filled
    with timed(found, "records_s"):
        records = ledger.records()
    assert len(records) == len(plan.shards)
    found["record_bytes"] = sum(len(record.to_json()) for record in records.values()) / len(records)


def _measure_publication(
    found: Measures, plan: Plan, ledger: Ledger, output: Storage, job: Job
) -> None:
    records = ledger.records()
    with timed(found, "check_s"):
        check_complete(plan, records)
    with timed(found, "publish_s"):
        assert publish(draft_of(job, plan, ledger, records, _report(plan)), output)
    manifest = output.info(f"{job.name}/dt={DATE}/_MANIFEST.json")
    assert manifest is not None
    found["manifest_bytes"] = manifest.num_bytes / len(records)


def _report(plan: Plan) -> RunReport:
    """The little of a report that publication reads: its size does not grow with the shards."""
    fields: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(RunReport))
    counts = {"rows": plan.num_rows, "scored": plan.num_rows, "quarantined": 0}
    return RunReport(**fields | counts)


def table(rows: Sequence[Measures], num_columns: int) -> str:
    """A Markdown table; the last columns are per shard, of the largest size too."""
    lines = [
        f"{datetime.date.today()}, {SHARDS_PER_FILE} shards a file, {num_columns} columns",
        "",
        "| shards | plan s | run id s | open s | commit ms | read ledger s | check s | publish s "
        "| bytes a record | manifest bytes a shard | plan + ledger x 2 + publish, ms a shard "
        "| peak MiB |",
        "|--:" * 12 + "|",
    ]
    for row in rows:
        total_s = row["plan_s"] + row["run_id_s"] + row["open_s"] + 2 * row["records_s"]
        total_s += row["check_s"] + row["publish_s"]
        lines.append(
            f"| {row['shards']:,.0f} | {row['plan_s']:.2f} | {row['run_id_s']:.2f} "
            f"| {row['open_s']:.2f} | {row['commit_s'] * 1e3:.2f} | {row['records_s']:.2f} "
            f"| {row['check_s']:.2f} | {row['publish_s']:.2f} | {row['record_bytes']:,.0f} "
            f"| {row['manifest_bytes']:,.0f} | {total_s / row['shards'] * 1e3:.3f} "
            f"| {row['peak_mib']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--folder", help="where input and output are made; removed afterwards")
    parser.add_argument("--columns", type=int, default=33)
    args = parser.parse_args()
    rows = [measure(count, args.folder, args.columns) for count in sorted(args.shards)]
    sys.stdout.write(table(rows, args.columns) + "\n")


if __name__ == "__main__":
    main()
