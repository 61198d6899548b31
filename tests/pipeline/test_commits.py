"""Commits near and far: as many side by side as may be lost together, and each is reported."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, cast

import pytest

from pipeline.block_size import COMMITS_AT_ONCE
from pipeline.commits import Commit, Commits
from pipeline.ledger import Ledger
from pipeline.part import ShardParts
from pipeline.plan import Shard
from pipeline.work_marks import WorkMarks

pytestmark = pytest.mark.timeout(30)
MAX_ROWS = 100


class Store:
    """A ledger, each of whose commits waits until it may go on."""

    def __init__(self, is_far: bool = True) -> None:
        self.is_far = is_far
        self.begun: list[int] = []
        self.may_end: dict[int, threading.Event] = {}
        self.broken: set[int] = set()
        self._changed = threading.Condition()

    def commit(self, shard: Shard, parts: ShardParts, owner: str) -> Any:
        del parts
        assert owner == "us"
        end = self.may_end.setdefault(shard.index, threading.Event())
        with self._changed:
            self.begun.append(shard.index)
            self._changed.notify_all()
        if self.is_far:
            assert end.wait(10)
        if shard.index in self.broken:
            raise OSError(28, "No space left on device")
        return f"record {shard.index}"

    def wait_for(self, count: int) -> None:
        """Until so many commits have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, 10)

    def let_end(self, index: int) -> None:
        self.may_end.setdefault(index, threading.Event()).set()


class Night:
    """Commits, and a thread that begins them."""

    def __init__(self, store: Store, max_rows: int = MAX_ROWS) -> None:
        self.store = store
        self.marks = WorkMarks(get_context("spawn"))
        self.commits = Commits(cast("Ledger", store), "us", self.marks, max_rows)
        self._writer = ThreadPoolExecutor(1)

    def begin(self, index: int, num_rows: int) -> Any:
        """Begin another one, as soon as there is room."""
        shard: Any = type("AShard", (), {"index": index, "num_rows": num_rows})()
        return self._writer.submit(self.commits.begin, shard, cast("ShardParts", None))

    def end(self) -> None:
        for index in range(50):
            self.store.let_end(index)
        self._writer.shutdown()
        self.commits.close()


@pytest.fixture
def night() -> Iterator[Night]:
    night = Night(Store())
    yield night
    night.end()


def is_stuck(coming: Any) -> bool:
    with pytest.raises(TimeoutError):
        coming.result(0.1)
    return True


def record_of(coming: Any) -> str:
    commit: Commit = coming.result(10)
    return cast("str", commit.record())


def test_on_a_local_disk_a_commit_is_made_before_the_next_begins() -> None:
    store = Store(is_far=False)
    night = Night(store)
    for index in range(3):
        night.begin(index, 10).result(10)
        assert store.begun == list(range(index + 1))
    night.end()


def test_small_shards_far_away_are_committed_side_by_side(night: Night) -> None:
    coming = [night.begin(index, 1) for index in range(COMMITS_AT_ONCE)]
    night.store.wait_for(COMMITS_AT_ONCE)
    assert is_stuck(coming[-1]), "so many, and no more"
    assert night.marks.is_paused, "rows behind it wait through no fault of theirs"
    night.store.let_end(3)
    coming[-1].result(10)
    assert not night.marks.is_paused
    for index, each in enumerate(coming):
        night.store.let_end(index)
        assert record_of(each) == f"record {index}"


def test_no_more_rows_are_committed_side_by_side_than_may_be_lost(night: Night) -> None:
    first, second, third = night.begin(0, 60), night.begin(1, 40), night.begin(2, 1)
    second.result(10)
    assert is_stuck(third), "101 rows: nothing else is gathered"
    night.store.let_end(1)
    third.result(10)
    for index, each in enumerate((first, second, third)):
        night.store.let_end(index)
        assert record_of(each) == f"record {index}"


@pytest.mark.parametrize("max_rows", [0, MAX_ROWS])
def test_a_large_shard_is_committed_before_the_next_is_gathered(max_rows: int) -> None:
    night = Night(Store(), max_rows)
    large = night.begin(0, max_rows + 1)
    assert is_stuck(large)
    night.store.let_end(0)
    assert record_of(large) == "record 0"
    night.end()


def test_what_the_store_raises_comes_with_the_record_and_makes_room(night: Night) -> None:
    night.store.broken.add(0)
    first, second = night.begin(0, 2 * MAX_ROWS), night.begin(1, MAX_ROWS)
    night.store.let_end(0)
    night.store.let_end(1)
    with pytest.raises(OSError, match="No space left"):
        record_of(first)
    assert record_of(second) == "record 1"
