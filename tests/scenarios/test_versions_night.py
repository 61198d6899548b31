"""A published date again, by the commands that a user has: --force, rollback, requeue, gc."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]
DATE = "2026-11-20"
NUM_ROWS, NUM_BAD = 40_000, 8


@pytest.fixture(params=["local", "object"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the output goes."""
    if request.param == "object":
        return f"{request.getfixturevalue('s3_folder')}/out"
    return str(tmp_path / "out")


@pytest.fixture
def command(
    score: Callable[..., Any], features_job: Path, place: str
) -> Callable[..., dict[str, Any]]:
    """Runs a command on the job, which must succeed; what it printed."""

    def run(name: str, *more: str, dated: bool = True) -> dict[str, Any]:
        date = ("--date", DATE) if dated else ()
        ended = score(name, features_job, *date, "--json", "--set", f"output.uri={place}", *more)
        assert ended.code == 0, ended.err
        result: dict[str, Any] = ended.json
        return result

    return run


def test_a_forced_run_is_a_new_version_which_can_be_taken_back(
    command: Callable[..., dict[str, Any]],
) -> None:
    first = command("run")
    forced = command("run", "--force")
    assert forced["status"] == "published"
    assert forced["run_id"] != first["run_id"]
    assert forced["shards_reused"] == 0
    assert command("verify")["run_id"] == forced["run_id"]
    assert command("run")["status"] == "already_published"
    (now,) = command("status", dated=False)["published"]
    assert (now["run_id"], now["version"]) == (forced["run_id"], 2)
    (kept,) = command("status", dated=False)["replaced"]
    assert kept["run_id"] == first["run_id"]
    back = command("rollback")
    assert (back["run_id"], back["version"]) == (first["run_id"], 3)
    assert command("verify")["run_id"] == first["run_id"]
    assert command("report")["run_id"] == first["run_id"]


def test_garbage_goes_and_the_published_date_stays(
    command: Callable[..., dict[str, Any]], place: str
) -> None:
    first = command("run")
    command("run", "--force")
    everything = ("--older-than-days", "0")
    assert command("gc", *everything, dated=False)["num_files"] == 0  # all may be in use
    if place.startswith("s3://"):
        return
    age_all(place)
    would = command("gc", *everything, "--dry-run", dated=False)
    assert set(would["by_reason"]) == {"ledgers of published runs"}
    assert command("gc", dated=False)["num_files"] == 0  # not for a week
    assert command("gc", *everything, dated=False)["num_files"] == would["num_files"]
    command("verify")
    assert command("rollback")["run_id"] == first["run_id"]
    age_all(place)
    command("gc", *everything, "--keep-versions", "0", dated=False)
    assert command("status", dated=False)["replaced"] == []
    assert command("verify")["rows"] == NUM_ROWS
    assert len(list(Path(place).glob("users/_history/*.parquet"))) == 3  # one for each version


def age_all(place: str) -> None:
    """As if everything had been written two hours ago."""
    for path in Path(place).rglob("*"):
        os.utime(path, (time.time() - 7_200,) * 2)


def test_what_a_run_at_work_needs_stays(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    tmp_path: Path,
) -> None:
    output = ("--json", "--set", f"output.uri={tmp_path / 'out'}")
    more = ("--date", DATE, *output, "--set", "lanes.shard_rows=100")
    running = start_score("run", features_job, *more)
    num_collections = 0
    while running.is_running():
        collected = score("gc", features_job, *output, "--older-than-days", "0", "--unfinished")
        assert collected.code == 0, collected.err
        assert collected.json["num_files"] == 0
        num_collections += 1
    assert running.end().code == 0
    assert num_collections >= 2
    assert score("verify", features_job, *more).code == 0


