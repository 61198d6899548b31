"""Stages that run at the same time: a thread for each, a bounded queue after each, times kept."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

from pipeline.report import StageTimes

Item = TypeVar("Item")
POLL_S = 0.05
"""How often a blocked stage looks whether it has been closed."""


class _End:
    """Last element of a queue: the stage is done, or has failed with `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Awaited(Generic[Item]):
    """Items as they come from elsewhere, and the seconds for which they were waited for."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = items
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Item]:
        iterator = iter(self._items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited_s += time.perf_counter() - started
            yield item


class Stage(Generic[Item]):
    """Runs a generator in its own thread; iterate over the stage for its items, in order.

    An item may be None: "nothing for now". It is handed on like any other and counts no rows.

    The generator usually draws from the stage before it. Time that it spends blocked there, or
    waiting for room in its own queue, counts as waiting; the rest of its time is busy. On shared
    cores busy time includes being scheduled out, so it ranks stages and is no CPU time.

    Args:
        name: For the report and for notes on errors.
        items: The generator; run in the stage's thread from the first moment.
        upstream: What `items` draws from, if that has to be waited for: the stage before it.
        depth: Items that may wait in the queue.
        count: Rows of an item.
    """

    def __init__(
        self,
        name: str,
        items: Iterable[Item],
        *,
        upstream: Stage[object] | Awaited[object] | None = None,
        depth: int = 2,
        count: Callable[[Item], int],
    ) -> None:
        self.name = name
        self._items = items
        self._upstream = upstream
        self._count = count
        self._queue: queue.Queue[Item | _End] = queue.Queue(depth)
        self._closed = threading.Event()
        self.waited_s = 0.0
        """Seconds for which whoever draws from it was blocked."""
        self._total_s = 0.0
        self._put_wait_s = 0.0
        self._cpu_s = 0.0
        self._num_rows = 0
        self._thread = threading.Thread(target=self._run, name=f"stage-{name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            started = time.perf_counter()
            item = self._get()
            self.waited_s += time.perf_counter() - started
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    def _get(self) -> Item | _End:
        while not self._closed.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=POLL_S)
        return _End(None)

    def times(self) -> StageTimes:
        """What the stage has done so far; may be called from any thread at any moment."""
        starved_s = self._upstream.waited_s if self._upstream is not None else 0.0
        wait_s = starved_s + self._put_wait_s
        return StageTimes(
            busy_s=max(0.0, self._total_s - starved_s),
            wait_s=wait_s,
            items=self._num_rows,
            cpu_s=self._cpu_s,
        )

    def stop(self) -> None:
        """Ask the stage to end early: its iteration ends and its generator will be closed.

        To end a chain, stop all of its stages before joining any: a stage may be waiting for the
        one before it.
        """
        self._closed.set()

    def join(self) -> None:
        """Wait until the stage's thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        iterator = iter(self._items)
        try:
            while not self._closed.is_set():
                started = time.perf_counter()
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                finally:
                    self._total_s += time.perf_counter() - started
                    self._cpu_s = time.thread_time()
                if item is not None:
                    self._num_rows += self._count(item)
                self._put(item)
        except BaseException as caught:  # it is raised again by whoever iterates
            if not getattr(caught, "__notes__", None):  # else an earlier stage has raised it
                caught.add_note(f"Pipeline stage: {self.name}")
            error = caught
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
        self._put(_End(error))

    def _put(self, item: Item | _End) -> None:
        started = time.perf_counter()
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=POLL_S)
                break
        self._put_wait_s += time.perf_counter() - started
