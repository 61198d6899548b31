"""An alert is raised where a night is odd beside those before, and only there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pipeline.alerts import find_alerts, price_age_days, stale_price
from pipeline.config import AlertsSection
from pipeline.history import HistoryRow, row_of
from pipeline.report import RunReport

LIMITS = AlertsSection()
OFF = AlertsSection(
    max_rate_fall=None,
    max_cost_rise=None,
    max_quarantine_rise=None,
    max_psi=None,
    max_price_age_days=None,
)


@pytest.fixture
def night(a_report: Callable[..., RunReport]) -> Callable[..., HistoryRow]:
    """A night of 10,000 rows in 100 s, for 0.02 dollars per 100,000; ten rows in quarantine."""
    usual = dataclasses.replace(
        row_of(a_report(), version=1, published_at="2026-11-21T02:00:00Z"),
        rows=10_000,
        scored=9_990,
        quarantined=10,
        wall_s=100.0,
        building_s=0.0,
        usd_per_100k=0.02,
        price_as_of="2026-11-01",
    )

    def build(day: int, **changes: object) -> HistoryRow:
        return dataclasses.replace(usual, date=f"2026-11-{day:02}", **changes)

    return build


@pytest.fixture
def week(night: Callable[..., HistoryRow]) -> list[HistoryRow]:
    return [night(day) for day in range(13, 20)]


def names(alerts: tuple[object, ...]) -> list[str]:
    return [alert.name for alert in alerts]  # type: ignore[attr-defined]


def test_a_night_like_the_others_is_not_odd(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    assert find_alerts(night(20), week, LIMITS) == ()


@pytest.mark.parametrize(
    ("changes", "is_odd"),
    [
        ({"wall_s": 124.0}, False),
        ({"wall_s": 126.0}, True),
        ({"wall_s": 80.0}, False),
        # The building of an engine is no slowness.
        ({"wall_s": 200.0, "building_s": 100.0}, False),
        ({"wall_s": 200.0, "building_s": 60.0}, True),
        ({"rows": 20_000, "wall_s": 200.0, "quarantined": 20}, False),
    ],
)
def test_a_night_that_is_a_fifth_slower_is_odd(
    night: Callable[..., HistoryRow],
    week: list[HistoryRow],
    changes: dict[str, object],
    is_odd: bool,
) -> None:
    assert names(find_alerts(night(20, **changes), week, LIMITS)) == ["rate"] * is_odd


@pytest.mark.parametrize(
    ("usd_per_100k", "limit", "is_odd"),
    [
        (0.0249, 0.25, False),
        (0.0251, 0.25, True),
        (0.0251, 0.3, False),
        (0.01, 0.25, False),
        (9.0, None, False),
    ],
)
def test_a_night_that_is_a_quarter_dearer_is_odd(
    night: Callable[..., HistoryRow],
    week: list[HistoryRow],
    usd_per_100k: float,
    limit: float | None,
    is_odd: bool,
) -> None:
    limits = AlertsSection(max_cost_rise=limit)
    found = find_alerts(night(20, usd_per_100k=usd_per_100k), week, limits)
    assert names(found) == ["cost"] * is_odd


@pytest.mark.parametrize(
    ("quarantined", "is_odd"),
    # usual are 10 of 10,000; 10 more are allowed, and 3 times the square root of 10 for chance
    [(0, False), (20, False), (29, False), (30, True), (5_000, True)],
)
def test_more_rows_in_quarantine_than_chance_explains_are_odd(
    night: Callable[..., HistoryRow], week: list[HistoryRow], quarantined: int, is_odd: bool
) -> None:
    found = find_alerts(night(20, quarantined=quarantined), week, LIMITS)
    assert names(found) == ["quarantine"] * is_odd


@pytest.mark.parametrize(
    ("psi", "chance", "is_odd"),
    [(None, None, False), (0.1, 0.0, False), (0.11, 0.0, True), (0.11, 0.02, False)],
)
def test_scores_that_moved_more_than_chance_explains_are_odd(
    night: Callable[..., HistoryRow], psi: float | None, chance: float | None, is_odd: bool
) -> None:
    found = find_alerts(night(20, psi=psi, psi_chance=chance), (), LIMITS)
    assert names(found) == ["scores"] * is_odd


@pytest.mark.parametrize(
    ("as_of", "is_odd"), [("2026-05-25", False), ("2026-05-24", True), ("2026-11-21", False)]
)
def test_a_price_older_than_180_days_is_odd(
    night: Callable[..., HistoryRow], as_of: str, is_odd: bool
) -> None:
    found = find_alerts(night(20, price_as_of=as_of), (), LIMITS)
    assert names(found) == ["price"] * is_odd


def test_an_old_price_is_told_once_and_again_when_it_is_another(
    night: Callable[..., HistoryRow],
) -> None:
    def old(day: int, **changes: object) -> HistoryRow:
        return night(day, price_as_of="2025-07-01", **changes)

    assert names(find_alerts(old(20), [old(19)], LIMITS)) == []
    assert names(find_alerts(old(20, instance="g5.xlarge"), [old(19)], LIMITS)) == ["price"]
    assert names(find_alerts(old(20), [night(19, price_as_of="2025-06-01")], LIMITS)) == ["price"]
    assert names(find_alerts(old(20), [old(19, market="own")], LIMITS)) == ["price"]
    fresh = old(19, published_at="2025-07-02T02:00:00Z")
    assert names(find_alerts(old(20), [fresh], LIMITS)) == ["price"]


def test_your_own_price_never_gets_old(night: Callable[..., HistoryRow]) -> None:
    backfilled = night(20, market="own", price_as_of="2020-01-01")
    assert find_alerts(backfilled, (), LIMITS) == ()


def test_everything_odd_is_told_in_one_order_and_nothing_where_limits_are_off(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    bad = night(
        20,
        wall_s=400.0,
        usd_per_100k=0.08,
        quarantined=900,
        psi=2.0,
        psi_chance=0.1,
        price_as_of="2020-01-01",
    )
    found = find_alerts(bad, week, LIMITS)
    assert names(found) == ["rate", "cost", "quarantine", "scores", "price"]
    for alert, key in zip(
        found,
        ("max_rate_fall", "max_cost_rise", "max_quarantine_rise", "max_psi", "max_price_age_days"),
        strict=True,
    ):
        assert f"(alerts.{key})" in alert.text
        assert alert.text.endswith(".")
    assert find_alerts(bad, week, OFF) == ()


def test_the_text_has_both_numbers_and_what_changed(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    (alert,) = find_alerts(night(20, wall_s=160.0, precision="fp32"), week, LIMITS)
    assert "62.5 rows/s, 37.5% below the median of the last 7 nights (100, " in alert.text
    assert alert.text.endswith(
        "Since 2026-11-19: engine: openvino int8 b83d7705, now openvino fp32 b83d7705."
    )


def test_one_odd_night_among_the_others_does_not_hide_the_next(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    past = [*week[:-1], dataclasses.replace(week[-1], wall_s=1_000.0)]
    assert names(find_alerts(night(20, wall_s=130.0), past, LIMITS)) == ["rate"]


def test_two_nights_are_too_few_to_say_what_is_usual(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    slow = night(20, wall_s=1_000.0)
    assert find_alerts(slow, week[:2], LIMITS) == ()
    assert names(find_alerts(slow, week[:3], LIMITS)) == ["rate"]


def test_nights_after_it_and_longer_ago_than_seven_do_not_count(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    fast_long_ago = [night(day, wall_s=10.0) for day in range(1, 13)]
    fast_since = [night(day, wall_s=10.0) for day in range(20, 29)]
    assert find_alerts(night(20), [*fast_long_ago, *week, *fast_since], LIMITS) == ()


def test_a_version_that_took_rows_over_is_neither_judged_nor_compared_with(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    requeued = {"version": 2, "rows_taken_over": 9_900, "wall_s": 1.0, "usd_per_100k": 0.0001}
    fast = [dataclasses.replace(row, **requeued) for row in week]
    assert find_alerts(night(20), [*fast[:4], *week[4:]], LIMITS) == ()
    slow = night(20, **{**requeued, "wall_s": 1_000.0, "usd_per_100k": 9.0})
    assert find_alerts(slow, week, LIMITS) == ()


def test_nights_that_shared_the_machine_are_compared_with_their_like(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    shared = {"machine_share": 0.5, "wall_s": 300.0, "usd_per_100k": 0.005}
    half = [dataclasses.replace(row, **shared) for row in week]
    assert find_alerts(night(20), [*week[:3], *half[3:]], LIMITS) == ()
    assert find_alerts(night(20), half, LIMITS) == (), "no night is like it"
    assert find_alerts(night(20, **shared), week, LIMITS) == ()
    slow = night(20, **{**shared, "wall_s": 400.0})
    assert names(find_alerts(slow, half, LIMITS)) == ["rate"]
    dirty = night(20, quarantined=2_000)
    assert names(find_alerts(dirty, half, LIMITS)) == ["quarantine"], "whatever it ran on"


def test_a_night_without_rows_is_not_compared(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    empty = {"rows": 0, "scored": 0, "quarantined": 0, "usd_per_100k": 0.0}
    assert find_alerts(night(20, **empty), week, LIMITS) == ()
    assert find_alerts(night(20), [*week[:4], *(night(18, **empty),) * 3], LIMITS) == ()


def test_a_night_whose_clocks_disagree_is_not_compared(
    night: Callable[..., HistoryRow], week: list[HistoryRow]
) -> None:
    wrong = night(20, wall_s=30.0, building_s=30.0)
    assert find_alerts(wrong, week, LIMITS) == ()
    assert find_alerts(night(21), [*week[:3], wrong], LIMITS) == ()


def test_the_age_of_a_price_is_told_in_days() -> None:
    assert price_age_days("2026-01-01", "2026-11-20") == 323
    price = ("g5.xlarge", "spot", "2026-01-01")
    assert stale_price(*price, "2026-11-20T01:02:03Z", None) is None
    assert stale_price(*price, "2026-11-20", 323) is None
    text = stale_price(*price, "2026-11-20", 180)
    assert text is not None
    assert text.startswith("The price of g5.xlarge was read on 2026-01-01, 323 days ago; expected")
