"""One night of a fleet that has not been, from measured rates: events, seconds and dollars.

The model is that of `flows/night.py`. Consecutive shards form some groups for each lane; a lane
that is free gets the next. A group takes as long as its rows at its machine's speed, each shard
with the measured spread. A machine that is taken away loses what its lanes had not committed; the
rest of their groups goes to the front of the queue, and another machine is there a while later.

What lanes share are servers with queues: the store, which allows so many requests a second, and the
process that hands out groups. Neither costs anything before it is saturated.

The unit is a group: 10^11 rows on a thousand lanes are 8,000 events, and nothing is scaled or cut
off for it. A real lane is given a group ahead, so as not to run dry. That binds groups a little
earlier; with 40 shards a lane the night takes under 1 % longer for it, with 10 of uneven size up to
8 %. What is left out: the bytes that a network carries, and machines of unlike kinds in one night.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.fleet import Fleet, Workload, phases_of
from pipeline.rates import Rates

SEED = 20261121
MAX_INTERRUPTIONS = 50_000
"""Of a night: one with more makes hardly any way between two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedNight:
    """What a night would take."""

    wall_s: float
    """Process start to publication."""
    score_s: float
    """From the engine's being found until the last lane has finished, warm-up included."""
    rows_scored: float
    rows_replayed: float
    """Of them, those that were scored once more because of interruptions."""
    interruptions: int
    busy: float
    """Share of the lanes' scoring time in which they have a group: the rest they wait for one."""
    store_busy: float
    """Share of the scoring time for which the store is at its limit."""
    tasks_busy: float
    """Share of the scoring time in which groups are handed out."""
    usd: float
    """All machines, for all of `wall_s` but for the time until a replacement is there."""


def simulate(
    rates: Rates,
    work: Workload,
    fleet: Fleet,
    *,
    seed: int = SEED,
    kills_s: Sequence[float] = (),
) -> SimulatedNight:
    """Simulate a night.

    Args:
        rates: Measured by a night that was.
        work: To be scored.
        fleet: That scores it. Lanes beyond the number of shards stand idle and cost. Where one
            machine has all lanes it also plans, and does so again after each interruption.
        seed: Of the spreads and of the interruptions; the same seed gives the same night.
        kills_s: Seconds after process start at which the first machine is taken away besides.

    Raises:
        ConfigError: Machines are taken away before they get anywhere; see `MAX_INTERRUPTIONS`.
    """
    night = _Night(rates, work, fleet, seed)
    return night.run(kills_s)


@dataclass(kw_only=True, slots=True)
class _Group:
    rows: float
    s_per_row: float
    """On a machine of mean speed."""


@dataclass(slots=True)
class _Lane:
    machine: int
    turn: int = 0
    """Events of an earlier one are stale: the machine was taken away in between."""
    group: _Group | None = None
    began_s: float = 0.0
    ends_s: float = 0.0
    rows: float = 0.0
    """Since its process began."""


_FREE, _TAKEN, _KILLED = range(3)


