"""Which rows a lane's process has in work, in memory that outlives the process.

When it dies, is stuck or takes all memory, its parent sees here which rows it was at.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from typing import Any

NUM_SLOTS = 256
"""Blocks in work at once: one for each core, or those between a device's stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Some consecutive rows of a shard that are in work."""

    shard: int
    first_row: int
    """Within the shard."""
    num_rows: int
    is_trial: bool
    """Whether they are tried alone because a process died of them, or of others."""
    serial: int
    """Differs from that of every other mark of the process."""
    is_read: bool = False
    """Whether they are being read, or wait for others to be done: nobody knows how long."""


class _Slot(ctypes.Structure):
    _fields_ = (
        ("serial", ctypes.c_int64),  # 0: free; written last, so that no half of a mark is read
        ("shard", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("is_trial", ctypes.c_int64),
        ("is_read", ctypes.c_int64),
    )


class WorkMarks:
    """Made by the parent and passed to the process, which alone writes.

    Args:
        context: That starts the process.
    """

    def __init__(self, context: SpawnContext) -> None:
        self._slots = context.RawArray(_Slot, NUM_SLOTS)
        self._paused = context.RawValue(ctypes.c_int64, 0)
        self._begun = context.RawValue(ctypes.c_int64, 0)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._free = list(range(NUM_SLOTS))
        self._taken: dict[tuple[int, int, bool], int] = {}
        self._serial = 0

    def __getstate__(self) -> object:
        return self._slots, self._paused, self._begun

    def __setstate__(self, shared: Any) -> None:
        self._slots, self._paused, self._begun = shared
        self._reset()

    def begin(
        self,
        shard: int,
        first_row: int,
        num_rows: int,
        *,
        is_trial: bool = False,
        is_read: bool = False,
    ) -> None:
        """These rows are in work from now on, for the second time perhaps."""
        self.end(shard, first_row, is_read=is_read)
        with self._lock:
            if not self._free:  # more than anyone has seen: a death then explains less
                return
            number = self._taken[shard, first_row, is_read] = self._free.pop()
            self._serial += 1
            slot = self._slots[number]
            slot.shard, slot.first_row, slot.num_rows = shard, first_row, num_rows
            slot.is_trial, slot.is_read = is_trial, is_read
            slot.serial = self._serial

    def end(self, shard: int, first_row: int, *, is_read: bool = False) -> None:
        """The rows that begin there are done."""
        with self._lock:
            number = self._taken.pop((shard, first_row, is_read), None)
            if number is not None:
                self._slots[number].serial = 0
                self._free.append(number)

    def renew(self) -> None:
        """All that is in work has waited for others until now: its time begins."""
        with self._lock:
            for number in self._taken.values():
                self._serial += 1
                self._slots[number].serial = self._serial

    def count(self, num_rows: int) -> None:
        """So many rows have begun to be scored, to be committed if nothing comes between."""
        with self._lock:
            self._begun.value += num_rows

    @property
    def rows_begun(self) -> int:
        """Rows that have begun to be scored, those that began twice included."""
        return int(self._begun.value)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Meanwhile rows may wait for something else than themselves: the store takes its time."""
        self._paused.value = 1
        try:
            yield
        finally:
            self._paused.value = 0

    @property
    def is_paused(self) -> bool:
        """Whether rows in work may be waiting through no fault of theirs."""
        return bool(self._paused.value)

    def in_work(self) -> list[Mark]:
        """What is in work, in order of shard and row; also after the process has died."""
        marks = [
            Mark(
                shard=slot.shard,
                first_row=slot.first_row,
                num_rows=slot.num_rows,
                is_trial=bool(slot.is_trial),
                serial=slot.serial,
                is_read=bool(slot.is_read),
            )
            for slot in self._slots
            if slot.serial
        ]
        return sorted(marks, key=lambda mark: (mark.shard, mark.first_row))
