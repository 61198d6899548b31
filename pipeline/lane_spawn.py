"""A lane's process as its lane holds it; one may begin with the command, before there is a lane.

Light: the command spawns it before it imports anything else.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from pipeline.lane_process import lane_main
from pipeline.work_marks import WorkMarks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""They may reach the group: the parent decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneProcess:
    """A process that imports what every lane needs, and waits to be told what it is bound to."""

    process: BaseProcess
    connection: Connection
    """To it."""
    marks: WorkMarks
    """Where it says what rows it is at."""

    def reap(self) -> None:
        """Wait until it has ended."""
        self.process.join()
        atexit.unregister(self.process.kill)


_ahead: list[LaneProcess] = []
"""Begun and not taken: one at most."""


def take_process() -> LaneProcess:
    """The process that began with the command, if there is one left; else another."""
    while _ahead:
        begun = _ahead.pop()
        if begun.process.is_alive():
            return begun
        begun.reap()
    return _spawn()


@contextmanager
def process_ahead() -> Iterator[None]:
    """Begin a process for the first lane to come; at the end it is gone, if no lane took it."""
    with suppress(OSError):  # a head start only: the lane that needs one tells what is wrong
        _ahead.append(_spawn())
    try:
        yield
    finally:
        end_ahead()


def end_ahead() -> None:
    """No lane of this process will come for it: do not wait for its imports."""
    while _ahead:
        begun = _ahead.pop()
        begun.process.kill()
        begun.reap()
        begun.connection.close()


def _spawn() -> LaneProcess:
    # Spawned, not forked: s3fs, DALI and the runtimes do not survive a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    marks = WorkMarks(context)
    # Should nobody close the lane, the interpreter's end does not wait for it: a daemon is only
    # asked to end by SIGTERM, which it ignores.
    process = context.Process(target=lane_main, args=(theirs, marks), name="lane", daemon=True)
    resource_tracker.ensure_running()  # `start` would do it, and let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited until it ignores them
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(process.kill)
    theirs.close()
    return LaneProcess(process=process, connection=ours, marks=marks)
