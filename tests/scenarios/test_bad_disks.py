"""Nights on a disk that is full, read-only or forbidden, from the start or in the middle."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.features_nights import (
    NUM_SHARDS,
    PUBLISHED,
    RUNS,
    SHARDS,
    check_resumed,
    check_stopped,
    commits,
    night,
    scores_in,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]
LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_REMOUNT = 1, 32
MNT_DETACH = 2


def mount(folder: Path, flags: int = 0, options: str = "") -> None:
    name = os.fsencode(folder)
    if LIBC.mount(b"tmpfs", name, b"tmpfs", flags, options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount(folder, options="size=4m")
    except PermissionError:
        pytest.skip("only root may mount a file system")
    yield folder
    LIBC.umount2(os.fsencode(folder), MNT_DETACH)


def check_freed(
    score: Callable[..., Any], job: Path, output: Path, undisturbed_scores: dict[int, float]
) -> None:
    num_committed = len(commits(output))
    assert 0 < num_committed < NUM_SHARDS
    assert not (output / PUBLISHED).exists()
    for record in commits(output):  # nothing is torn
        stored = json.loads(record.read_text())["part"]
        part = record.parents[1] / "parts" / stored["name"]
        assert part.stat().st_size == stored["num_bytes"]
    command = night(job, output, *SHARDS)
    check_resumed(score(*command), num_committed, NUM_SHARDS)
    assert scores_in(output) == undisturbed_scores
    assert score("verify", *command[1:]).code == 0


def test_a_disk_that_is_full_in_the_middle_of_a_night_is_freed_and_the_night_goes_on(
    score: Callable[..., Any],
    features_job: Path,
    small_disk: Path,
    undisturbed_scores: dict[int, float],
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3_900_000))
    output = small_disk / "scores"
    check_stopped(score(*night(features_job, output, *SHARDS)), "No space left on device")
    check_stopped(score(*night(features_job, output, *SHARDS)), "No space left on device")
    ballast.unlink()
    check_freed(score, features_job, output, undisturbed_scores)


def test_a_disk_that_is_full_from_the_start_is_resumable_too(
    score: Callable[..., Any], features_job: Path, small_disk: Path
) -> None:
    with pytest.raises(OSError, match="No space left"), open(small_disk / "ballast", "wb") as file:
        file.write(bytes(5 << 20))
    check_stopped(score(*night(features_job, small_disk, *SHARDS)), "No space left on device")


@contextmanager
def paused(running: Any, output: Path) -> Iterator[None]:
    """Stop the processes of a night after its first commits; go on afterwards."""
    deadline = time.monotonic() + 100
    while len(commits(output)) < 3:
        assert running.is_running(), running.end().err
        assert time.monotonic() < deadline, "no commit in time"
        time.sleep(0.002)
    running.kill_group(signal.SIGSTOP)
    try:
        yield
    finally:
        running.kill_group(signal.SIGCONT)


def test_a_disk_that_becomes_read_only_in_the_middle_of_a_night(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    small_disk: Path,
    undisturbed_scores: dict[int, float],
) -> None:
    output = small_disk / "scores"
    running = start_score(*night(features_job, output, *SHARDS))
    while True:
        with paused(running, output):
            with suppress(OSError):  # busy: a file is open for writing at this very moment
                mount(small_disk, MS_REMOUNT | MS_RDONLY)
                break
    check_stopped(running.end(), "Read-only file system")
    read_only = score(*night(features_job, output, *SHARDS))
    assert read_only.code == 2, read_only.err  # from the start it is a wrong setting
    assert "cannot be written (Read-only file system)" in read_only.json["error"]
    mount(small_disk, MS_REMOUNT)
    check_freed(score, features_job, output, undisturbed_scores)


def unprivileged() -> tuple[str, ...]:
    """Before a command: permissions count, for root too."""
    if os.geteuid() != 0:
        return ()
    prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", "--")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("permissions do not bind root, and `setpriv` does not help")
    return prefix


def test_a_permission_that_is_lost_in_the_middle_of_a_night(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    tmp_path: Path,
    undisturbed_scores: dict[int, float],
) -> None:
    output = tmp_path / "scores"
    command = night(features_job, output, *SHARDS)
    running = start_score(*command, prefix=unprivileged())
    with paused(running, output):
        for folder in output.glob(f"{RUNS}/*/commits"):
            folder.chmod(0o500)
    check_stopped(running.end(), "Permission denied")
    for folder in output.glob(f"{RUNS}/*/commits"):
        folder.chmod(0o700)
    check_freed(score, features_job, output, undisturbed_scores)


def test_an_output_that_is_forbidden_from_the_start_is_a_wrong_setting(
    start_score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    output.mkdir(mode=0o500)
    ended = start_score(*night(features_job, output, *SHARDS), prefix=unprivileged()).end()
    assert ended.code == 2, ended.err
    assert "cannot be written (Permission denied)" in ended.json["error"]
