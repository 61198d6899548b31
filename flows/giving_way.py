"""The nightly run goes first: a backfill waits while a night of its job is at work on this machine.

A night holds a shared lock of the kernel (flock) on a small file of this machine, for as long as
it works; it is freed when the night ends, however it ends. A backfill looks whether anybody holds
it before each date, and before each group of shards. So a night that begins meanwhile has the
devices for itself after a group at most, an eighth of what a date gives a lane.

Nights on other machines are not seen, and need not be: they have devices of their own. Neither are
those of another user or container of this one.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.config import Job
from pipeline.errors import Interrupted

log = logging.getLogger(__name__)

POLL_S = 0.5
LOOKS = 5
"""Whoever looks holds the lock for microseconds, and is no night."""
PAUSE_S = 0.02
"""At most, between two looks."""


@contextmanager
def at_work(job: Job) -> Iterator[None]:
    """Meanwhile, backfills of the job on this machine wait."""
    descriptor = _open(job)
    if descriptor is None:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_night_at_work(job: Job) -> bool:
    """Whether a night of the job works on this machine."""
    descriptor = _open(job)
    if descriptor is None:
        return False
    try:
        for _ in range(LOOKS):
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            time.sleep(random.uniform(0, PAUSE_S))
    finally:
        os.close(descriptor)
    return True


def wait_for_nights(job: Job, say: Callable[[str], None], stopped: threading.Event) -> None:
    """Return when no night of the job works on this machine.

    Args:
        job: The job.
        say: Is told once that we wait.
        stopped: Ends the waiting.

    Raises:
        Interrupted: `stopped` was set.
    """
    if is_night_at_work(job):
        say(f"a night of {job.name} is at work on this machine and goes first; waiting for it")
    while is_night_at_work(job):
        if stopped.wait(POLL_S):
            break
    if stopped.is_set():
        raise Interrupted("the backfill was stopped; run the same command again to go on.")


def _open(job: Job) -> int | None:
    """The job's file, or None where there can be none: then nobody waits for anybody."""
    output = job.output.uri
    where = output if "://" in output else os.path.abspath(output)
    name = hashlib.sha256(f"{where}\n{job.name}".encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir(), f"nightscore-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to somebody else")
        return os.open(folder / name, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        log.warning("%s: nights and backfills do not see each other (%s).", folder, error)
        return None
