"""Many `score` processes at once: one publishes, all end well, nothing is lost or overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.demo_data import write_users
from tests.conftest import write_job
from tests.processes import SYSTEM_TICKS, USER_TICKS, stat_of
from tests.scenarios.features_nights import (
    DATE,
    NUM_ROWS,
    NUM_SMALL_SHARDS,
    SHARDS,
    SMALL_SHARDS,
    check_resumed,
    commits,
    night,
    rows_scored,
    scores_in,
    wait_for_commits,
    wait_until,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(600)]
OTHER_DATE = "2026-11-21"
BEGINS_WITHIN_S = 5.0
DIES_WITHIN_S = 2.0


def hashes(output: Path) -> dict[str, str]:
    """sha256 of every file, temporary ones too."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.rglob("*")
        if path.is_file()
    }


def leftovers(files: list[str], manifest: dict[str, Any]) -> list[str]:
    """Files of a job that neither readers nor a resume need."""
    named = {
        entry[kind]["path"].removeprefix("_quarantine/")
        for entry in manifest["parts"]
        for kind in ("part", "quarantine")
        if entry[kind]
    }
    odd = []
    for path in files:
        *folders, name = path.split("/")
        is_part = name.endswith(".parquet") and "_history" not in folders
        if name.startswith((".", "_probe")) or any(each.startswith("_publ") for each in folders):
            odd.append(path)
        elif is_part and name not in named:
            odd.append(path)
    return odd


def check_published_once(ended: list[Any], undisturbed: Path, output: Path) -> None:
    """All ended well, one published, and what it published is what a quiet night publishes."""
    assert [each.code for each in ended] == [0] * len(ended), [each.err[-500:] for each in ended]
    statuses = sorted(each.json["status"] for each in ended)
    assert statuses == ["already_published"] * (len(ended) - 1) + ["published"]
    assert len({each.json["run_id"] for each in ended}) == 1
    assert scores_in(output) == scores_in(undisturbed)


@pytest.fixture
def users_job(features_job: Path, features_folder: Path, tmp_path: Path) -> Path:
    """The features job over a folder of its own that has another date, too."""
    folder = tmp_path / "users"
    folder.mkdir()
    (folder / f"dt={DATE}").symlink_to(features_folder / "users" / f"dt={DATE}")
    write_users(folder, OTHER_DATE, num_rows=20_000)
    job = json.loads(features_job.read_text())
    job["input"]["uri"] = str(folder)
    return write_job(tmp_path / "users.yaml", job)


def test_sixteen_processes_on_one_date_publish_once_and_share_the_work(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    output, num_processes = tmp_path / "sixteen", 16
    command = night(features_job, output, *SMALL_SHARDS)
    running = [start_score(*command) for _ in range(num_processes)]
    ended = [each.end() for each in running]
    check_published_once(ended, undisturbed, output)
    assert score("verify", *command[1:]).code == 0
    manifest = json.loads((output / "users" / f"dt={DATE}" / "_MANIFEST.json").read_text())
    assert leftovers(list(hashes(output)), manifest) == []
    assert len(commits(output)) == NUM_SMALL_SHARDS
    # Each passes over what is committed: without that, all would score everything.
    num_scored = sum(rows_scored(each.json) for each in ended)
    assert num_scored < 3 * NUM_ROWS
    assert [line for each in ended for line in each.err.splitlines() if "Traceback" in line] == []


def test_four_processes_on_one_date_in_a_bucket_publish_once(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    undisturbed: Path,
    s3_folder: str,
    tmp_path: Path,
) -> None:
    import s3fs

    command = night(features_job, f"{s3_folder}/out", *SHARDS)
    running = [start_score(*command) for _ in range(4)]
    ended = [each.end() for each in running]
    fs = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"s3": {"addressing_style": "path"}},
    )
    root = f"{s3_folder.removeprefix('s3://')}/out"
    fs.get(f"{root}/", str(tmp_path / "bucket"), recursive=True)
    check_published_once(ended, undisturbed, tmp_path / "bucket")
    assert score("verify", *command[1:]).code == 0
    files = [path.removeprefix(f"{root}/") for path in fs.find(root)]
    manifest = json.loads(fs.cat_file(f"{root}/users/dt={DATE}/_MANIFEST.json"))
    assert leftovers(files, manifest) == []


