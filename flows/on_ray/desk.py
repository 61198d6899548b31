"""The desk of a run on a cluster: lanes come for shards, bring records, and may vanish at any time.

It lives in the driver; lanes and driver call it, each from its own thread, and it calls nobody.
It may forget nothing but may be wrong about everything: what is done is in the ledger.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from engines.build import EngineRequest, ResolvedEngine
    from pipeline.config import Job
    from pipeline.lane import LaneDevice
    from pipeline.lane_messages import LaneSetup
    from pipeline.ledger import CommitRecord
    from pipeline.plan import Plan, Shard
    from pipeline.report import Ceilings, DeviceUse, StageTimes

P = ParamSpec("P")
R = TypeVar("R")
GROUPS_LEFT = 4
"""A group is this part of what a lane may expect to score yet: groups shrink towards the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """An engine that a lane is to find or to make, on the device that it holds."""

    job: Job
    plan: Plan
    request: EngineRequest
    fingerprint: str
    force: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """What a lane tells the desk; figures are those of all its processes until now."""

    records: tuple[CommitRecord, ...] = ()
    """Shards that were committed since it came last."""
    times: dict[str, StageTimes] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    rows_begun: int = 0
    said: tuple[str, ...] = ()
    built: ResolvedEngine | None = None
    """The engine that it was asked for."""
    uses: tuple[DeviceUse, ...] = ()
    """What its devices did; when it leaves."""
    error: Exception | None = None
    """Why it leaves, if it was not told to."""
    leaves: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What the desk answers."""

    build: Build | None = None
    setup: LaneSetup | None = None
    shards: tuple[Shard, ...] = ()
    drain: bool = False
    """Finish what is in work, and leave."""
    end: bool = False
    """There is nothing left to do: leave."""


@dataclass(slots=True)
class Seat:
    """What the desk knows of a lane."""

    lane: str
    node: str
    device: LaneDevice
    news: News = field(default_factory=News)
    """The last, without what was handed on."""
    num_rows: int = 0
    """Rows that it has committed."""
    rows_per_s: float = 0.0
    """Of its engine alone, when it was built; 0: it has none yet."""
    is_told: bool = False
    """Whether it knows what to score with."""
    is_draining: bool = False
    has_left: bool = False
    may_end: bool = False
    """Whether its task need not keep its place until the night is over: no other would get it."""

    @property
    def ceilings(self) -> Ceilings | None:
        """Its limits; None: not measured."""
        return self.news.ceilings

    @property
    def rows_begun(self) -> int:
        """Rows that it has begun to score, committed or not."""
        return self.news.rows_begun

    def times(self) -> dict[str, StageTimes]:
        """Stage times over all processes that it has had."""
        return self.news.times


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What happened since the driver looked last."""

    seats: tuple[Seat, ...]
    """Of all lanes that ever came, in the order in which they did."""
    records: tuple[CommitRecord, ...]
    said: tuple[str, ...]
    built: tuple[ResolvedEngine, ...]
    errors: tuple[tuple[str, Exception], ...]
    """Lanes that left with an error."""


