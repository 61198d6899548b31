"""How long a fleet takes over many simulated nights, how few machines do, what ends growth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pipeline.fleet import MAX_TASKS, Fleet, Workload, phases_of
from pipeline.rates import Rates
from pipeline.simulate import SEED, SimulatedNight, simulate

MAX_LANES = 20_000
DEFAULT_SEEDS = 20
NEARLY_ALWAYS = 0.9
SEARCH_SEEDS = 3
"""Nights of each fleet that is only looked at on the way to the smallest."""
MAX_GROUPS = 200_000
"""Simulated in all for one forecast, at least of `SEARCH_SEEDS` nights: the larger a fleet, the
more alike are its nights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a night of so many rows on such a fleet would take: medians over the seeds."""

    rows: int
    shards: int
    lanes: int
    machines: int
    seeds: int
    wall_s: float
    """Process start to publication."""
    wall_low_s: float
    wall_high_s: float
    """Nine nights of ten are between these: from the 5th to the 95th percentile."""
    score_s: float
    """Until the last lane has finished, warm-up included."""
    plan_s: float
    publish_s: float
    busy: float
    """Share of the lanes' scoring time in which they have a group: the rest they wait for one."""
    store_busy: float
    """Share of the scoring time for which the store's limit is used."""
    tasks_busy: float
    """Share of the scoring time in which groups are handed out."""
    interruptions: float
    rows_replayed: float
    usd: float
    """All machines, to the end."""
    usd_high: float
    """95th percentile."""
    usd_per_100k: float
    bottleneck: str
    """What most of the wall time goes into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """Something that does not grow with the fleet, and the rows at which it alone fills a night."""

    name: str
    rows: float
    why: str


def forecast(rates: Rates, work: Workload, fleet: Fleet, *, seeds: int = DEFAULT_SEEDS) -> Forecast:
    """Forecast a night from at most `seeds` simulated ones; see `MAX_GROUPS`."""
    num_groups = min(work.shards, fleet.groups_per_lane * fleet.lanes)
    seeds = min(seeds, max(SEARCH_SEEDS, MAX_GROUPS // num_groups))
    nights = [simulate(rates, work, fleet, seed=SEED + seed) for seed in range(seeds)]
    phases = phases_of(rates, work, fleet.store)

    def of(name: str, percent: float = 50) -> float:
        return float(np.percentile([getattr(night, name) for night in nights], percent))

    return Forecast(
        rows=work.rows,
        shards=work.shards,
        lanes=fleet.lanes,
        machines=fleet.machines(rates),
        seeds=seeds,
        wall_s=of("wall_s"),
        wall_low_s=of("wall_s", 5),
        wall_high_s=of("wall_s", 95),
        score_s=of("score_s"),
        plan_s=phases.plan_s,
        publish_s=phases.publish_s,
        busy=of("busy"),
        store_busy=of("store_busy"),
        tasks_busy=of("tasks_busy"),
        interruptions=of("interruptions"),
        rows_replayed=of("rows_replayed"),
        usd=of("usd"),
        usd_high=of("usd", 95),
        usd_per_100k=of("usd") / work.rows * 100_000,
        bottleneck=_bottleneck(rates, work, fleet, nights[0]),
    )


def _bottleneck(rates: Rates, work: Workload, fleet: Fleet, night: SimulatedNight) -> str:
    """What most of the night's seconds go into; of scoring, what is busy nearly all the time."""
    phases = phases_of(rates, work, fleet.store)
    is_far = fleet.store.lane_s_per_shard > work.rows_per_shard / rates.rows_per_s
    shared = {"store requests": night.store_busy, "handing out groups": night.tasks_busy}
    name, share = max(shared.items(), key=lambda item: item[1])
    scoring = name if share > NEARLY_ALWAYS else "store latency" if is_far else "lanes"
    seconds = {
        "publishing": phases.publish_s,
        "planning": phases.plan_s,
        "start-up": phases.startup_s + phases.engine_s + phases.warmup_s,
        scoring: night.score_s - phases.warmup_s,
    }
    return max(seconds, key=lambda key: seconds[key])


def fewest_lanes(
    rates: Rates, work: Workload, fleet: Fleet, *, window_s: float, seeds: int = DEFAULT_SEEDS
) -> Forecast | None:
    """The forecast with the fewest machines, all their lanes used, that end within `window_s`.

    So do 19 nights of 20. Fewer machines are also cheaper: what starts, waits and is paid is less.

    Args:
        rates: Measured by a night that was.
        work: To be scored.
        fleet: All of it but the number of lanes.
        window_s: From process start to publication.
        seeds: Nights that are simulated of the answer.

    Returns:
        None when no number does: lanes beyond the number of shards do not help, and beyond
        `MAX_LANES` nobody has them. From 100 machines on the answer may be a per cent too high.
    """
    each = rates.lanes_per_machine
    fixed_s = phases_of(rates, work, fleet.store).all_s
    left_s = window_s - fixed_s
    if left_s <= 0:
        return None
    machines = math.ceil(work.rows / rates.rows_per_s / left_s / each)  # were nothing ever lost
    while machines <= math.ceil(min(work.shards, MAX_LANES) / each):
        candidate = replace(fleet, lanes=machines * each)
        for count in (SEARCH_SEEDS, seeds):
            found = forecast(rates, work, candidate, seeds=count)
            if found.wall_high_s > window_s:
                break
        else:
            return found
        # The part that machines share is too long by this; at a per cent nobody orders fewer.
        too_long = (found.wall_high_s - fixed_s) / left_s
        machines += max(1, machines // 100, int(machines * (too_long - 1)))
    return None


def ceilings(rates: Rates, work: Workload, fleet: Fleet, *, window_s: float) -> tuple[Ceiling, ...]:
    """What fills `window_s` alone, however many machines there are; the first to do so first."""
    shard_rows, store = work.rows_per_shard, fleet.store
    phases = phases_of(rates, work, store)
    plan_s = (phases.plan_s - rates.plan_s) / work.shards
    publish_s = (phases.publish_s - rates.publish_s) / work.shards
    lanes_full_s = window_s * rates.rows_per_s
    found = [
        Ceiling(
            name="publishing",
            rows=_at(window_s, publish_s) * shard_rows,
            why=f"{publish_s * 1e3:.3g} ms a shard to read the ledger and publish",
        ),
        Ceiling(
            name="planning",
            rows=_at(window_s, plan_s) * shard_rows,
            why=f"{plan_s * 1e3:.3g} ms a shard for footers",
        ),
        Ceiling(
            name="store requests",
            rows=_at(window_s, store.service_s_per_shard) * shard_rows,
            why=f"{_at(1, store.service_s_per_shard):,.0f} shards/s: all that {store.name} allows",
        ),
        Ceiling(
            name="Prefect's tasks",
            rows=MAX_TASKS / fleet.groups_per_lane * lanes_full_s,
            why=f"{MAX_TASKS:,} tasks, {fleet.groups_per_lane} a lane",
        ),
        Ceiling(
            name="handing out groups",
            rows=_at(window_s, fleet.groups_per_lane * fleet.task_s) * lanes_full_s,
            why=f"{fleet.task_s * 1e3:.3g} ms a group, {fleet.groups_per_lane} a lane",
        ),
    ]
    return tuple(
        sorted((each for each in found if each.rows < math.inf), key=lambda each: each.rows)
    )


def _at(seconds: float, each_s: float) -> float:
    """How many fit; any number of what takes no time."""
    return seconds / each_s if each_s else math.inf
