"""Commits of shards: one after the other, or side by side where each waits for a network.

A night of many small files would else wait for the store most of the time: three requests for each
of them.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.block_size import COMMITS_AT_ONCE
from pipeline.ledger import CommitRecord, Ledger
from pipeline.part import ShardParts
from pipeline.plan import Shard
from pipeline.work_marks import WorkMarks


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A commit that has begun."""

    num_rows: int
    """Of the shard."""
    coming: Future[CommitRecord]

    def record(self) -> CommitRecord:
        """What was committed, waited for; raises what the store raises."""
        return self.coming.result()


class Commits:
    """Commits the shards of a lane.

    Args:
        ledger: Of the run.
        owner: The attempt.
        marks: Are told that rows in work may wait for the store.
        max_rows: Of shards that may be on their way when the next is gathered; see
            `block_size.rows_side_by_side`.
    """

    def __init__(self, ledger: Ledger, owner: str, marks: WorkMarks, max_rows: int) -> None:
        self._ledger = ledger
        self._owner = owner
        self._marks = marks
        self._max_rows = max_rows
        self._num_begun = self._rows_begun = 0
        self._changed = threading.Condition()
        num_threads = COMMITS_AT_ONCE if ledger.is_far else 0
        self._pool = ThreadPoolExecutor(num_threads, "commit") if num_threads else None

    def begin(self, shard: Shard, parts: ShardParts) -> Commit:
        """Commit a shard: on a local disk before this returns, else perhaps after it."""
        with self._marks.pause():  # stages before may have to wait for the store
            if self._pool is None:
                coming: Future[CommitRecord] = Future()
                coming.set_result(self._ledger.commit(shard, parts, self._owner))
            else:
                self._count(1, shard.num_rows)
                coming = self._pool.submit(self._commit, shard, parts)
                self._wait_for_room()
        return Commit(num_rows=shard.num_rows, coming=coming)

    def close(self) -> None:
        """Wait for those that have begun."""
        if self._pool is not None:
            self._pool.shutdown()

    def _wait_for_room(self) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._num_begun < COMMITS_AT_ONCE and self._rows_begun <= self._max_rows
            )

    def _commit(self, shard: Shard, parts: ShardParts) -> CommitRecord:
        try:
            return self._ledger.commit(shard, parts, self._owner)
        finally:
            self._count(-1, -shard.num_rows)

    def _count(self, num_shards: int, num_rows: int) -> None:
        with self._changed:
            self._num_begun += num_shards
            self._rows_begun += num_rows
            self._changed.notify_all()
