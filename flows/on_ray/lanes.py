"""The lanes of a run on a Ray cluster, as its driver sees them: asked for, followed, replaced.

Nodes may join and leave at any time. What a lost lane held is handed out again, and what it had
committed stays: the ledger is the truth, and nothing here has to be exact.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

from engines.build import EngineRequest, ResolvedEngine
from engines.errors import EngineNotFoundError
from flows.lanes import next_signals
from flows.lookout import Lookout
from flows.on_ray.desk import Seat, Seen
from flows.on_ray.engines import Engines, Wanted
from flows.on_ray.lane import SHARED
from pipeline.config import Job
from pipeline.engine import Say, open_store
from pipeline.errors import ConfigError, Interrupted, LaneError, one_line
from pipeline.guards import NightWatch
from pipeline.lane import LaneDevice, LaneFigures
from pipeline.limit import add_times
from pipeline.plan import Plan
from pipeline.report import DeviceUse
from pipeline.run import GetEngine, PreparedRun, engine_rate, lane_setup

log = logging.getLogger(__name__)

PERIOD_S = 0.1
BREATH_S = 0.02
"""Between two looks at least: lanes may be many."""
NODES_PERIOD_S = 2.0
"""Between two looks at which nodes there are."""
PATIENCE_S = 10.0
"""Without a lane for so long, it is said what is waited for."""
WAIT_S = 1800.0
"""Without a lane for so long, the run ends, to be resumed: machines may be hard to get."""
LEAVE_S = 10.0
"""For lanes to say their last figures when all is done."""
MAX_LOSSES = 8
"""Lanes that may be lost one after the other without a shard in between."""


def missing(error: ModuleNotFoundError) -> ConfigError:
    """What to say where Ray is not installed."""
    return ConfigError(
        f"lanes.runner: ray, but {error.name} is not installed; expected Ray. Install it with "
        "`pip install 'nightscore[ray]'`."
    )


class RayLanes:
    """Lanes on the nodes of a cluster, which is reached when there is something to do.

    Args:
        job: The job.
        submit: How lanes are handed to Ray; as plain tasks by default.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, job: Job, submit: Any = None) -> None:
        try:
            from flows.on_ray.cluster import Cluster
        except ModuleNotFoundError as error:
            raise missing(error) from None
        self._job = job
        self._new_cluster = functools.partial(Cluster, job, submit)
        self._is_connected = False
        self._say: Say = log.info
        self._seats: tuple[Seat, ...] = ()
        self._left: set[int] | None = None
        """Shards that are not committed; None: not known yet."""
        self._told: set[str] = set()
        """Lanes that know what to score with, or were sent away."""
        self._num_asked = self._num_losses = 0
        self._scoring_s = self._nodes_s = 0.0

    def connect(self) -> None:
        """Reach the cluster, and ask for lanes.

        Raises:
            ConfigError: It cannot be reached.
        """
        self._cluster = self._new_cluster()
        self._is_connected = True
        self._desk = self._cluster.open_desk()
        self._engines = Engines(self._job, self._desk)
        self._room = self._cluster.room()
        self._looked_at = self._worked_at = self._told_at = time.monotonic()
        self._ask_for_lanes()

    @property
    def figures(self) -> Sequence[LaneFigures]:
        """Of lanes that began a row."""
        return [seat for seat in self._seats if seat.rows_begun]

    @property
    def num_machines(self) -> float:
        """Nodes with lanes, on average while they scored; until then, those that are expected."""
        if self._scoring_s:
            return max(1.0, self._nodes_s / self._scoring_s)
        return max(1.0, min(self._num_wanted(), self._cluster.num_nodes()))

    @property
    def is_at_work(self) -> bool:
        """Whether a lane may be at a shard."""
        return bool(self._left) and bool(self._working)

    @property
    def _working(self) -> list[Seat]:
        return [seat for seat in self._seats if not seat.has_left]

    @property
    def get_engine(self) -> GetEngine:
        """From the store, or on a node of its kind: the first that there is; see engines.py."""
        return self._get_engine

    def begin(self, say: Say) -> Sequence[LaneDevice]:
        """What the first lane runs on, as often as there is room for lanes now.

        Others may be on other kinds of devices.
        """
        self._say = say
        self.connect()
        while not self._working:
            self._desk.wait(PERIOD_S)
            self._look()
        return [self._working[0].device] * max(1, self._count or self._room)

    def _get_engine(
        self,
        job: Job,
        plan: Plan,
        request: EngineRequest,
        fingerprint: str,
        say: Say,
        *,
        force: bool = False,
    ) -> ResolvedEngine:
        self._engines.want(Wanted(plan=plan, fingerprint=fingerprint, request=request, force=force))
        self._look()
        while (built := self._engines.first()) is None:
            self._desk.wait(PERIOD_S)
            self._look()
        store = open_store(job, say)
        try:
            engine = store.fetch(store.get(built.engine.key))
        except EngineNotFoundError:
            raise ConfigError(
                f"engine.store: {store.files.uri}: engine {built.engine.key[:12]}, which a node "
                f"just used, is not seen here; {SHARED}."
            ) from None
        return dataclasses.replace(built, engine=engine)

    def score(self, run: PreparedRun, lookout: Lookout, watch: NightWatch) -> tuple[DeviceUse, ...]:
        """Hand all shards to the desk, and follow what comes of them."""
        self._left = {shard.index for shard in run.todo}
        self._desk.put(run.todo)
        self._welcome(run, self._seats)
        looked_at = time.monotonic()
        while self._left:
            seen = self._look()
            before, looked_at = looked_at, time.monotonic()
            self._scoring_s += looked_at - before
            self._nodes_s += (looked_at - before) * len({seat.node for seat in self._working})
            self._welcome(run, seen.seats)
            for record in seen.records:
                self._left.discard(record.shard)
                watch.committed(record)
            lookout.look(add_times(seat.times() for seat in self._seats))
            time.sleep(BREATH_S)
            self._desk.wait(PERIOD_S)
        self._desk.end()
        self._wait_for_all(LEAVE_S)
        return _uses(self._seats)

    def _welcome(self, run: PreparedRun, seats: Sequence[Seat]) -> None:
        """Tell lanes what to score with, as soon as their kind has an engine."""
        for seat in seats:
            if seat.lane in self._told or seat.has_left:
                continue
            kind, device = self._engines.kind_of(seat), seat.device
            if kind.why_not:
                self._desk.release(seat.lane)
                self._left_out(seat)
            elif kind.resolved:
                self._told.add(seat.lane)
                engine = kind.resolved.engine
                run.engines.setdefault(engine.key, kind.resolved)
                own = dataclasses.replace(run, job=kind.job, resolved=kind.resolved)
                rate = engine_rate(engine.manifest, device)
                self._desk.tell(seat.lane, lane_setup(own, device, 1), rate)
                self._say(f"{seat.node}: its lane begins to score")

    def _left_out(self, seat: Seat) -> None:
        self._told.add(seat.lane)
        kind = self._engines.kind_of(seat)
        self._say(f"{seat.node}: its {kind.name} is left out, as {kind.why_not}")

    def _look(self) -> Seen:
        """What happened; raises what stops the run, and replaces lanes that are gone."""
        seen = self._desk.look()
        self._seats = seen.seats
        for text in seen.said:
            self._say(text)
        if seen.records:
            self._num_losses = 0
        known = {seat.lane: seat for seat in seen.seats}
        for lane, error in seen.errors:
            if isinstance(error, LaneError):
                self._lost(lane, error)
            elif self._engines.leave_out(known[lane], error):
                self._left_out(known[lane])
            else:
                raise error
        for lane, why in self._cluster.ended().items():
            self._desk.lost(lane)
            if lane not in known and isinstance(why, ConfigError):
                raise why
            if lane not in known or not known[lane].has_left:
                self._lost(lane, why)
        self._engines.look(seen.seats, seen.built)
        self._look_at_nodes()
        self._ask_for_lanes()
        self._check_patience()
        return seen

    def _lost(self, lane: str, why: Exception | None) -> None:
        where = next((seat.node for seat in self._seats if seat.lane == lane), "a node")
        said = one_line(why).split(". ")[0] if why else "it ended"
        self._num_losses += 1
        if self._num_losses > MAX_LOSSES:
            raise LaneError(
                f"Ray: {self._num_losses} lanes were lost one after the other, the last one on "
                f"{where}: {said}; expected them to live. Committed shards are kept; look at Ray's "
                "log of that node."
            )
        self._say(f"{where}: its lane is lost, and what it held goes to others ({said})")

    def _look_at_nodes(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < NODES_PERIOD_S:
            return
        self._looked_at, self._room = now, self._cluster.room()
        leaving = self._cluster.leaving()
        for seat in self._seats:
            if seat.node not in leaving or seat.may_end:
                continue
            if not (seat.has_left or seat.is_draining):
                self._say(f"{seat.node}: about to be taken away; its lane finishes what is in work")
            self._desk.release(seat.lane, for_good=True)

    @property
    def _count(self) -> int | None:
        """What the job says."""
        lanes = self._job.lanes
        return lanes.count if "count" in lanes.model_fields_set else None

    def _num_wanted(self) -> int:
        """As many as the job says, or as there is room for and one that waits for more room."""
        wanted = self._count or self._room + 1
        return wanted if self._left is None else min(wanted, len(self._left))

    def _ask_for_lanes(self) -> None:
        gone = {seat.lane for seat in self._seats if seat.has_left}
        num_there = sum(lane not in gone for lane in self._cluster.lanes)
        for _ in range(self._num_wanted() - num_there):
            self._num_asked += 1
            self._cluster.start_lane(f"lane{self._num_asked}", self._job)

    def _check_patience(self) -> None:
        now = time.monotonic()
        if self._working:
            self._worked_at = now
        if now - self._worked_at > WAIT_S:
            raise Interrupted(
                f"Ray: no node with {self._cluster.need} for {WAIT_S / 60:.0f} minutes; expected "
                "one at least. Add nodes, and run the same command again."
            )
        if now - max(self._worked_at, self._told_at) > PATIENCE_S:
            self._told_at = now + WAIT_S / 30
            self._say(f"waiting for a node of the Ray cluster with {self._cluster.need}")

    @property
    def _leaving(self) -> bool:
        """Whether a lane that had work has figures to tell yet."""
        return any(seat.lane in self._told for seat in self._working)

    def _wait_for_all(self, timeout_s: float) -> None:
        """Until these lanes and their tasks have ended, or the time is up, or a signal comes."""
        deadline = time.monotonic() + timeout_s
        with next_signals() as received:
            while self._leaving and time.monotonic() < deadline and not received:
                self._seats = self._desk.look().seats
                for lane in self._cluster.ended():
                    self._desk.lost(lane)
                self._desk.wait(PERIOD_S)
            self._desk.end()
            # Their tasks, too, and those of lanes that just began: Prefect is told by them that
            # they have ended. After the end none begins.
            arrived = self._desk.arrived
            while arrived & {*self._cluster.lanes} and time.monotonic() < deadline and not received:
                self._cluster.ended()
                time.sleep(BREATH_S)

    def drain(self, grace_s: float) -> None:
        """Let lanes finish what they are at, for `grace_s` seconds or until the next signal."""
        self._desk.drain()
        self._wait_for_all(grace_s)

    def abort(self) -> None:
        """Leave the cluster: Ray ends our lanes at once."""
        self.close()

    def close(self) -> None:
        """Leave the cluster; the last figures are known by now."""
        if self._is_connected:
            self._cluster.close()


def _uses(seats: Sequence[Seat]) -> tuple[DeviceUse, ...]:
    """What the devices of all nodes did; lanes on one node saw the same processor."""
    found: dict[tuple[str, str, str | None], DeviceUse] = {}
    for seat in seats:
        for use in seat.news.uses:
            found.setdefault((seat.node, use.kind, use.uuid), use)
    return tuple(found.values())
