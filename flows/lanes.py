"""The lanes of a run: how they get its shards and are ended, on this machine and on a cluster."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from flows.lookout import Lookout
from pipeline.engine import Say, get_engine
from pipeline.guards import NightWatch
from pipeline.lane import Lane, LaneDevice, LaneFigures
from pipeline.limit import add_times
from pipeline.plan import Shard
from pipeline.report import DeviceUse
from pipeline.run import GetEngine, PreparedRun, lane_setup
from pipeline.telemetry import Sampler

Group = Sequence[Shard]
MapGroups = Callable[[Callable[[Group], None], Sequence[Group], int], None]
"""Runs a function over all groups, so many at a time; raises what the function raises."""
GROUPS_PER_LANE = 8
"""Tasks stay coarse: a Prefect server does not like thousands, and the ledger keeps the details."""
CALLERS_PER_LANE = 2
"""Groups that a lane has at once, so that it never runs dry between two."""
PROGRESS_PERIOD_S = 0.25
DRAIN_PERIOD_S = 0.05


class Lanes(Protocol):
    """What scores the shards of a run."""

    @property
    def get_engine(self) -> GetEngine:
        """Finds or makes the engine, on a device of theirs."""

    @property
    def figures(self) -> Sequence[LaneFigures]:
        """Of the lanes that had a part in the run until now."""

    @property
    def num_machines(self) -> float:
        """Machines that the run pays, on average."""

    @property
    def is_at_work(self) -> bool:
        """Whether shards were handed in that are not committed yet."""

    def begin(self, say: Say) -> Sequence[LaneDevice]:
        """What they run on; waits for the first of them, and says so.

        On a cluster others may follow, on other kinds of devices.
        """

    def score(self, run: PreparedRun, lookout: Lookout, watch: NightWatch) -> tuple[DeviceUse, ...]:
        """Score all shards that the run has to do; what the devices did meanwhile."""

    def drain(self, grace_s: float) -> None:
        """Let them finish what they are at, for `grace_s` seconds or until the next signal."""

    def abort(self) -> None:
        """End them at once."""

    def close(self) -> None:
        """End them in good order, when all is done; then `figures` are final."""


class LocalLanes:
    """Lanes of this machine.

    Args:
        lanes: Their processes have begun.
        map_groups: How groups of shards are handed to them; threads by default.
    """

    def __init__(self, lanes: Sequence[Lane], map_groups: MapGroups | None = None) -> None:
        self._lanes = lanes
        self._map_groups = map_groups or map_in_threads

    @property
    def get_engine(self) -> GetEngine:
        """In this process, or one that is bound to the GPU."""
        return get_engine

    @property
    def figures(self) -> Sequence[LaneFigures]:
        """Of all of them."""
        return self._lanes

    @property
    def num_machines(self) -> float:
        """This one."""
        return 1.0

    @property
    def is_at_work(self) -> bool:
        """Whether one of them has shards left."""
        return any(lane.num_pending for lane in self._lanes)

    def begin(self, say: Say) -> Sequence[LaneDevice]:
        """They are there from the start."""
        del say
        return [lane.device for lane in self._lanes]

    def score(self, run: PreparedRun, lookout: Lookout, watch: NightWatch) -> tuple[DeviceUse, ...]:
        """Hand out groups, each to the lane that has the fewest shards left."""
        lanes = self._lanes
        for lane in lanes:
            lane.open(lane_setup(run, lane.device, len(lanes)))
        groups = split(run.todo, GROUPS_PER_LANE * len(lanes))

        choosing = threading.Lock()  # groups that come together must not all choose the same lane

        def score_group(group: Group) -> None:
            watch.check()  # a group that had not begun when another was stopped
            with choosing:
                futures = min(lanes, key=lambda lane: lane.num_pending).submit(group)
            for future in futures:
                watch.committed(future.result())

        devices = dict.fromkeys(lane.device.engine_device for lane in lanes)  # may share a CPU
        with Sampler(devices) as sampler, _watch(lanes, lookout):
            self._map_groups(score_group, groups, CALLERS_PER_LANE * len(lanes))
        return sampler.use()

    def drain(self, grace_s: float) -> None:
        """See `drain`."""
        drain(self._lanes, grace_s)

    def abort(self) -> None:
        """End their processes."""
        for lane in self._lanes:
            lane.abort()

    def close(self) -> None:
        """Wait for their processes, but for those of lanes that are kept."""
        for lane in self._lanes:
            lane.close()


@contextmanager
def _watch(lanes: Sequence[Lane], lookout: Lookout) -> Iterator[None]:
    done = threading.Event()

    def tell() -> None:
        while not done.wait(PROGRESS_PERIOD_S):
            lookout.look(add_times(lane.times() for lane in lanes))

    watcher = threading.Thread(target=tell, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def drain(lanes: Sequence[Lane], grace_s: float) -> None:
    """Let all lanes finish what they are at, for `grace_s` seconds or until the next signal."""
    deadline = time.monotonic() + grace_s
    for lane in lanes:
        lane.drain()
    with next_signals() as received:
        while any(not lane.wait(0.0) for lane in lanes):
            if time.monotonic() > deadline or received:
                return
            time.sleep(DRAIN_PERIOD_S)


@contextmanager
def next_signals() -> Iterator[list[int]]:
    """Where SIGINT and SIGTERM are put meanwhile; outside of the main thread nothing puts any.

    No `threading.Event`: a handler that sets the event for which its own thread waits can meet the
    event's lock taken, by that very wait, and never comes back.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in numbers
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def map_in_threads(
    score: Callable[[Group], None], groups: Sequence[Group], num_callers: int
) -> None:
    """Hand out groups from plain threads; no Prefect needed."""
    pool = ThreadPoolExecutor(num_callers, thread_name_prefix="group")
    try:
        for _ in pool.map(score, groups):
            pass
    finally:
        # Whoever called us ends the lanes when we raise; then the waiting threads end too.
        pool.shutdown(wait=False, cancel_futures=True)


def split(shards: Sequence[Shard], num_groups: int) -> list[Group]:
    """Consecutive groups of about equal numbers of shards, at most `num_groups`."""
    num_groups = min(num_groups, len(shards))
    bounds = [round(i * len(shards) / num_groups) for i in range(num_groups + 1)]
    return [shards[bounds[i] : bounds[i + 1]] for i in range(num_groups)]
