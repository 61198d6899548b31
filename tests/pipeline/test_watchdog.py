"""What is in work, seen from outside, and processes that are stuck or take all memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import pytest

from pipeline.lane_messages import WatchLimits
from pipeline.watchdog import PERIOD_S, Watchdog, memory_share, resident_bytes
from pipeline.work_marks import NUM_SLOTS, Mark, WorkMarks

SPAWN = multiprocessing.get_context("spawn")
MIB = 2**20


def work(marks: WorkMarks, rows: list[tuple[int, int]], num_bytes: int = 0) -> None:
    """Begins rows of shard 3, ends those of length 0, and stays."""
    for first, count in rows:
        if count:
            marks.begin(3, first, count)
        else:
            marks.end(3, first)
    kept = b"x" * num_bytes
    time.sleep(600)
    del kept


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[BaseProcess, WorkMarks]]]:
    started: list[BaseProcess] = []

    def begin(*args: object) -> tuple[BaseProcess, WorkMarks]:
        marks = WorkMarks(SPAWN)
        process = SPAWN.Process(target=work, args=(marks, *args), daemon=True)
        process.start()
        started.append(process)
        return process, marks

    yield begin
    for process in started:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_marks_outlive_the_process_that_made_them(start: Callable[..., tuple]) -> None:
    process, marks = start([(16, 8), (0, 16), (32, 4), (16, 0)])
    wait_for(lambda: [mark.first_row for mark in marks.in_work()] == [0, 32])
    process.kill()
    process.join()
    assert marks.in_work() == [
        Mark(shard=3, first_row=0, num_rows=16, is_trial=False, serial=2),
        Mark(shard=3, first_row=32, num_rows=4, is_trial=False, serial=3),
    ]


def test_more_blocks_than_slots_are_no_error() -> None:
    marks = WorkMarks(SPAWN)
    for first in range(NUM_SLOTS + 10):
        marks.begin(0, first, 1)
    assert len(marks.in_work()) == NUM_SLOTS
    for first in range(NUM_SLOTS + 10):
        marks.end(0, first)
    assert not marks.in_work()
    marks.begin(1, 0, 1)
    assert len(marks.in_work()) == 1


def watched(process: BaseProcess, marks: WorkMarks, **limits: float) -> Watchdog:
    values = {"hang_s": 60.0, "rows_per_s": 1e6, "max_rss_bytes": 1 << 40, **limits}
    dog = Watchdog(process, marks, WatchLimits(**values))  # type: ignore[arg-type]
    dog.start()
    return dog


def test_a_process_that_is_stuck_is_killed_and_says_with_how_many_rows(
    start: Callable[..., tuple],
) -> None:
    process, marks = start([(0, 16)])
    dog = watched(process, marks, hang_s=3 * PERIOD_S)
    process.join(30)
    dog.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert dog.verdict is not None
    reason, message = dog.verdict
    assert reason == "hung"
    assert message.endswith("s for 16 rows")


def test_a_slow_engine_is_given_its_time(start: Callable[..., tuple]) -> None:
    process, marks = start([(0, 16)])
    wait_for(marks.in_work)
    dog = watched(process, marks, hang_s=PERIOD_S, rows_per_s=1.0)  # 16 s, times the slowness
    process.join(6 * PERIOD_S)
    assert process.is_alive()
    assert dog.verdict is None


def test_rows_that_wait_for_the_store_are_not_stuck(start: Callable[..., tuple]) -> None:
    process, marks = start([(0, 16)])
    wait_for(marks.in_work)
    with marks.pause():
        dog = watched(process, marks, hang_s=2 * PERIOD_S)
        process.join(8 * PERIOD_S)
        assert process.is_alive()
    process.join(30)
    dog.join(10)
    assert dog.verdict is not None
    assert dog.verdict[0] == "hung"


def test_suspects_that_are_tried_together_get_less_time() -> None:
    """Halving is cheap, and all of a search has to fit into half a minute."""
    marks = WorkMarks(SPAWN)
    limits = WatchLimits(hang_s=4.0, rows_per_s=1e6, max_rss_bytes=1 << 40)
    process = SPAWN.Process(target=time.sleep, args=(60,))
    looks = {}
    for num_rows, is_trial in [(16, False), (16, True), (1, True)]:
        dog = Watchdog(process, marks, limits)
        marks.begin(0, 0, num_rows, is_trial=is_trial)
        looks[num_rows, is_trial] = next(n for n in range(1, 100) if dog._stuck())
    assert looks[16, True] * 2 == pytest.approx(looks[16, False], abs=2)
    assert looks[1, True] == looks[16, False]


def test_more_patience_is_for_rows_that_are_not_tried() -> None:
    marks = WorkMarks(SPAWN)
    process = SPAWN.Process(target=time.sleep, args=(60,))
    looks = {}
    for patience, is_trial in [(1.0, False), (8.0, False), (1.0, True), (8.0, True)]:
        limits = WatchLimits(hang_s=2.0, rows_per_s=1e6, max_rss_bytes=1 << 40, patience=patience)
        dog = Watchdog(process, marks, limits)
        marks.begin(0, 0, 1, is_trial=is_trial)
        looks[patience, is_trial] = next(n for n in range(1, 200) if dog._stuck())
    assert looks[8.0, False] == pytest.approx(8 * looks[1.0, False], abs=8)
    assert looks[8.0, True] == looks[1.0, True] == looks[1.0, False]


def test_what_waited_for_another_block_is_given_its_time_anew() -> None:
    marks = WorkMarks(SPAWN)
    dog = Watchdog(
        SPAWN.Process(target=time.sleep, args=(60,)),
        marks,
        WatchLimits(hang_s=10 * PERIOD_S, rows_per_s=1e6, max_rss_bytes=1 << 40),
    )
    for first in range(3):
        marks.begin(0, first, 1)
    for first in range(2):
        assert not any(dog._stuck() for _ in range(8))
        marks.end(0, first)
        marks.renew()
    assert [mark.first_row for mark in marks.in_work()] == [2]
    assert any(dog._stuck() for _ in range(12))


def test_a_process_with_nothing_in_work_may_wait_for_ever(start: Callable[..., tuple]) -> None:
    process, marks = start([(0, 16), (0, 0)])
    dog = watched(process, marks, hang_s=PERIOD_S)
    process.join(8 * PERIOD_S)
    assert process.is_alive()
    process.kill()
    dog.join(10)
    assert not dog.is_alive()
    assert dog.verdict is None


def test_a_process_that_takes_too_much_memory_is_killed(start: Callable[..., tuple]) -> None:
    process, marks = start([], 300 * MIB)
    dog = watched(process, marks, max_rss_bytes=200 * MIB)
    process.join(30)
    dog.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert dog.verdict is not None
    reason, message = dog.verdict
    assert reason == "out_of_memory"
    assert "at most 200 MiB are allowed" in message


def test_memory_is_shared_out_among_lanes() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_share(4) * 4 <= total
    assert memory_share(1) == pytest.approx(4 * memory_share(4), rel=0.01)
    assert resident_bytes(os.getpid()) > 10 * MIB
    assert resident_bytes(None) == 0
