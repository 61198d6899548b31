"""Stages in threads: order, errors, early ends, and where the time went."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from pipeline.overlap import Awaited, Stage

pytestmark = pytest.mark.timeout(20)


def one(_: object) -> int:
    return 1


def stage(
    name: str, items: Iterable[Any], upstream: Stage[Any] | Awaited[Any] | None = None
) -> Stage[Any]:
    return Stage(name, items, upstream=upstream, count=one)


def double(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        yield item if item is None else 2 * item


def end(*stages: Stage[Any]) -> None:
    for each in stages:
        each.stop()
    for each in stages:
        each.join()


def test_items_come_in_order_through_a_chain() -> None:
    first = stage("first", range(200))
    second = stage("second", double(first), first)
    assert list(second) == list(range(0, 400, 2))
    assert first.times().items == second.times().items == 200
    end(first, second)


def test_none_is_handed_on_and_counts_no_row() -> None:
    first = stage("first", [1, None, 2])
    assert list(first) == [1, None, 2]
    assert first.times().items == 2


def test_stages_work_at_the_same_time() -> None:
    meeting = threading.Barrier(3)

    def meet(items: Iterable[int], at_item: int) -> Iterator[int]:
        for item in items:
            if item == at_item:
                meeting.wait(10)
            yield item

    first = stage("first", meet(range(15), at_item=2))
    second = stage("second", meet(first, at_item=1), first)
    third = stage("third", meet(second, at_item=0), second)
    assert list(third) == list(range(15))
    end(first, second, third)


def test_an_error_comes_out_at_the_end_with_its_stage() -> None:
    def broken(items: Iterable[int]) -> Iterator[int]:
        for item in items:
            if item == 3:
                raise ValueError("bad item")
            yield item

    first = stage("first", range(10))
    second = stage("second", broken(first), first)
    third = stage("third", double(second), second)
    seen: list[int] = []
    with pytest.raises(ValueError, match="bad item") as caught:
        seen.extend(third)
    assert seen == [0, 2, 4]  # what was done before is not lost
    assert caught.value.__notes__[0] == "Pipeline stage: second"
    end(first, second, third)


def test_errors_that_are_no_exceptions_come_out_too() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stage("first", broken()))


def test_a_queue_bounds_what_is_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    first = Stage("first", items(), depth=2, count=one)
    time.sleep(0.3)
    assert len(made) <= 4
    end(first)
    assert len(made) <= 5


def test_stopping_early_ends_all_threads_and_closes_the_generators() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    first = stage("first", endless())
    second = stage("second", double(first), first)
    third = stage("third", double(second), second)
    assert next(iter(third)) == 4
    end(first, second, third)
    assert closed.is_set()
    assert not [t for t in threading.enumerate() if t.name.startswith("stage-")]


def test_a_stopped_stage_ends_whoever_iterates() -> None:
    hold = threading.Event()

    def blocked() -> Iterator[int]:
        yield 1
        assert hold.wait(10)

    first = stage("first", blocked())
    items = iter(first)
    assert next(items) == 1
    threading.Timer(0.2, first.stop).start()
    assert list(items) == []
    hold.set()
    first.join()


def test_times_tell_the_busy_stage_from_the_waiting_ones() -> None:
    def slow(items: Iterable[int]) -> Iterator[int]:
        for item in items:
            time.sleep(0.03)
            yield item

    first = stage("first", range(20))
    second = stage("second", slow(first), first)
    third = stage("third", double(second), second)
    list(third)
    times = [each.times() for each in (first, second, third)]
    assert times[1].busy_s > 0.5
    assert times[0].busy_s < 0.2
    assert times[2].busy_s < 0.2
    assert times[0].wait_s > 0.3  # its queue was full
    assert times[2].wait_s > 0.4  # its queue was empty
    assert times[1].wait_s < 0.3
    end(first, second, third)


def test_a_first_stage_is_not_busy_while_its_items_have_not_come_yet() -> None:
    def late() -> Iterator[int]:
        for item in range(4):
            time.sleep(0.1)
            yield item

    given = Awaited(late())
    first = stage("first", double(given), given)
    assert list(first) == [0, 2, 4, 6]
    first.join()
    assert first.times().wait_s > 0.35
    assert first.times().busy_s < 0.2
