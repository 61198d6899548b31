"""Forecasts: nothing is lost, more lanes help, interruptions cost, and simple nights are exact."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest

from pipeline.rates import Rates
from pipeline.simulate import Forecast, fewest_lanes, fixed_s, simulate

GROUPS_PER_LANE = 8
RATES = Rates(
    rows_per_s=100.0,
    spread=0.3,
    timed_shards=50,
    rows_per_shard=1_000,
    lanes_per_machine=1,
    usd_per_hour=0.36,
    startup_s=2.0,
    warmup_s=3.0,
    plan_s=0.5,
    plan_s_per_shard=0.001,
    engine_s=0.25,
    publish_s=0.25,
    publish_s_per_shard=0.002,
)
EVEN = dataclasses.replace(RATES, spread=0.0)


def night(rates: Rates, rows: int, lanes: int, **more: float) -> Forecast:
    how: dict[str, Any] = {"groups_per_lane": GROUPS_PER_LANE, **more}
    return simulate(rates, rows=rows, lanes=lanes, **how)


@pytest.mark.parametrize("lanes", [1, 2, 5, 10])
def test_without_spread_a_night_is_the_closed_form(lanes: int) -> None:
    """800 shards of 1,000 rows at 100 rows/s are 8,000 s of a lane; 2 + 3 + .5 + .25 + .25 s, and
    800 times 3 ms, are spent once."""
    found = night(EVEN, 800_000, lanes)
    assert (found.shards, found.machines, found.interruptions) == (800, lanes, 0)
    assert found.wall_s == pytest.approx(8_000 / lanes + 6 + 2.4)
    assert found.score_s == pytest.approx(8_000 / lanes + 3)
    assert found.busy == pytest.approx(1)
    assert found.usd == pytest.approx(lanes * found.wall_s * 0.0001)
    assert found.usd_per_100k == pytest.approx(found.usd / 8)


def test_more_lanes_than_shards_cannot_help_but_cost() -> None:
    few, many = night(EVEN, 10_000, 10), night(EVEN, 10_000, 40)
    assert few.wall_s == many.wall_s == pytest.approx(10 + 6 + 0.03)
    assert many.usd == pytest.approx(4 * few.usd)
    assert many.busy == pytest.approx(0.25)


@pytest.mark.parametrize("lanes", [1, 3, 8, 100])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 2.0])
def test_the_spread_neither_makes_work_nor_loses_any(spread: float, lanes: int) -> None:
    found = night(dataclasses.replace(RATES, spread=spread), 1_234_567, lanes)
    scoring_s = found.score_s - RATES.warmup_s
    assert found.busy * lanes * scoring_s == pytest.approx(12_345.67)
    assert found.busy <= 1 + 1e-9
    assert found.wall_s - scoring_s == pytest.approx(fixed_s(RATES, found.shards))


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1_000, 40_000, 999_999, 50_000_000])
def test_twice_the_lanes_are_never_slower(rows: int, spread: float) -> None:
    rates = dataclasses.replace(RATES, spread=spread)
    walls = [night(rates, rows, 2**power).wall_s for power in range(9)]
    assert walls == sorted(walls, reverse=True)


@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_more_spread_lets_lanes_wait_for_the_last(lanes: int) -> None:
    even, odd = night(EVEN, 5_000_000, lanes), night(RATES, 5_000_000, lanes)
    assert odd.wall_s == pytest.approx(even.wall_s) if lanes == 1 else odd.wall_s > even.wall_s


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("lanes", [1, 4, 50])
def test_interruptions_are_never_cheaper(lanes: int, seed: int) -> None:
    calm = night(RATES, 2_000_000, lanes, seed=seed)
    rough = night(RATES, 2_000_000, lanes, seed=seed, interruptions_per_h=3.0)
    assert rough.interruptions > 0
    assert rough.wall_s > calm.wall_s
    assert rough.usd > calm.usd


def test_on_one_lane_each_interruption_costs_half_a_shard_and_a_start() -> None:
    calm, rough = (night(EVEN, 800_000, 1, interruptions_per_h=rate) for rate in (0.0, 5.0))
    assert 3 <= rough.interruptions <= 25, "8,000 s at 5 an hour are 11, give or take"
    assert rough.wall_s - calm.wall_s == pytest.approx(rough.interruptions * (2 + 3 + 5))


def test_the_same_seed_gives_the_same_night_and_another_seed_another() -> None:
    first, again, other = (
        night(RATES, 5_000_000, 16, seed=seed, interruptions_per_h=1) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_machines_of_several_lanes_are_paid_whole() -> None:
    rates = dataclasses.replace(EVEN, lanes_per_machine=4)
    found = night(rates, 800_000, 5)
    assert found.machines == 2
    assert found.usd == pytest.approx(2 * found.wall_s * 0.0001)


def fewest(rates: Rates, rows: int, window_s: float) -> Forecast | None:
    return fewest_lanes(rates, rows=rows, window_s=window_s, groups_per_lane=GROUPS_PER_LANE)


@pytest.mark.parametrize("window_s", [100, 1_000, 7_000, 20_000])
def test_the_fewest_lanes_fit_and_one_lane_less_does_not(window_s: float) -> None:
    found = fewest(RATES, 800_000, window_s)
    assert found is not None
    assert found == night(RATES, 800_000, found.lanes)
    assert found.wall_s <= window_s
    if found.lanes > 1:
        assert night(RATES, 800_000, found.lanes - 1).wall_s > window_s


def test_the_fewest_lanes_are_those_of_whole_machines() -> None:
    found = fewest(dataclasses.replace(EVEN, lanes_per_machine=4), 800_000, 2_000)
    assert found is not None
    assert (found.lanes, found.machines) == (8, 2)


@pytest.mark.parametrize(
    ("rows", "window_s"),
    [
        pytest.param(800_000, 8.0, id="start, plan and publication alone take longer"),
        pytest.param(800_000, 12.0, id="a single shard takes longer"),
        pytest.param(10**12, 10**5, id="nobody has so many machines"),
    ],
)
def test_some_windows_no_number_of_lanes_can_hold(rows: int, window_s: float) -> None:
    assert fewest(RATES, rows, window_s) is None


def test_ten_thousand_million_rows_are_forecast_at_once() -> None:
    rates = dataclasses.replace(RATES, plan_s_per_shard=0.0, publish_s_per_shard=0.0)
    began = time.perf_counter()
    found = fewest(rates, 10**10, 4 * 3600)
    assert time.perf_counter() - began < 2
    assert found is not None
    assert found.shards == 10**7
    ideal = math.ceil(10**10 / 100 / (4 * 3600))
    assert ideal <= found.lanes < 1.05 * ideal