class _Night:
    def __init__(self, rates: Rates, work: Workload, fleet: Fleet, seed: int) -> None:
        self._rates, self._work, self._fleet = rates, work, fleet
        self._rng = np.random.default_rng(seed)
        self._phases = phases_of(rates, work, fleet.store)
        self._num_machines = fleet.machines(rates)
        each = rates.lanes_per_machine
        self._lanes = [_Lane(index // each) for index in range(fleet.lanes)]
        self._queue = deque(_cut(rates, work, fleet, self._rng))
        self._unfinished = len(self._queue)
        speeds = self._draw_speeds(self._num_machines)
        self._speeds = (speeds / speeds.mean()).tolist()
        self._task_s = fleet.task_s
        self._store_s_per_row = fleet.store.service_s_per_shard / work.rows_per_shard
        self._least_s_per_row = fleet.store.lane_s_per_shard / work.rows_per_shard
        self._idle: dict[int, None] = {}
        self._events: list[tuple[float, int, int, int, int]] = []
        self._num_events = 0
        self._store_free_s = self._store_busy_s = 0.0
        self._tasks_free_s = self._tasks_busy_s = 0.0
        self._busy_s = self._rows = self._replayed = 0.0
        self._taken_s: list[float] = []

    def run(self, kills_s: Sequence[float]) -> SimulatedNight:
        before_s = now = self._phases.before_s
        for index in range(len(self._lanes)):
            self._push(before_s, _FREE, index)
        for kill_s in kills_s:
            self._push(kill_s, _KILLED, 0)
        for machine in range(self._num_machines if self._fleet.interruptions_per_h else 0):
            self._push(self._next_cut_s(0.0), _TAKEN, machine)
        while self._unfinished:
            now, _, kind, index, turn = heapq.heappop(self._events)
            if kind != _FREE:
                self._take_away(index, now)
                if kind == _TAKEN:
                    self._push(self._next_cut_s(now + self._fleet.replacement_s), _TAKEN, index)
            elif turn == self._lanes[index].turn:
                self._finish(self._lanes[index])
                self._begin(index, now)
        return self._result(now)

    def _push(self, at_s: float, kind: int, index: int) -> None:
        self._num_events += 1  # events of one moment are taken in the order in which they came
        turn = self._lanes[index].turn if kind == _FREE else 0
        heapq.heappush(self._events, (at_s, self._num_events, kind, index, turn))

    def _next_cut_s(self, since_s: float) -> float:
        return since_s + self._rng.exponential(3600 / self._fleet.interruptions_per_h)

    def _begin(self, index: int, now: float) -> None:
        if not self._queue:
            self._idle[index] = None
            return
        lane, group = self._lanes[index], self._queue.popleft()
        begins_s = max(now, self._tasks_free_s)
        self._tasks_free_s = begins_s + self._task_s
        self._tasks_busy_s += self._task_s
        service_s = group.rows * self._store_s_per_row
        self._store_free_s = max(self._store_free_s, begins_s) + service_s
        self._store_busy_s += service_s
        s_per_row = max(group.s_per_row / self._speeds[lane.machine], self._least_s_per_row)
        alone_s = group.rows * s_per_row
        lane.group, lane.began_s = group, begins_s
        lane.ends_s = max(begins_s + alone_s, self._store_free_s)
        self._push(lane.ends_s, _FREE, index)

    def _finish(self, lane: _Lane) -> None:
        if lane.group is None:  # its process is ready
            return
        self._busy_s += lane.ends_s - lane.began_s
        self._rows += lane.group.rows
        lane.rows += lane.group.rows
        lane.group = None
        self._unfinished -= 1

    def _take_away(self, machine: int, now: float) -> None:
        if len(self._taken_s) == MAX_INTERRUPTIONS:
            raise ConfigError(
                f"{self._fleet.interruptions_per_h:g} interruptions an hour: {MAX_INTERRUPTIONS:,} "
                f"in a night that needs {self._restart_s():,.0f} s to go on; expected a night that "
                "ends. Give fewer, or fewer rows."
            )
        each = self._rates.lanes_per_machine
        self._taken_s.append(now)
        again_s = now + self._fleet.replacement_s + self._restart_s()
        self._speeds[machine] = float(self._draw_speeds(1)[0])
        for index in range(machine * each, min((machine + 1) * each, len(self._lanes))):
            lane = self._lanes[index]
            self._idle.pop(index, None)
            self._lose(lane, now)
            lane.turn, lane.group, lane.rows = lane.turn + 1, None, 0.0
            self._push(again_s, _FREE, index)
        while self._idle and self._queue:
            self._begin(self._idle.popitem()[0], now)

    def _lose(self, lane: _Lane, now: float) -> None:
        """Put back what is left of a lane's group, and what it had not committed."""
        if lane.group is None:
            return
        share = max(0.0, now - lane.began_s) / (lane.ends_s - lane.began_s)
        done = share * lane.group.rows
        lost = min(lane.rows + done, self._rng.random() * self._work.rows_at_risk)
        self._busy_s += max(0.0, now - lane.began_s)
        unused_s = (lane.group.rows - done) * self._store_s_per_row
        self._store_free_s -= unused_s
        self._store_busy_s -= unused_s
        self._replayed += lost
        self._rows += done - lost
        lane.group.rows -= done - lost
        self._queue.appendleft(lane.group)

    def _restart_s(self) -> float:
        phases = self._phases
        if self._num_machines == 1:
            return phases.before_s
        return phases.startup_s + phases.warmup_s

    def _draw_speeds(self, count: int) -> np.ndarray:
        return _lognormal(self._rng, np.full(count, self._fleet.machine_spread))

    def _result(self, ended_s: float) -> SimulatedNight:
        phases, fleet = self._phases, self._fleet
        wall_s = ended_s + phases.publish_s
        rows_s = ended_s - phases.before_s
        away_s = sum(min(fleet.replacement_s, ended_s - taken_s) for taken_s in self._taken_s)
        paid_s = self._num_machines * wall_s - away_s
        return SimulatedNight(
            wall_s=wall_s,
            score_s=phases.warmup_s + rows_s,
            rows_scored=self._rows,
            rows_replayed=self._replayed,
            interruptions=len(self._taken_s),
            busy=self._busy_s / (fleet.lanes * rows_s),
            store_busy=self._store_busy_s / rows_s,
            tasks_busy=self._tasks_busy_s / rows_s,
            usd=paid_s * self._rates.usd_per_hour / 3600,
        )


def _cut(rates: Rates, work: Workload, fleet: Fleet, rng: np.random.Generator) -> Iterator[_Group]:
    """The night's groups: as equal numbers of shards as can be, and none is empty."""
    num_groups = min(fleet.groups_per_lane * fleet.lanes, work.shards)
    bounds = np.rint(np.arange(num_groups + 1) * (work.shards / num_groups))
    shards = np.diff(bounds)
    rows = shards * (work.rows / work.shards)
    slowness = _lognormal(rng, rates.spread / np.sqrt(shards))
    slowness *= rows.sum() / (rows * slowness).sum()  # moves work between groups and makes none
    for num_rows, factor in zip(rows.tolist(), slowness.tolist(), strict=True):
        yield _Group(rows=num_rows, s_per_row=factor / rates.rows_per_s)


def _lognormal(rng: np.random.Generator, spread: np.ndarray) -> np.ndarray:
    """Factors of mean 1 with these standard deviations; none is below zero."""
    sigma_squared = np.log1p(spread**2)
    drawn = rng.standard_normal(len(spread))
    factors: np.ndarray = np.exp(np.sqrt(sigma_squared) * drawn - sigma_squared / 2)
    return factors
