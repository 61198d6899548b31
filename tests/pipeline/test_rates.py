"""Rates of a night, from its report and its commit records."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable

import pytest

from pipeline.ledger import CommitRecord, PartFile
from pipeline.rates import measure_rates, most_telling
from pipeline.report import Phases, RunReport

BEGIN = datetime.datetime(2026, 11, 20, tzinfo=datetime.UTC)
PART = PartFile(name="part", num_bytes=1, sha256="0", num_rows=1)


def records(
    times_s: Iterable[float], rows: int = 100, owner: str = "me", first: int = 0
) -> dict[int, CommitRecord]:
    found = {}
    for index, second in enumerate(times_s, first):
        found[index] = CommitRecord(
            shard=index,
            file="a.parquet",
            row_groups=(index,),
            first_row=index * rows,
            num_rows=rows,
            num_scored=rows,
            num_quarantined=0,
            reasons={},
            part=PART,
            quarantine=None,
            owner=owner,
            committed_at=(BEGIN + datetime.timedelta(seconds=second)).isoformat(),
        )
    return found


def phases(score_s: float, plan_s: float = 0.5, publish_s: float = 0.75) -> Phases:
    return Phases(startup_s=3, plan_s=plan_s, engine_s=32, score_s=score_s, publish_s=publish_s)


def test_the_rate_is_that_between_the_first_commit_and_the_last(
    a_report: Callable[..., RunReport],
) -> None:
    """21 shards of 100 rows, one every 2 s, after 5 s of warming up."""
    report = a_report(rows=2_100, shards=21, phases=phases(47))
    rates = measure_rates(report, records(range(7, 49, 2)), 0)
    assert rates.rows_per_s == pytest.approx(50)
    assert rates.warmup_s == pytest.approx(5)
    assert rates.spread == pytest.approx(0)
    assert (rates.timed_shards, rates.rows_per_shard) == (20, 100)
    assert (rates.usd_per_hour, rates.startup_s) == (0.085, 3)


def test_the_spread_is_that_of_the_shards(a_report: Callable[..., RunReport]) -> None:
    times_s = [0.0]
    for _ in range(10):
        times_s += [times_s[-1] + 1, times_s[-1] + 4]  # a shard of 1 s, and one of 3 s
    report = a_report(rows=2_100, shards=21, phases=phases(42))
    rates = measure_rates(report, records(times_s), 0)
    assert rates.spread == pytest.approx(0.5)
    assert rates.rows_per_s == pytest.approx(50)


def test_lanes_share_the_rate(a_report: Callable[..., RunReport]) -> None:
    """Two lanes that commit in turn, each of them every 2 s."""
    report = a_report(rows=4_000, shards=40, phases=phases(45), num_lanes=2)
    rates = measure_rates(report, records(range(5, 45)), 0)
    assert rates.rows_per_s == pytest.approx(50)
    assert rates.spread == pytest.approx(0)
    assert rates.lanes_per_machine == 2
    assert rates.warmup_s == pytest.approx(5)


def test_only_the_attempt_that_finished_the_night_counts(
    a_report: Callable[..., RunReport],
) -> None:
    """Its predecessor was ten times slower, and ended an hour before."""
    earlier = records(range(0, 400, 20), owner="killed")
    own = records(range(4_000, 4_040, 2), first=20)
    report = a_report(rows=4_000, shards=40, shards_reused=20, phases=phases(40))
    rates = measure_rates(report, earlier | own, 0)
    assert rates.rows_per_s == pytest.approx(50)
    assert rates.timed_shards == 19
    assert (rates.measured_rows, rates.measured_shards) == (2_000, 20), "not those of the night"


def test_the_newest_night_with_shards_enough_to_be_timed_tells_most(
    a_report: Callable[..., RunReport],
) -> None:
    tiny = a_report(date="2026-11-22", rows=1, shards=1)
    resumed = a_report(date="2026-11-21", rows=4_000, shards=40, shards_reused=38)
    whole = a_report(date="2026-11-20", rows=900, shards=9)
    older = a_report(date="2026-11-19", rows=90_000, shards=90)
    assert most_telling([tiny, resumed, whole, older]) is whole
    assert most_telling([tiny, resumed]) is resumed, "none can be timed: that with most rows"
    four_lanes = a_report(rows=4_000, shards=35, num_lanes=4)
    assert most_telling([four_lanes, whole]) is whole
    assert most_telling([]) is None


def test_with_few_shards_start_up_counts_as_scoring(a_report: Callable[..., RunReport]) -> None:
    report = a_report(rows=200, shards=2, phases=phases(10))
    rates = measure_rates(report, records([9.0, 9.1]), 0)
    assert (rates.timed_shards, rates.spread, rates.warmup_s) == (0, 0, 0)
    assert rates.rows_per_s == pytest.approx(20)


def test_building_an_engine_counts_only_when_it_is_asked_for(
    a_report: Callable[..., RunReport],
) -> None:
    report = a_report(rows=2_100, shards=21, phases=phases(47))
    assert report.engine.build_s == 31.4
    night = records(range(7, 49, 2))
    assert measure_rates(report, night, 0).engine_s == pytest.approx(0.6)
    assert measure_rates(report, night, 31.4).engine_s == pytest.approx(32)


def test_a_small_night_cannot_tell_what_a_shard_costs_and_a_large_one_can(
    a_report: Callable[..., RunReport],
) -> None:
    small = measure_rates(
        a_report(rows=2_100, shards=21, phases=phases(47)), records(range(7, 49, 2)), 0
    )
    assert small.plan_s + 21 * small.plan_s_per_shard == pytest.approx(0.5)
    assert small.publish_s + 21 * small.publish_s_per_shard == pytest.approx(0.75)
    assert 0 < small.plan_s_per_shard < 0.001
    large = measure_rates(
        a_report(rows=200_000, shards=2_000, phases=phases(4_000, plan_s=10, publish_s=20)),
        records(range(0, 4_000, 2)),
        0,
    )
    assert (large.plan_s, large.plan_s_per_shard) == (0, 0.005)
    assert (large.publish_s, large.publish_s_per_shard) == (0, 0.01)


def test_a_night_that_scored_nothing_has_no_rates(a_report: Callable[..., RunReport]) -> None:
    with pytest.raises(ValueError, match="has no rates"):
        measure_rates(a_report(), {}, 0)
