"""What a date will take, from the nights before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pipeline.cost import own_price
from pipeline.forecast import MOST_NIGHTS, forecast_night
from pipeline.history import HistoryRow, row_of
from pipeline.report import RunReport

PRICE = own_price("c6i.large", 3.6, as_of="2026-11-20")
"""A dollar in 1,000 seconds."""


@pytest.fixture
def night(a_report: Callable[..., RunReport]) -> Callable[..., HistoryRow]:
    """1,000 rows in 100 s, and 10 s besides; keywords replace its fields."""

    def build(day: int, **changes: object) -> HistoryRow:
        usual = {"rows": 1_000, "scoring_s": 100.0, "building_s": 0.0, "wall_s": 110.0}
        row = row_of(a_report(date=f"2026-11-{day:02}"), version=1, published_at="")
        return dataclasses.replace(row, **{**usual, **changes})  # type: ignore[arg-type]

    return build


def test_the_middle_night_is_the_forecast_and_the_others_its_interval(
    night: Callable[..., HistoryRow],
) -> None:
    past = [night(1), night(2, scoring_s=50.0, wall_s=60.0), night(3, scoring_s=400, wall_s=440)]
    found = forecast_night(past, 2_000, PRICE, must_build=False)
    assert found is not None
    assert (found.low_s, found.wall_s, found.high_s) == (110, 210, 840)
    assert (found.low_usd, found.usd, found.high_usd) == pytest.approx((0.11, 0.21, 0.84))
    assert (found.rows_per_s, found.build_s) == (10, 0)
    assert found.nights == ("2026-11-01", "2026-11-02", "2026-11-03")


def test_building_an_engine_is_added_only_where_it_must_be(
    night: Callable[..., HistoryRow],
) -> None:
    past = [night(1, building_s=60.0, wall_s=170.0), *(night(day) for day in range(2, 12))]
    stored = forecast_night(past, 1_000, PRICE, must_build=False)
    built = forecast_night(past, 1_000, PRICE, must_build=True)
    assert stored is not None
    assert built is not None
    assert (stored.wall_s, built.wall_s, built.build_s) == (110, 170, 60)
    assert len(stored.nights) == MOST_NIGHTS


def test_nights_on_other_machines_tell_nothing(night: Callable[..., HistoryRow]) -> None:
    assert forecast_night([night(1, instance="g6.xlarge")], 10, PRICE, must_build=False) is None
    assert forecast_night([], 10, PRICE, must_build=False) is None


def test_a_version_that_took_over_shards_tells_no_rate(night: Callable[..., HistoryRow]) -> None:
    requeued = night(1, version=2, shards_reused=9, scoring_s=1.0)
    assert forecast_night([requeued], 10, PRICE, must_build=False) is None


def test_what_is_all_committed_takes_what_comes_around_scoring(
    night: Callable[..., HistoryRow],
) -> None:
    found = forecast_night([night(1)], 0, PRICE, must_build=False)
    assert found is not None
    assert found.wall_s == pytest.approx(10)


def test_nights_that_shared_the_machine_count_only_while_there_are_no_others(
    night: Callable[..., HistoryRow],
) -> None:
    shared = [
        night(day, scoring_s=190.0, building_s=20.0, wall_s=220.0, machine_share=0.5)
        for day in (2, 3)
    ]
    whole = night(1, building_s=5.0, wall_s=115.0)
    found = forecast_night([whole, *shared], 1_000, PRICE, must_build=False)
    assert found is not None
    assert (found.nights, found.wall_s, found.usd) == (("2026-11-01",), 110, pytest.approx(0.11))
    found = forecast_night(shared, 1_000, PRICE, must_build=True)
    assert found is not None
    assert (found.wall_s, found.build_s) == (110, 10), "half the time, with the whole machine"
    assert found.rows_per_s == pytest.approx(1_000 / 95)
    half = dataclasses.replace(PRICE, usd_per_hour=1.8, machine_share=0.5)
    found = forecast_night([whole, *shared], 1_000, half, must_build=True)
    assert found is not None
    assert (found.wall_s, found.usd) == (220, pytest.approx(0.11))
    assert len(found.nights) == 2
