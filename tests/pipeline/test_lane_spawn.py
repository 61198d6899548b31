"""A process that begins with the command: who takes it, and that nobody leaves it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path

import pytest

from pipeline.lane import Lane, LaneDevice
from pipeline.lane_spawn import end_ahead, process_ahead, take_process
from tests.processes import is_alive

DEVICE = LaneDevice(name="cpu", num_threads=1)


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def ignores_interrupts(pid: int) -> bool:
    """Whether it has come so far: the mask of its parent would do until then."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    ignored = int(next(line for line in lines if line.startswith("SigIgn")).split()[1], 16)
    return bool(ignored >> (signal.SIGINT - 1) & 1)


@pytest.fixture
def ahead() -> Iterator[int]:
    """The process id of one that waits for its lane."""
    before = {*active_children()}
    with process_ahead():
        (begun,) = {*active_children()} - before
        assert begun.pid is not None
        yield begun.pid
    assert not is_alive(begun.pid)


def pid_of(lane: Lane) -> int:
    pid = lane._process.pid
    assert pid is not None
    return pid


def test_the_first_lane_takes_the_process_and_the_second_has_its_own(ahead: int) -> None:
    first, second = Lane(DEVICE), Lane(DEVICE)
    try:
        assert pid_of(first) == ahead
        assert pid_of(second) != ahead
        end_ahead()  # nobody else's
        assert is_alive(ahead)
    finally:
        first.abort()
        second.abort()


def test_a_process_that_no_lane_took_is_gone_at_once() -> None:
    before = {*active_children()}
    with process_ahead():
        (begun,) = {*active_children()} - before
    assert begun.exitcode == -signal.SIGKILL, "it was waited for"


def test_a_process_that_died_before_a_lane_came_is_not_taken(ahead: int) -> None:
    os.kill(ahead, signal.SIGKILL)
    wait_for(lambda: not is_alive(ahead))
    taken = take_process()
    try:
        assert taken.process.pid != ahead
        assert taken.process.is_alive()
    finally:
        taken.process.kill()
        taken.reap()
        taken.connection.close()


def test_all_threads_of_a_process_are_bound_by_the_lane_that_takes_it(ahead: int) -> None:
    wait_for(lambda: len(os.listdir(f"/proc/{ahead}/task")) > 1)  # it has come to import
    core = max(os.sched_getaffinity(0))
    lane = Lane(LaneDevice(name="cpu0", num_threads=1, cores=frozenset({core})))

    def is_bound() -> bool:
        threads = map(int, os.listdir(f"/proc/{ahead}/task"))
        with suppress(ProcessLookupError):  # one has ended meanwhile
            return all(os.sched_getaffinity(thread) == {core} for thread in threads)
        return False

    try:
        assert pid_of(lane) == ahead
        wait_for(is_bound)
    finally:
        lane.abort()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_ignores_the_signals_of_its_group_from_its_first_moment(
    ahead: int, number: int
) -> None:
    while not ignores_interrupts(ahead):
        os.kill(ahead, number)
        time.sleep(0.005)
    os.kill(ahead, number)
    time.sleep(0.1)
    assert is_alive(ahead)


def test_the_signals_of_the_parent_come_through_again() -> None:
    with process_ahead():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("patience_s", [0.0, 1.5])  # while it imports, and while it waits
def test_a_process_that_no_lane_took_dies_with_its_parent(
    tmp_path: Path, patience_s: float
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, time
            from pipeline.lane_spawn import process_ahead
            if __name__ == "__main__":
                with process_ahead():
                    print(multiprocessing.active_children()[0].pid, flush=True)
                    time.sleep(60)
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(patience_s)
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not is_alive(pid), 10)
