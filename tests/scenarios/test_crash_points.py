"""A night that crashes or fails at any operation on files: the same command ends it, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "crash_night.py"
BUCKET_SCRIPT = SCRIPT.with_name("crash_bucket.py")
NUM_KILLS = int(os.environ.get("TORTURE_KILLS", "200"))
STEP = 1 if "TORTURE_KILLS" in os.environ else 3
"""Of failing operations every third is enough for CI; all crash points are tried."""
BUCKET_STEP = 1 if "TORTURE_KILLS" in os.environ else 80
"""In a bucket a trial takes seven seconds, and a night 95 requests."""
SEED = int(os.environ.get("TORTURE_SEED", "1"))

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(NUM_KILLS + 600)]


def trials(folder: Path, *arguments: object, script: Path = SCRIPT) -> list[dict[str, Any]]:
    command = [sys.executable, str(script), str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_crash_at_any_operation_loses_nothing(tmp_path: Path) -> None:
    found = trials(tmp_path, "exit", 1, 1_000, 1)
    assert [trial for trial in found if trial["problem"]] == []
    *crashed, last = found
    assert {trial["code"] for trial in crashed} == {9}
    assert last["code"] == 0  # more operations than a night has
    assert len(crashed) > 100


@pytest.mark.parametrize("how", ["once", "forever"])
def test_an_operation_that_fails_loses_nothing(tmp_path: Path, how: str) -> None:
    found = trials(tmp_path, how, 1, 200, STEP)
    assert [trial for trial in found if trial["problem"]] == []
    assert {trial["code"] for trial in found} <= {0, 1}
    assert sum(trial["code"] == 1 for trial in found) > 20


@pytest.mark.parametrize(
    ("how", "first", "codes"),
    [
        ("exit-before", 1, {9}),
        ("exit-after", 7, {9}),
        ("once", 13, {0}),
        ("lost", 19, {0}),
        ("forever", 25, {75}),
    ],
)
def test_a_crash_or_fault_at_any_request_to_a_bucket_loses_nothing(
    tmp_path: Path, s3_folder: str, how: str, first: int, codes: set[int]
) -> None:
    first = 1 if BUCKET_STEP == 1 else first  # each tries other points
    arguments = (s3_folder, how, first, 10_000, BUCKET_STEP)
    *found, last = trials(tmp_path, *arguments, script=BUCKET_SCRIPT)
    assert [trial for trial in found if trial["problem"]] == []
    ended = {trial["code"] for trial in found}
    # A night that is published ends well also where its line of the history cannot be written.
    assert ended == codes or (how, ended) == ("forever", {75, 0})
    assert (last["code"], last["problem"]) == (40, None)  # more requests than a night has
    assert last["number"] > 80


def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    found = trials(tmp_path, "kill", SEED, NUM_KILLS)
    assert [trial for trial in found if trial["problem"]] == []
    assert found[-1]["left"] == 0


def test_the_harness_notices_a_ledger_that_overwrites_and_publishes_in_place(
    tmp_path: Path,
) -> None:
    """The naive way must fail here, or the tests above show nothing."""
    naive = tmp_path / "naive.py"
    naive.write_text(
        f"""
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import crash_night
from pipeline.local_storage import LocalStorage

def create(self, path, data):
    final = Path(self.uri) / path
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        return False
    with final.open("wb") as file:  # what most scripts do
        file.write(data[: len(data) // 2])
        file.flush()
        os.fsync(file.fileno())
        file.write(data[len(data) // 2 :])
    return True

def publish(self, files, manifest, target):
    for name, source in files.items():
        final = Path(self.uri) / target / name
        final.parent.mkdir(parents=True, exist_ok=True)
        os.link(Path(self.uri) / source, final)
    return LocalStorage.create(self, target + "/_MANIFEST.json", manifest)

LocalStorage.create, LocalStorage.publish = create, publish
crash_night.main()
"""
    )
    command = [sys.executable, str(naive), str(tmp_path), "exit", "1", "1000", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    problems = [json.loads(line)["problem"] for line in done.stdout.splitlines()]
    assert sum(problem is not None for problem in problems) > 10
    assert any("a reader sees" in problem for problem in problems if problem)