def test_requeued_rows_are_scored_and_the_other_shards_taken_over(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    output = f"output.uri={tmp_path / 'out'}"
    more = ("--date", DATE, "--json", "--set", output, "--set", "lanes.shard_rows=100")
    assert score("run", features_job, *more).code == 0
    before = sums(tmp_path / "out")
    again = score("requeue", features_job, *more)
    assert again.code == 0, again.err
    shards_with_bad_rows = again.json["shards"] - again.json["shards_reused"]
    assert 1 <= shards_with_bad_rows <= NUM_BAD
    assert again.json["quarantined"] == NUM_BAD  # they are still what they were
    scored = shards_with_bad_rows * 100
    assert again.json["rows_taken_over"] == NUM_ROWS - scored
    assert again.json["examples_per_sec"] == pytest.approx(scored / again.json["wall_s"])
    cost = again.json["cost"]
    assert cost["usd_per_100k"] == pytest.approx(cost["usd"] / scored * 100_000)
    assert again.json["rows_replayed"] == 0
    assert score("verify", features_job, *more).code == 0
    same = set(before.values()) & set(sums(tmp_path / "out").values())
    assert len(same) >= len(before) - 2 * shards_with_bad_rows


def test_a_date_without_quarantine_is_left_as_it_is_by_requeue(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    filled = ("--set", "input.features.fill_missing=0")
    more = ("--date", DATE, "--json", "--set", f"output.uri={tmp_path / 'out'}", *filled)
    first = score("run", features_job, *more)
    assert (first.code, first.json["quarantined"]) == (0, 0), first.err
    again = score("requeue", features_job, *more)
    assert again.code == 0, again.err
    assert "nothing is in quarantine: version 1 is left as it is" in again.err
    found = (again.json["status"], again.json["run_id"])
    assert found == ("already_published", first.json["run_id"])


def sums(output: Path) -> dict[str, str]:
    parts = (output / "users" / f"dt={DATE}").glob("part-*.parquet")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}


def test_a_reader_that_looks_all_the_time_sees_one_whole_version_or_the_other(
    score: Callable[..., Any], start_score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    more = ("--date", DATE, "--json", "--set", f"output.uri={tmp_path / 'out'}")
    assert score("run", features_job, *more).code == 0
    running = start_score("run", features_job, *more, "--force")
    num_looks = 0
    while running.is_running():
        folder = tmp_path / "out" / "users" / f"dt={DATE}"
        try:
            # As a dataset reader does: all names first, then all files.
            tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
        except FileNotFoundError:
            continue  # the folder was exchanged in between: an error, and not wrong rows
        if not tables:
            continue  # it was opened, and then emptied
        assert len(pa.concat_tables(tables)) == NUM_ROWS - NUM_BAD
        num_looks += 1
    assert running.end().code == 0
    assert num_looks > 3


def test_there_is_nothing_to_take_back_of_a_date_with_one_version(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    more = ("--date", DATE, "--set", f"output.uri={tmp_path / 'out'}")
    ended = score("rollback", features_job, *more)
    assert ended.code == 1
    assert "not published; expected a published date" in ended.err
    assert score("run", features_job, *more).code == 0
    ended = score("rollback", features_job, *more)
    assert ended.code == 1
    assert "there is only one version" in ended.err


def test_a_damaged_manifest_is_said_and_the_way_out_works(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    more = ("--date", DATE, "--json", "--set", f"output.uri={tmp_path}")
    assert score("run", features_job, *more).code == 0
    folder = tmp_path / "users" / f"dt={DATE}"
    (folder / "_MANIFEST.json").write_bytes(b"{")
    for command in ("run", "verify", "report"):
        ended = score(command, features_job, *more)
        assert (ended.code, ended.json["exit_code"]) == (1, 1), ended.err
        assert "damaged" in ended.json["error"]
        assert "Traceback" not in ended.err
    folder.rename(tmp_path / "away")
    again = score("run", features_job, *more)
    assert again.code == 0, again.err
    assert again.json["shards_reused"] == again.json["shards"]
    assert score("verify", features_job, *more).code == 0
