"""Nights of the features job over storage that fails: their command, and what must come of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATE = "2026-11-20"
NUM_ROWS, NUM_BAD, NUM_SHARDS = 40_000, 8, 40
RESUMABLE = 75
SHARDS = ("--set", "lanes.shard_rows=1000")
RUNS = "users/_runs"
PUBLISHED = f"users/dt={DATE}"


def night(job: Path, output: Path | str, *more: str) -> tuple[str, ...]:
    uri = ("--set", f"output.uri={output}")
    return ("run", str(job), "--date", DATE, "--json", *uri, *SHARDS, *more)


def scores_of(tables: Iterator[pa.Table]) -> dict[int, float]:
    table = pa.concat_tables(tables)
    ids = table["user_id"].to_pylist()
    assert len(set(ids)) == len(ids) == NUM_ROWS - NUM_BAD
    return dict(zip(ids, table["score"].to_pylist(), strict=True))


def scores_on_disk(output: Path) -> dict[int, float]:
    return scores_of(pq.read_table(part) for part in (output / PUBLISHED).glob("*.parquet"))


def check_whole(ended: Any, num_committed: int) -> None:
    assert ended.code == 0, ended.err
    report = ended.json
    assert (report["status"], report["shards"]) == ("published", NUM_SHARDS)
    assert report["scored"] == NUM_ROWS - NUM_BAD
    assert report["shards_reused"] == num_committed
    todo = NUM_SHARDS - num_committed
    assert report["stages"].get("write", {"items": 0})["items"] == todo * 1_000


def check_stopped(ended: Any, said: str) -> None:
    assert ended.code == RESUMABLE, ended.err
    assert (ended.json["status"], ended.json["exit_code"]) == ("interrupted", RESUMABLE)
    assert said in ended.json["error"]
    assert "the same command goes on" in ended.json["error"]
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("interrupted: ")
