"""Whole nights of feature rows: undisturbed, killed, interrupted, in a bucket."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.scenarios.features_nights import (
    DATE,
    NUM_BAD,
    NUM_ROWS,
    NUM_SMALL_SHARDS,
    PUBLISHED,
    RESUMABLE,
    SMALL_SHARDS,
    check_resumed,
    commits,
    night,
    scores_in,
    wait_for_commits,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]


def published(output: Path | str) -> Path:
    return Path(output) / PUBLISHED


def quarantined_in(output: Path) -> set[tuple[str, int, str]]:
    tables = [pq.read_table(path) for path in published(output).glob("_quarantine/*.parquet")]
    rows = pa.concat_tables(tables).to_pylist()
    assert len(rows) == NUM_BAD
    return {(row["file"], row["row"], row["reason"]) for row in rows}


def check_same(output: Path, undisturbed: Path) -> None:
    assert scores_in(output) == scores_in(undisturbed)
    assert quarantined_in(output) == quarantined_in(undisturbed)


def test_a_night_killed_in_the_middle_is_finished_by_the_same_command(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "killed"
    command = night(features_job, output, *SMALL_SHARDS)
    num_kills = 0
    for num_more in (1, 40, 80):
        num_before = len(commits(output))
        running = start_score(*command)
        wait_for_commits(running, output, num_before + num_more)
        running.kill_group()
        assert running.end().code == -signal.SIGKILL
        assert not running.lingering()
        assert not published(output).exists()
        num_kills += 1
    num_committed = len(commits(output))
    ended = score(*command)
    check_resumed(ended, num_committed, NUM_SMALL_SHARDS)
    check_same(output, undisturbed)
    assert ended.json["attempts"] == num_kills + 1
    verdict = score("verify", *command[1:])
    assert verdict.code == 0, verdict.err
    assert verdict.json["rows"] == NUM_ROWS


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        pytest.param(signal.SIGTERM, False, id="as-a-container-does"),
        pytest.param(signal.SIGTERM, True, id="as-systemd-does"),
        pytest.param(signal.SIGINT, True, id="as-a-terminal-does"),
    ],
)
def test_an_interrupted_night_says_so_leaves_nothing_running_and_resumes(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    undisturbed: Path,
    tmp_path: Path,
    number: signal.Signals,
    whole_group: bool,
) -> None:
    output = tmp_path / "interrupted"
    command = night(features_job, output, *SMALL_SHARDS)
    running = start_score(*command)
    wait_for_commits(running, output, 5)
    started = time.monotonic()
    if whole_group:
        running.kill_group(number)
    else:
        running.signal(number)
    ended = running.end(30)
    assert time.monotonic() - started < 20  # a spot instance has 120 s, a container 30
    assert ended.code == RESUMABLE, ended.err
    assert ended.json["status"] == "interrupted"
    assert ended.json["exit_code"] == RESUMABLE
    assert number.name in ended.json["error"]
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("interrupted: ")
    assert not running.lingering()
    assert not published(output).exists()
    num_committed = len(commits(output))
    check_resumed(score(*command), num_committed, NUM_SMALL_SHARDS)
    check_same(output, undisturbed)


def test_an_interruption_before_the_first_shard_is_clean_too(
    start_score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    """While engines are built, calibrated and loaded, a signal must end everything as well."""
    for pause_s in (1.5, 3.0):
        running = start_score(
            *night(features_job, tmp_path / "out", "--set", f"engine.store={tmp_path / 'engines'}")
        )
        time.sleep(pause_s)
        running.signal(signal.SIGTERM)
        ended = running.end(30)
        # Before the handlers are there the signal just ends the process.
        assert ended.code in (RESUMABLE, -signal.SIGTERM), ended.err
        assert "Traceback" not in ended.err
        assert not running.lingering()


def test_a_night_in_a_bucket_is_like_one_on_a_disk(
    score: Callable[..., Any],
    features_job: Path,
    features_folder: Path,
    s3_folder: str,
    tmp_path: Path,
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"s3": {"addressing_style": "path"}},
    )
    for file in features_folder.glob("users/*/*.parquet"):
        fs.put_file(str(file), f"{s3_folder}/in/dt={DATE}/{file.name}")
    command = night(features_job, f"{s3_folder}/out", "--set", f"input.uri={s3_folder}/in")
    ended = score(*command)
    assert ended.code == 0, ended.err
    assert ended.json["output"] == f"{s3_folder}/out/users/dt={DATE}"
    verdict = score("verify", *command[1:])
    assert verdict.code == 0, verdict.err
    assert verdict.json["rows"] == NUM_ROWS
    assert verdict.json["quarantined"] == NUM_BAD
    again = score(*command)
    assert (again.code, again.json["status"]) == (0, "already_published")
    local = score(*night(features_job, tmp_path / "local"))
    assert local.code == 0, local.err
    fs.get(
        f"{s3_folder}/out/users/dt={DATE}/",
        str(tmp_path / "copy/users") + f"/dt={DATE}/",
        recursive=True,
    )
    assert scores_in(tmp_path / "copy") == scores_in(tmp_path / "local")


def test_too_many_bad_rows_stop_publication(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    strict = night(features_job, output, "--set", "limits.max_quarantined=0.0001")
    ended = score(*strict)
    assert ended.code == 3
    assert (ended.json["exit_code"], ended.json["guard"]) == (3, "quarantine")
    assert " of 40,000 rows (0.0" in ended.json["error"]
    assert "expected at most 4 (limits.max_quarantined 0.01%" in ended.json["error"]
    assert not published(output).exists()
    num_committed = len(commits(output))
    relaxed = score(*night(features_job, output))  # nothing has to be scored again
    assert relaxed.code == 0
    assert relaxed.json["shards_reused"] == num_committed > 0


def test_a_night_with_too_few_rows_is_not_scored(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    ended = score(*night(features_job, tmp_path / "out", "--set", "limits.min_rows=40001"))
    assert ended.code == 3
    assert "40,000 rows for 2026-11-20; expected at least 40,001" in ended.json["error"]
    assert not (tmp_path / "out").exists()


def test_a_damaged_row_group_costs_its_rows_and_the_night_says_degraded(
    score: Callable[..., Any], features_job: Path, features_folder: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(features_folder / "users", tmp_path / "users")
    file = tmp_path / "users" / f"dt={DATE}" / "users-1.parquet"
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=100, write_page_checksum=True)
    chunk = pq.ParquetFile(file).metadata.row_group(7).column(0)
    content = bytearray(file.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content[begin + chunk.total_compressed_size - 1] ^= 0xFF
    file.write_bytes(content)
    more = ("--set", f"input.uri={tmp_path / 'users'}", "--set", "limits.max_quarantined=0.1")
    command = night(features_job, tmp_path / "out", *more)
    ended = score(*command)
    assert ended.code == 0, ended.err
    assert ended.json["degraded"]
    assert ended.json["quarantined_by_reason"]["row_group_unreadable"] == 100
    verdict = score("verify", *command[1:])
    assert verdict.code == 0, verdict.err
    assert verdict.json["quarantined"] == ended.json["quarantined"]


def test_input_that_changes_after_a_crash_is_never_mixed(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    features_folder: Path,
    tmp_path: Path,
) -> None:
    import shutil

    shutil.copytree(features_folder / "users", tmp_path / "users")
    output = tmp_path / "out"
    command = night(features_job, output, *SMALL_SHARDS, "--set", f"input.uri={tmp_path / 'users'}")
    running = start_score(*command)
    wait_for_commits(running, output, 3)
    running.kill_group()
    running.end()
    file = tmp_path / "users" / f"dt={DATE}" / "users-0.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(0, len(table) - 100), file, row_group_size=100)
    ended = score(*command)
    assert ended.code == 0, ended.err
    assert ended.json["rows"] == NUM_ROWS - 100
    assert ended.json["shards_reused"] == 0
    assert score("verify", *command[1:]).code == 0


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="two threads on one core: another engine"
)
def test_two_lanes_on_a_cpu_score_what_one_scores(
    score: Callable[..., Any], features_job: Path, undisturbed: Path, tmp_path: Path
) -> None:
    ended = score(*night(features_job, tmp_path, *SMALL_SHARDS, "--set", "lanes.count=2"))
    assert ended.code == 0, ended.err
    assert ended.json["num_lanes"] == 2
    assert ended.json["limit"]["per_sec"] > 0
    assert scores_in(tmp_path) == pytest.approx(scores_in(undisturbed), abs=1e-5)
    assert quarantined_in(tmp_path) == quarantined_in(undisturbed)


@pytest.mark.usefixtures("undisturbed")
def test_features_in_another_order_than_the_engine_was_built_on_are_not_scored(
    score: Callable[..., Any], features_job: Path, features_folder: Path, tmp_path: Path
) -> None:
    file, *_ = sorted((features_folder / "users" / f"dt={DATE}").iterdir())
    table = pq.read_table(file)
    names = [name for name in table.column_names if name.startswith("f")]
    reordered = table.select(["user_id", *reversed(names)])
    folder = tmp_path / "in" / f"dt={DATE}"
    folder.mkdir(parents=True)
    pq.write_table(reordered, folder / "part.parquet")
    command = night(features_job, tmp_path / "out", "--set", f"input.uri={tmp_path / 'in'}")
    ended = score(*command)
    assert ended.code == 2
    assert f"feature 1 is column `{names[-1]}`; expected `{names[0]}`, as in" in ended.json["error"]
    ended = score(*command, "--set", f"input.features.columns=[{','.join(names)}]")
    assert ended.code == 0, ended.err
