"""Work on several threads: results in the order of the items, and nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from engines.in_order import map_ahead, map_in_order

THREADS = 4
pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS, "in-order") as opened:
        yield opened


def double_late(item: int) -> int:
    time.sleep(random.Random(item).uniform(0, 0.003))
    return 2 * item


@pytest.mark.parametrize("num_ahead", [1, 2, THREADS, 3 * THREADS, 1000])
def test_results_come_in_the_order_of_the_items(pool: ThreadPoolExecutor, num_ahead: int) -> None:
    results = list(map_in_order(pool, double_late, range(100), num_ahead))
    assert results == [2 * item for item in range(100)]


def test_no_items_are_no_results(pool: ThreadPoolExecutor) -> None:
    assert list(map_in_order(pool, double_late, [], 3)) == []


@pytest.mark.parametrize("num_ahead", [1, 2, 7])
def test_items_are_drawn_only_so_far_ahead(pool: ThreadPoolExecutor, num_ahead: int) -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(40):
            drawn += 1
            yield item

    furthest = 0
    for num_out, _ in enumerate(map_in_order(pool, double_late, items(), num_ahead)):
        furthest = max(furthest, drawn - num_out)
    # The one that is being yielded has left its place to the next, which was drawn before.
    assert furthest == num_ahead + 1


def test_threads_work_at_the_same_time(pool: ThreadPoolExecutor) -> None:
    meeting = threading.Barrier(THREADS)
    list(map_in_order(pool, lambda _: meeting.wait(10), range(3 * THREADS), THREADS))


def test_none_brings_out_all_before_the_next_item_is_drawn(pool: ThreadPoolExecutor) -> None:
    events: list[str] = []

    def items() -> Iterator[int | None]:
        for item in range(6):
            events.append(f"in {item}")
            yield item
            if item in (2, 4):
                yield None

    for result in map_in_order(pool, double_late, items(), 8):
        events.append(f"out {result}")
    assert events == [
        *("in 0", "in 1", "in 2", "out 0", "out 2", "out 4", "out None"),
        *("in 3", "in 4", "out 6", "out 8", "out None"),
        *("in 5", "out 10"),
    ]


def test_none_is_handed_on_where_nothing_works(pool: ThreadPoolExecutor) -> None:
    assert list(map_in_order(pool, double_late, [None, None, 1, None], 2)) == [None, None, 2, None]


def test_an_error_of_the_work_comes_in_its_items_turn(pool: ThreadPoolExecutor) -> None:
    def fail_at_seven(item: int) -> int:
        if item == 7:
            raise LookupError("seven")
        return double_late(item)

    results = map_in_order(pool, fail_at_seven, range(30), 5)
    assert [next(results) for _ in range(7)] == [2 * item for item in range(7)]
    with pytest.raises(LookupError, match="seven"):
        next(results)
    assert list(map_in_order(pool, double_late, [1], 2)) == [2]  # and the pool goes on


def test_an_error_of_the_source_comes_through_when_nothing_works_any_more(
    pool: ThreadPoolExecutor,
) -> None:
    working = 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal working
        with lock:
            working += 1
        time.sleep(0.02)
        with lock:
            working -= 1
        return item

    def items() -> Iterator[int]:
        yield from range(THREADS)
        raise LookupError("the reader lost its way")

    with pytest.raises(LookupError, match="lost its way"):
        list(map_in_order(pool, work, items(), 2 * THREADS))
    assert working == 0


def test_an_early_close_waits_for_those_that_work_and_cancels_the_others() -> None:
    begun: list[int] = []
    ended: list[int] = []
    all_work, go_on = threading.Event(), threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            return item
        if len(begun) == 3:
            all_work.set()
        assert go_on.wait(10)
        ended.append(item)
        return item

    with ThreadPoolExecutor(2) as two:
        results = map_in_order(two, work, range(100), 10)
        with closing(results):
            assert next(results) == 0
            assert all_work.wait(10)
            threading.Timer(0.5, go_on.set).start()  # while the close waits
        assert sorted(ended) == sorted(begun)[1:] == [1, 2]
        time.sleep(0.15)  # a thread that is free would have begun with another
        assert len(begun) == 3


def test_a_source_is_left_alone_once_the_results_are_closed(pool: ThreadPoolExecutor) -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            drawn.append(item)
            yield item

    results = map_in_order(pool, double_late, items(), 3)
    next(results)
    results.close()
    num_drawn = len(drawn)
    assert list(results) == []
    assert len(drawn) == num_drawn <= 4


def test_no_thread_is_left_with_the_pool() -> None:
    before = set(threading.enumerate())
    for stop_at in (0, 5, 1000):
        with (
            ThreadPoolExecutor(THREADS) as pool,
            closing(map_in_order(pool, double_late, range(50), 9)) as results,
        ):
            for result, _ in zip(results, range(stop_at), strict=False):
                assert result is not None
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_items_are_worked_on_ahead_of_who_asks_for_the_results(num_threads: int) -> None:
    began: list[int] = []

    def work(item: int) -> int:
        began.append(item)
        return 2 * item

    results = map_ahead(work, [0, 1, None, *range(2, 40)], num_threads)
    assert [next(results) for _ in range(3)] == [0, 2, None]
    assert sorted(began) == [0, 1], "None: what comes is not asked for yet"
    assert list(results) == [2 * item for item in range(2, 40)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_without_threads_each_item_has_its_turn_in_the_calling_thread() -> None:
    callers = map_ahead(lambda _: threading.current_thread(), range(5), 0)
    assert set(callers) == {threading.current_thread()}


def test_so_many_items_are_worked_on_at_once_as_there_are_threads() -> None:
    meeting = threading.Barrier(3)
    assert len(list(map_ahead(lambda _: meeting.wait(10), range(6), 3))) == 6