@pytest.mark.parametrize("num_committed", [5, NUM_SMALL_SHARDS // 2])
def test_an_owner_that_was_stopped_overwrites_nothing_when_it_wakes_up(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    undisturbed: Path,
    tmp_path: Path,
    num_committed: int,
) -> None:
    output = tmp_path / "stopped"
    command = night(features_job, output, *SMALL_SHARDS)
    owner = start_score(*command)
    wait_for_commits(owner, output, num_committed)
    owner.kill_group(signal.SIGSTOP)
    time.sleep(0.2)
    assert len(commits(output)) < NUM_SMALL_SHARDS
    other = score(*command)
    assert (other.code, other.json["status"]) == (0, "published"), other.err
    before = hashes(output)
    owner.kill_group(signal.SIGCONT)
    woken = owner.end(60)
    assert (woken.code, woken.json["status"]) == (0, "already_published"), woken.err
    assert woken.json["run_id"] == other.json["run_id"]
    after = hashes(output)
    gone = {path for path in before if path not in after}
    assert all(is_of_the_owner(path) for path in gone), gone
    assert {path: digest for path, digest in before.items() if path not in gone} == after
    check_published_once([other, woken], undisturbed, output)
    assert score("verify", *command[1:]).code == 0


def is_of_the_owner(path: str) -> bool:
    """A part that it had in work when it was stopped: it lost the race and removes it."""
    name = path.rpartition("/")[2]
    return "/_runs/" in f"/{path}" and (name.startswith(".") or "/parts/" in path)


def test_two_dates_of_a_job_at_once_do_not_meet(
    start_score: Callable[..., Any], score: Callable[..., Any], users_job: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dates"
    commands = [night(users_job, output, date=date) for date in (DATE, OTHER_DATE)]
    running = [start_score(*command) for command in commands]
    for command, each, num_rows in zip(commands, running, (NUM_ROWS, 20_000), strict=True):
        ended = each.end()
        assert (ended.code, ended.json["status"]) == (0, "published"), ended.err
        verdict = score("verify", *command[1:])
        assert (verdict.code, verdict.json["rows"]) == (0, num_rows), verdict.err


def test_two_jobs_in_one_output_do_not_meet(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "jobs"
    commands = [
        night(features_job, output, *SMALL_SHARDS, "--set", f"name={name}")
        for name in ("users", "others")
    ]
    running = [start_score(*command) for command in commands]
    for command, each in zip(commands, running, strict=True):
        ended = each.end()
        assert (ended.code, ended.json["status"]) == (0, "published"), ended.err
        assert score("verify", *command[1:]).code == 0
    expected = scores_in(undisturbed)
    assert scores_in(output) == scores_in(output, "others") == expected


def test_runs_that_need_the_same_engine_build_it_once(
    start_score: Callable[..., Any], score: Callable[..., Any], users_job: Path, tmp_path: Path
) -> None:
    output, store = tmp_path / "out", tmp_path / "engines"
    commands = [
        night(users_job, output, "--set", f"engine.store={store}", date=date)
        for date in (DATE, OTHER_DATE)
    ]
    ended = [running.end() for running in [start_score(*command) for command in commands]]
    assert [each.code for each in ended] == [0, 0], [each.err for each in ended]
    assert sorted(each.json["engine"]["built"] for each in ended) == [False, True]
    assert len({each.json["engine"]["key"] for each in ended}) == 1
    assert len(list(store.glob("engines/*/manifest.json"))) == 1
    assert all(score("verify", *command[1:]).code == 0 for command in commands)


def cpu_s(pid: int) -> float:
    """CPU time that a process has used until now; of one that has ended nobody can tell."""
    fields = stat_of(pid)
    if fields is None:
        return 0.0
    return (int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])) / os.sysconf("SC_CLK_TCK")


def test_after_kill_9_of_the_parent_its_lane_dies_and_the_restart_begins_at_once(
    start_score: Callable[..., Any], features_job: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    command = night(features_job, output, *SMALL_SHARDS)
    seconds, cpu_seconds = [], []
    for _ in range(2):
        num_before = len(commits(output))
        running = start_score(*command)
        wait_for_commits(running, output, num_before + 100)
        running.signal(signal.SIGKILL)
        assert running.lingering(DIES_WITHIN_S) == []
        assert running.end().code == -signal.SIGKILL
        before = set(commits(output))
        started = time.monotonic()
        again = start_score(*command)
        wait_until(lambda before=before: set(commits(output)) - before, again)
        seconds.append(time.monotonic() - started)
        cpu_seconds.append(sum(map(cpu_s, again.members())))
        again.kill_group()
        again.end()
    # Others may share the machine: then what it takes is told by the CPU time of its processes.
    is_shared = os.getloadavg()[0] > 2 * len(os.sched_getaffinity(0))
    assert min(cpu_seconds if is_shared else seconds) < BEGINS_WITHIN_S, (seconds, cpu_seconds)
    kept = {path: path.read_bytes() for path in commits(output)}
    ended = start_score(*command).end()
    check_resumed(ended, len(kept), NUM_SMALL_SHARDS)
    assert {path: path.read_bytes() for path in kept} == kept
    check_published_once([ended], undisturbed, output)
