"""Nights of the features job: the command, what to wait for, and what must come of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATE = "2026-11-20"
NUM_ROWS, NUM_BAD = 40_000, 8
SMALL_SHARDS = ("--set", "lanes.shard_rows=100")
NUM_SMALL_SHARDS = 400
SHARDS = ("--set", "lanes.shard_rows=1000")
NUM_SHARDS = 40
RESUMABLE = 75
RUNS = "users/_runs"
PUBLISHED = f"users/dt={DATE}"


def night(job: Path, output: Path | str, *more: str, date: str = DATE) -> tuple[str, ...]:
    """Arguments of `score` that run one date of a job into `output`."""
    return ("run", str(job), "--date", date, "--json", "--set", f"output.uri={output}", *more)


def commits(output: Path) -> list[Path]:
    """Commit records, those of all runs; not those that are being written."""
    return list(output.glob(f"{RUNS}/*/commits/[!.]*.json"))


def wait_until(condition: Callable[[], object], command: Any, timeout_s: float = 100.0) -> None:
    """Until the condition holds; the command must not end before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert command.is_running(), command.end().err
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def wait_for_commits(command: Any, output: Path, count: int = 1) -> None:
    """Until the command has committed so many shards."""
    wait_until(lambda: len(commits(output)) >= count, command)


def scores_of(tables: Iterable[pa.Table]) -> dict[int, float]:
    """By user; none may come twice."""
    table = pa.concat_tables(tables)
    ids = table["user_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, table["score"].to_pylist(), strict=True))


def scores_in(output: Path, job: str = "users", date: str = DATE) -> dict[int, float]:
    """What readers of a published date on a disk see."""
    return scores_of(pq.read_table(path) for path in output.glob(f"{job}/dt={date}/*.parquet"))


def rows_scored(report: dict[str, Any]) -> int:
    """Rows that the last attempt wrote itself."""
    return int(report["stages"].get("write", {"items": 0})["items"])


def check_resumed(ended: Any, num_committed: int, num_shards: int) -> None:
    """It published, and scored what was not committed before: all of it, nothing else."""
    assert ended.code == 0, ended.err
    report = ended.json
    assert (report["status"], report["shards"]) == ("published", num_shards)
    assert report["scored"] == NUM_ROWS - NUM_BAD
    assert report["shards_reused"] == num_committed
    assert rows_scored(report) == (num_shards - num_committed) * NUM_ROWS // num_shards


def check_stopped(ended: Any, said: str) -> None:
    """Exit 75, in one sentence that says what to do."""
    assert ended.code == RESUMABLE, ended.err
    assert (ended.json["status"], ended.json["exit_code"]) == ("interrupted", RESUMABLE)
    assert said in ended.json["error"]
    assert "the same command goes on" in ended.json["error"]
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("interrupted: ")
