"""Work on several threads, results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[Item], Result],
    items: Iterable[Item | None],
    num_ahead: int,
) -> Generator[Result | None]:
    """Do the work of each item on the threads of a pool; yield the results in order.

    Args:
        pool: The threads.
        work: What is done with an item.
        items: Drawn only a few ahead. None says that there is none for now: all results of those
            before it are yielded, then None, and only then the next item is asked for.
        num_ahead: Items that may be drawn and not yielded yet.
    """
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            if item is None:
                while running:
                    yield running.popleft().result()
                yield None
                continue
            if len(running) >= num_ahead:
                yield running.popleft().result()
            running.append(pool.submit(work, item))
        while running:
            yield running.popleft().result()
    finally:
        # Those that work already still read their item, which the caller may use again.
        wait([future for future in running if not future.cancel()])


def map_ahead(
    work: Callable[[Item], Result], items: Iterable[Item | None], num_threads: int
) -> Generator[Result | None]:
    """The same on threads of its own, as many items ahead as there are threads.

    Args:
        work: What is done with an item.
        items: See `map_in_order`.
        num_threads: 0: in the calling thread, each when its turn comes.
    """
    if not num_threads:
        for item in items:
            yield None if item is None else work(item)
        return
    with (
        ThreadPoolExecutor(num_threads, "ahead") as pool,
        closing(map_in_order(pool, work, items, num_threads)) as results,
    ):
        yield from results