def _one_at_a_time(
    method: Callable[Concatenate[Desk, P], R],
) -> Callable[Concatenate[Desk, P], R]:
    @functools.wraps(method)
    def alone(desk: Desk, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with desk._lock:
            return method(desk, *args, **kwargs)

    return alone


class Desk:
    """Hands out shards, and takes back those of lanes that vanish.

    A lane gets a group when at most its last one is left to it, so that it never runs dry. Groups
    shrink as the work does, and are larger for faster lanes, so that all end together. A slow lane
    gets none of the last shards where others would have scored all of them before it had one. When
    there is nothing left to hand out, a lane that is free gets what another one holds and has not
    come to yet: whoever commits first counts, and the other passes over it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_news = threading.Event()
        self._seats: dict[str, Seat] = {}
        self._todo: deque[Shard] = deque()
        self._held: dict[str, dict[int, Shard]] = {}
        """By lane: what it holds, in the order in which it takes it."""
        self._group_rows: dict[str, int] = {}
        self._committed: set[int] = set()
        self._setups: dict[str, LaneSetup] = {}
        self._builds: dict[str, Build] = {}
        self._records: list[CommitRecord] = []
        self._said: list[str] = []
        self._built: list[ResolvedEngine] = []
        self._errors: list[tuple[str, Exception]] = []
        self._arrived: set[str] = set()
        self._draining = self._ended = False

    @_one_at_a_time
    def arrive(self, lane: str) -> bool:
        """A lane's task begins; False: it came too late, and nobody will wait for it."""
        if not self._ended:
            self._arrived.add(lane)
        return not self._ended

    @property
    def arrived(self) -> frozenset[str]:
        """Lanes whose tasks began in time."""
        with self._lock:
            return frozenset({*self._arrived, *self._seats})

    @_one_at_a_time
    def join(self, lane: str, node: str, device: LaneDevice) -> None:
        """A lane is there."""
        self._seats[lane] = Seat(lane, node, device)
        self._held[lane] = {}
        self._has_news.set()

    @_one_at_a_time
    def turn(self, lane: str, news: News) -> Orders:
        """A lane tells what it did, and hears what to do next."""
        seat = self._seats[lane]
        if not seat.has_left:
            self._take(seat, news)
            if news.records or news.said or news.built or news.leaves:
                self._has_news.set()
        if news.leaves and not seat.has_left:
            self._leave(seat)
        if seat.has_left or self._ended:
            return Orders(end=self._ended or seat.may_end)
        if self._draining or seat.is_draining:
            return Orders(drain=True)
        setup = self._setups.pop(lane, None)
        seat.is_told = seat.is_told or setup is not None
        return Orders(
            build=self._builds.pop(lane, None),
            setup=setup,
            shards=self._next_group(seat) if seat.is_told else (),
        )

    def _take(self, seat: Seat, news: News) -> None:
        seat.news = News(
            times=news.times,
            ceilings=news.ceilings,
            rows_begun=news.rows_begun,
            uses=news.uses,
            error=news.error,
        )
        self._said += [f"{seat.node}: {text}" for text in news.said]
        self._built += [news.built] if news.built else []
        self._errors += [(seat.lane, news.error)] if news.error else []
        for record in news.records:
            self._held[seat.lane].pop(record.shard, None)
            if record.shard not in self._committed:
                self._committed.add(record.shard)
                self._records.append(record)
                seat.num_rows += record.num_rows

    def _next_group(self, seat: Seat) -> tuple[Shard, ...]:
        held = self._held[seat.lane]
        if _rows(held.values()) > self._group_rows.get(seat.lane, 0):
            return ()
        while self._todo and self._todo[0].index in self._committed:
            self._todo.popleft()
        if self._todo and self._is_too_late_for(seat):
            return ()
        group = self._cut(seat) if self._todo else self._spare(seat)
        self._held[seat.lane] |= {shard.index: shard for shard in group}
        if group:
            self._group_rows[seat.lane] = _rows(group)
        return group

    def _cut(self, seat: Seat) -> tuple[Shard, ...]:
        """Of what is left, a part of this lane's share."""
        speeds = self._speeds()
        share = speeds[seat.lane] / sum(speeds.values())
        wanted = math.ceil(_rows(self._todo) * share / GROUPS_LEFT)
        group: list[Shard] = []
        while self._todo and wanted > 0:
            group.append(self._todo.popleft())
            wanted -= group[-1].num_rows
        return tuple(group)

    def _speeds(self) -> dict[str, float]:
        """What each lane has committed until now, or would have by what its engine can do."""
        working = [seat for seat in self._seats.values() if not seat.has_left]
        known = [seat for seat in working if seat.num_rows and seat.rows_per_s]
        rate = sum(seat.rows_per_s for seat in known)
        scale = sum(seat.num_rows for seat in known) / rate if known else 1.0
        speeds = {seat.lane: seat.num_rows or seat.rows_per_s * scale for seat in working}
        told = [speed for speed in speeds.values() if speed]
        # A lane without an engine is taken for an average one.
        usual = sum(told) / len(told) if told else 1.0
        return {lane: speed or usual for lane, speed in speeds.items()}

    def _is_too_late_for(self, seat: Seat) -> bool:
        """Whether others would have scored all that is left before this lane had scored a shard.

        By what their engines can do: a lane that has only just come is not slow.
        """
        others = [
            other
            for other in self._seats.values()
            if other.is_told and not (other.has_left or other.is_draining or other is seat)
        ]
        if not others:
            return False
        held = {lane: _rows(shards.values()) for lane, shards in self._held.items()}
        one = self._todo[0].num_rows
        soonest_s = min((held[other.lane] + one) / other.rows_per_s for other in others)
        rows = _rows(self._todo) + sum(held[other.lane] for other in others)
        all_s = rows / sum(other.rows_per_s for other in others)
        return (held[seat.lane] + one) / seat.rows_per_s > max(soonest_s, all_s)

    def _spare(self, seat: Seat) -> tuple[Shard, ...]:
        """The last shard of the lane that holds the most, for one that holds none."""
        if self._held[seat.lane]:
            return ()
        most = max(self._held.values(), key=len, default={})
        shards = [shard for shard in most.values() if shard.index not in self._committed]
        return (shards[-1],) if len(shards) > 1 else ()

    def _leave(self, seat: Seat) -> None:
        seat.has_left = True
        back = self._held.pop(seat.lane, {})
        self._held[seat.lane] = {}
        self._builds.pop(seat.lane, None)
        lost = [shard for shard in back.values() if shard.index not in self._committed]
        self._todo.extendleft(reversed(lost))

    @_one_at_a_time
    def lost(self, lane: str) -> None:
        """A lane will not come any more; what it held is handed out again."""
        if lane in self._seats and not self._seats[lane].has_left:
            self._leave(self._seats[lane])

    @_one_at_a_time
    def put(self, shards: Sequence[Shard]) -> None:
        """Shards to hand out."""
        self._todo.extend(shards)

    @_one_at_a_time
    def tell(self, lane: str, setup: LaneSetup, rows_per_s: float) -> None:
        """What a lane scores with, and what its engine can do."""
        self._setups[lane] = setup
        self._seats[lane].rows_per_s = rows_per_s

    @_one_at_a_time
    def ask(self, lane: str, build: Build) -> None:
        """Let a lane find or make an engine."""
        self._builds[lane] = build

    @_one_at_a_time
    def release(self, lane: str, *, for_good: bool = False) -> None:
        """Let one lane finish what is in work, and leave; `for_good`: its node does so, too."""
        self._seats[lane].is_draining = True
        self._seats[lane].may_end |= for_good

    @_one_at_a_time
    def drain(self) -> None:
        """Let all lanes finish what is in work, and leave."""
        self._draining = True

    @_one_at_a_time
    def end(self) -> None:
        """Let all lanes leave."""
        self._ended = True

    def wait(self, timeout_s: float) -> None:
        """Until there is something to look at, or the time is up."""
        self._has_news.wait(timeout_s)

    @_one_at_a_time
    def look(self) -> Seen:
        """What happened since the last look."""
        self._has_news.clear()
        seen = Seen(
            seats=tuple(map(replace, self._seats.values())),
            records=tuple(self._records),
            said=tuple(self._said),
            built=tuple(self._built),
            errors=tuple(self._errors),
        )
        for news in (self._records, self._said, self._built, self._errors):
            news.clear()
        return seen


def _rows(shards: Iterable[Shard]) -> int:
    return sum(shard.num_rows for shard in shards)
