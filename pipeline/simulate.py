"""A night that has not been, from the rates of one that has: seconds and dollars.

The model is that of `flows/night.py`: consecutive shards form some groups for each lane, and the
lane that ends first gets the next in order. A group's time is that of its shards, each of them with
the measured spread, so that the last lane to finish decides. Only groups are simulated, never
shards or rows: 10^10 rows on thousands of lanes take a tenth of a second, and nothing is scaled or
cut off for it.

A real lane is given a group ahead, so as not to run dry. That binds groups a little earlier; with
40 shards a lane the night takes under 1 % longer for it, with 10 of uneven size up to 8 %.

What it leaves out: machines that are slower than others for a whole night, and a disk, network or
database that all lanes share. With one lane none of that matters.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.rates import Rates

SEED = 20261121
MAX_LANES = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a night of so many rows on so many lanes would take."""

    rows: int
    shards: int
    lanes: int
    machines: int
    wall_s: float
    """Process start to publication."""
    score_s: float
    """Until the last lane has finished, warm-up included."""
    busy: float
    """Share of the lanes' scoring time in which they score: the rest they wait for the last one."""
    interruptions: int
    usd: float
    """All machines, for all of `wall_s`."""
    usd_per_100k: float


def simulate(
    rates: Rates,
    *,
    rows: int,
    lanes: int,
    groups_per_lane: int,
    interruptions_per_h: float = 0.0,
    seed: int = SEED,
) -> Forecast:
    """Forecast a night.

    Args:
        rates: Measured by a night that was.
        rows: To score; at least 1.
        lanes: At least 1; those beyond the number of shards stand idle and cost.
        groups_per_lane: In which shards are handed out.
        interruptions_per_h: How often a lane's machine is taken away. Each time the shard that it
            is at, half done on average, is scored again, after another start and warm-up.
        seed: Of the spread and of the interruptions; the same seed gives the same night.
    """
    shards = max(1, round(rows / rates.rows_per_shard))
    rng = np.random.default_rng(seed)
    sizes = _group_sizes(shards, groups_per_lane * lanes)
    shard_s = rows / shards / rates.rows_per_s
    busy_s = rows / rates.rows_per_s
    group_s = sizes * _unevenness(rng, sizes, rates.spread)
    group_s *= busy_s / group_s.sum()  # the spread moves work between groups and makes none
    cuts = rng.poisson(group_s * interruptions_per_h / 3600)
    group_s += cuts * (rates.startup_s + rates.warmup_s + shard_s / 2)
    lanes_s = _last_end(group_s.tolist(), lanes)
    wall_s = lanes_s + fixed_s(rates, shards)
    machines = math.ceil(lanes / rates.lanes_per_machine)
    usd = machines * rates.usd_per_hour * wall_s / 3600
    return Forecast(
        rows=rows,
        shards=shards,
        lanes=lanes,
        machines=machines,
        wall_s=wall_s,
        score_s=rates.warmup_s + lanes_s,
        busy=busy_s / (lanes * lanes_s),
        interruptions=int(cuts.sum()),
        usd=usd,
        usd_per_100k=usd / rows * 100_000,
    )


def fixed_s(rates: Rates, shards: int) -> float:
    """Seconds of a night in which no lane is at its rate, however many lanes there are."""
    once_s = rates.startup_s + rates.plan_s + rates.engine_s + rates.warmup_s + rates.publish_s
    return once_s + shards * (rates.plan_s_per_shard + rates.publish_s_per_shard)


def fewest_lanes(
    rates: Rates,
    *,
    rows: int,
    window_s: float,
    groups_per_lane: int,
    interruptions_per_h: float = 0.0,
) -> Forecast | None:
    """The forecast with the fewest machines, all their lanes used, that end within `window_s`.

    None when no number does: lanes beyond the number of shards do not help, and beyond
    `MAX_LANES` nobody has them. From 200 machines on the answer may be a per cent too high.
    """
    shards = max(1, round(rows / rates.rows_per_shard))
    left_s = window_s - fixed_s(rates, shards)
    if left_s <= 0:
        return None
    each = rates.lanes_per_machine
    machines = math.ceil(rows / rates.rows_per_s / left_s / each)
    while machines <= math.ceil(min(shards, MAX_LANES) / each):
        lanes = machines * each
        found = simulate(
            rates,
            rows=rows,
            lanes=lanes,
            groups_per_lane=groups_per_lane,
            interruptions_per_h=interruptions_per_h,
        )
        if found.wall_s <= window_s:
            return found
        machines += max(1, machines // 100)  # nobody orders 1,003 machines and not 1,010
    return None


def _group_sizes(shards: int, groups: int) -> np.ndarray:
    """Shards of each group, as equal as they can be; no group is empty."""
    groups = min(groups, shards)
    bounds = np.rint(np.arange(groups + 1) * (shards / groups)).astype(np.int64)
    return np.diff(bounds)


def _unevenness(rng: np.random.Generator, sizes: np.ndarray, spread: float) -> np.ndarray:
    """Factors of mean 1 by which groups take longer: lognormal, as no time is below zero."""
    sigma_squared = np.log1p(spread**2 / sizes)
    drawn = rng.standard_normal(len(sizes))
    return np.exp(np.sqrt(sigma_squared) * drawn - sigma_squared / 2)


def _last_end(group_s: Sequence[float], lanes: int) -> float:
    """When the last lane has finished: groups in order, each to the lane that ends first."""
    ends = [0.0] * lanes
    for seconds in group_s:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)
