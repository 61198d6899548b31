"""A simulated night: no row is lost, simple nights are exact, faults cost what they must."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
from simulation_cases import RATES

from pipeline.errors import ConfigError
from pipeline.fleet import S3, Fleet, Store, Workload, phases_of
from pipeline.rates import Rates
from pipeline.simulate import SimulatedNight, simulate

EVEN = replace(RATES, spread=0.0)
AT_RISK = 1_500.0
BEFORE_S, AFTER_S = 2 + 0.5 + 0.25 + 3, 0.25
START_S = 2 + 3


def work(rows: int) -> Workload:
    return Workload(rows=rows, rows_per_shard=1_000, rows_at_risk=AT_RISK)


def night(
    rates: Rates, rows: int, lanes: int, *, seed: int = 1, kills_s: Any = (), **more: Any
) -> SimulatedNight:
    fleet = Fleet(lanes=lanes, groups_per_lane=8, **more)
    return simulate(rates, work(rows), fleet, seed=seed, kills_s=kills_s)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_one_lane_without_faults_takes_its_rows_by_its_rate_and_the_phases(spread: float) -> None:
    """800 shards of 1,000 rows, and 3 ms for each."""
    found = night(replace(RATES, spread=spread), 800_000, 1)
    assert found.wall_s == pytest.approx(8_000 + BEFORE_S + AFTER_S + 800 * 0.003)
    assert found.score_s == pytest.approx(8_000 + 3)
    assert (found.interruptions, found.rows_replayed) == (0, 0)
    assert found.busy == pytest.approx(1)
    assert found.usd == pytest.approx(found.wall_s * 0.0001)


@pytest.mark.parametrize("lanes", [2, 5, 10])
def test_even_lanes_share_the_rows(lanes: int) -> None:
    found = night(EVEN, 800_000, lanes)
    assert found.wall_s == pytest.approx(8_000 / lanes + BEFORE_S + AFTER_S + 2.4)
    assert found.usd == pytest.approx(lanes * found.wall_s * 0.0001)


FAULTY = {
    "calm": {},
    "interrupted": {"interruptions_per_h": 5.0, "replacement_s": 60.0},
    "uneven": {"machine_spread": 0.3, "interruptions_per_h": 1.0},
    "throttled": {"store": replace(S3, max_writes_per_s=1.0), "interruptions_per_h": 2.0},
}


@pytest.mark.parametrize("fleet", FAULTY.values(), ids=FAULTY)
@pytest.mark.parametrize("lanes", [1, 7, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_scored_whatever_happens(fleet: Any, lanes: int, seed: int) -> None:
    found = night(RATES, 1_234_567, lanes, seed=seed, **fleet)
    assert found.rows_scored == pytest.approx(1_234_567)
    scoring_s = found.score_s - RATES.warmup_s
    least_s = (1_234_567 + found.rows_replayed) / 100
    if not fleet:
        assert found.busy * lanes * scoring_s == pytest.approx(least_s), "no work is made or lost"


@pytest.mark.parametrize("rows", [1_000, 40_000, 999_999, 50_000_000])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_twice_the_lanes_are_never_slower(rows: int, spread: float) -> None:
    """On average: where a lane has one shard or two, the slowest shard is the night."""
    rates = replace(RATES, spread=spread)
    walls = [
        fmean(night(rates, rows, 2**power, seed=seed).wall_s for seed in range(9))
        for power in range(9)
    ]
    assert all(more <= 1.005 * fewer for fewer, more in pairwise(walls))


def test_more_lanes_than_shards_cannot_help_but_cost() -> None:
    few, many = night(EVEN, 10_000, 10), night(EVEN, 10_000, 40)
    assert few.wall_s == many.wall_s == pytest.approx(10 + BEFORE_S + AFTER_S + 0.03)
    assert many.usd == pytest.approx(4 * few.usd)
    assert many.busy == pytest.approx(0.25)


@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_more_spread_lets_lanes_wait_for_the_last(lanes: int) -> None:
    even, odd = night(EVEN, 5_000_000, lanes), night(RATES, 5_000_000, lanes)
    assert odd.wall_s == pytest.approx(even.wall_s) if lanes == 1 else odd.wall_s > even.wall_s


def test_slow_machines_are_waited_for_but_one_machine_is_what_was_measured() -> None:
    alike, unlike = (night(EVEN, 5_000_000, 40, machine_spread=spread) for spread in (0.0, 0.2))
    assert 1.02 < unlike.wall_s / alike.wall_s < 1.3
    assert night(EVEN, 5_000_000, 1, machine_spread=0.2) == night(EVEN, 5_000_000, 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_kill_of_the_only_machine_costs_a_start_and_at_most_what_is_at_risk(seed: int) -> None:
    calm = night(RATES, 800_000, 1, seed=seed)
    killed = night(RATES, 800_000, 1, seed=seed, kills_s=[4_000.0], replacement_s=30.0)
    assert killed.interruptions == 1
    assert 0 <= killed.rows_replayed <= AT_RISK
    # It plans once more; and rows of one shard take longer than those of another.
    extra_s = killed.wall_s - calm.wall_s - 30 - BEFORE_S - 0.8
    assert extra_s == pytest.approx(killed.rows_replayed / 100, rel=0.5)
    assert killed.usd == pytest.approx((killed.wall_s - 30) * 0.0001), "not paid while away"


def test_what_a_kill_loses_is_half_of_what_is_at_risk_on_average() -> None:
    lost = [
        night(EVEN, 800_000, 1, seed=seed, kills_s=[4_000.0]).rows_replayed for seed in range(400)
    ]
    assert sum(lost) / 400 == pytest.approx(AT_RISK / 2, rel=0.1)


def test_a_kill_before_the_first_row_costs_a_start_and_no_rows() -> None:
    killed = night(EVEN, 800_000, 1, kills_s=[4.0])
    assert killed.rows_replayed == 0
    assert killed.wall_s == pytest.approx(night(EVEN, 800_000, 1).wall_s + 4)


def test_other_machines_take_over_while_one_is_away() -> None:
    """One of ten goes for good after four groups of 1,000 s: nine do the 40 that are left."""
    found = night(EVEN, 8_000_000, 10, kills_s=[4_000.0 + BEFORE_S + 8], replacement_s=1e6)
    assert found.score_s - 3 == pytest.approx(4_000 + 5 * 1_000, rel=0.001)


def test_a_machine_takes_all_its_lanes_with_it() -> None:
    rates = replace(EVEN, lanes_per_machine=4)
    found = night(rates, 8_000_000, 8, kills_s=[4_000.0])
    assert found.interruptions == 1
    assert 0 < found.rows_replayed <= 4 * AT_RISK
    assert found.rows_replayed > AT_RISK


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("lanes", [1, 4, 50])
def test_interruptions_are_never_faster_and_cost_rows(lanes: int, seed: int) -> None:
    calm = night(RATES, 2_000_000, lanes, seed=seed)
    rough = night(RATES, 2_000_000, lanes, seed=seed, interruptions_per_h=3.0)
    assert rough.interruptions > 0
    assert rough.wall_s > calm.wall_s
    assert rough.usd > calm.usd
    assert rough.rows_replayed <= rough.interruptions * AT_RISK


def test_interruptions_come_as_often_as_asked() -> None:
    nights = [night(EVEN, 72_000_000, 20, seed=seed, interruptions_per_h=2) for seed in range(5)]
    hours = sum(20 * each.wall_s / 3600 for each in nights)
    assert sum(each.interruptions for each in nights) / hours == pytest.approx(2, rel=0.1)


def test_a_night_that_makes_no_way_is_refused() -> None:
    """Every three minutes, and an hour of planning before the first row."""
    rates = replace(EVEN, plan_s=3_600.0)
    with pytest.raises(ConfigError, match="20 interruptions an hour: 50,000 in a night"):
        night(rates, 800_000, 1, interruptions_per_h=20.0)


def test_the_same_seed_gives_the_same_night_and_another_seed_another() -> None:
    how: Any = {"interruptions_per_h": 1, "machine_spread": 0.1}
    first, again, other = (night(RATES, 5_000_000, 16, seed=seed, **how) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_store_that_allows_two_shards_a_second_makes_a_night_of_its_own() -> None:
    """100 lanes would score 10 shards a second, 10 lanes one."""
    store = Store(name="slow", writes_per_shard=2, max_writes_per_s=4)
    free, bound = night(EVEN, 8_000_000, 100), night(EVEN, 8_000_000, 100, store=store)
    assert free.score_s - 3 == pytest.approx(800)
    assert bound.score_s - 3 == pytest.approx(8_000 / 2)
    assert bound.store_busy == pytest.approx(1)
    few, few_bound = night(EVEN, 8_000_000, 10), night(EVEN, 8_000_000, 10, store=store)
    assert few.wall_s == few_bound.wall_s
    assert few_bound.store_busy == pytest.approx(0.5)


def test_small_shards_wait_for_a_slow_store() -> None:
    """A shard of 10 s has five requests of 3 s one after the other."""
    store = Store(name="far", reads_per_shard=5, latency_s=3)
    assert night(EVEN, 800_000, 1, store=store).score_s - 3 == pytest.approx(800 * 15)


def test_handing_out_groups_slowly_holds_up_large_fleets_only() -> None:
    """8 groups a lane, 1 s each to hand out: 1,000 lanes take 8,000 s for work of 1,000 s."""
    assert night(EVEN, 10**8, 1_000, task_s=1).score_s == pytest.approx(8_000, rel=0.05)
    assert night(EVEN, 10**6, 10, task_s=1).score_s == pytest.approx(1_000, rel=0.03)


def test_planning_and_publishing_take_what_is_slower_process_or_store() -> None:
    phases = phases_of(RATES, replace(work(1_000_000), files_per_shard=2), S3)
    assert phases.plan_s == pytest.approx(0.5 + 1_000 * 2 * 3 * 0.1 / 16)
    assert phases.publish_s == pytest.approx(0.25 + 1_000 * 0.007)
    throttled = replace(S3, max_writes_per_s=10)
    assert phases_of(RATES, work(1_000_000), throttled).publish_s == pytest.approx(100.25)
