"""The night's window: when it ends, how fast a night goes, and when it is in danger."""

from __future__ import annotations

import datetime
import math
import random
import re

import pydantic
import pytest

from pipeline.config import WindowSection
from pipeline.window import RECENT_S, Outlook, Pace, Window, WindowWatch, find_window

UTC = datetime.UTC
BEGIN = datetime.datetime(2026, 11, 21, 0, 30, tzinfo=UTC)
DATE = "2026-11-20"
WINDOW = Window(opened=BEGIN, deadline=BEGIN + datetime.timedelta(hours=5))


def at(hours: float) -> datetime.datetime:
    return BEGIN + datetime.timedelta(hours=hours)


def outlook(left_h: float, doubt_h: float = 0.25) -> Outlook:
    return Outlook(
        rows_per_s=100.0,
        rows_left=round(left_h * 360_000),
        left_s=left_h * 3600,
        soonest_s=(left_h - doubt_h) * 3600,
        latest_s=(left_h + doubt_h) * 3600,
    )


def test_a_deadline_is_a_time_of_day_after_the_date_that_is_scored() -> None:
    section = WindowSection(deadline="07:00", timezone="Europe/Zurich")
    window = find_window(section, DATE, BEGIN)
    assert window is not None
    assert window.deadline.isoformat() == "2026-11-21T07:00:00+01:00"
    assert window.length_s == 5.5 * 3600
    summer = find_window(section, "2026-07-20", at(-123 * 24))
    assert summer is not None
    assert summer.deadline.isoformat() == "2026-07-21T07:00:00+02:00"


@pytest.mark.parametrize("window", [{"days_after": 99_999_999}, {"max_hours": 1e300}])
def test_a_window_beyond_all_calendars_is_refused(window: dict[str, float]) -> None:
    with pytest.raises(pydantic.ValidationError, match="less than or equal to"):
        WindowSection.model_validate({"deadline": "07:00", **window})


def test_a_night_that_begins_after_its_deadline_is_late_and_gets_no_other_one() -> None:
    window = find_window(WindowSection(deadline="07:00"), DATE, at(8))
    assert window is not None
    assert (window.margin_s(at(8)), window.length_s) == (-1.5 * 3600, 0)


def test_a_date_that_is_caught_up_with_has_no_deadline() -> None:
    section = WindowSection(deadline="07:00")
    assert find_window(section, "2026-11-10", BEGIN) is None
    assert find_window(section, "2026-11-19", at(6)) is not None, "within a day it is late"
    limited = WindowSection(deadline="07:00", max_hours=2)
    window = find_window(limited, "2026-11-10", BEGIN)
    assert window is not None
    assert window.deadline == at(2)


def test_of_a_deadline_and_a_number_of_hours_what_comes_first_counts() -> None:
    for max_hours, expected in ((2, at(2)), (9, at(6.5))):
        window = find_window(WindowSection(deadline="07:00", max_hours=max_hours), DATE, BEGIN)
        assert window is not None
        assert window.deadline == expected


@pytest.mark.parametrize(("max_hours", "first"), [(0.2, "02:27:00+02:00"), (1, "02:30:00+02:00")])
def test_in_the_hour_that_comes_twice_what_comes_first_counts(max_hours: float, first: str) -> None:
    opened = datetime.datetime(2026, 10, 25, 0, 15, tzinfo=UTC)  # 02:15, summer time
    section = WindowSection(deadline="02:30", timezone="Europe/Zurich", max_hours=max_hours)
    window = find_window(section, "2026-10-24", opened)
    assert window is not None
    assert window.deadline.isoformat() == f"2026-10-25T{first}"


@pytest.mark.parametrize(("written", "meant"), [(630, "10:30"), ("07:00", "07:00"), (0, "00:00")])
def test_a_time_of_day_need_not_be_quoted(written: object, meant: str) -> None:
    """YAML 1.1 reads 10:30 as 630."""
    assert WindowSection.model_validate({"deadline": written}).deadline == meant


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "expected `deadline`, `max_hours` or both"),
        ({"deadline": "25:00"}, "String should match pattern"),
        ({"deadline": "7 am"}, "String should match pattern"),
        ({"deadline": "07:00", "timezone": "Zurich"}, "timezone: 'Zurich'; expected a name such"),
        ({"deadline": "07:00", "timezone": "../etc"}, "timezone: '../etc'; expected a name such"),
        ({"max_hours": 0}, "greater than 0"),
    ],
)
def test_a_window_that_is_none_is_refused(section: dict[str, object], said: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(said)):
        WindowSection.model_validate(section)


def test_without_a_window_there_is_none() -> None:
    assert find_window(None, DATE, BEGIN) is None


def test_a_steady_pace_gives_the_end_and_hardly_any_doubt() -> None:
    pace = Pace(10_000)
    for second in range(31):
        pace.observe(second, 100 + 100 * second)
    found = pace.outlook()
    assert found is not None
    assert (found.rows_per_s, found.rows_left) == (pytest.approx(100), 6_900)
    assert found.left_s == pytest.approx(69)
    assert found.latest_s - found.soonest_s < 1e-6


def test_nine_of_ten_ends_are_within_the_interval() -> None:
    """Nights whose spans differ at random, each cut off after a sixth and forecast."""
    rng, inside, nights = random.Random(7), 0, 200
    for _ in range(nights):
        rates = [max(1.0, rng.gauss(100, 30)) for _ in range(600)]
        pace, done = Pace(round(sum(rates))), 1.0
        for second in range(101):
            pace.observe(second, round(done))
            done += rates[second]
        found = pace.outlook()
        assert found is not None
        rest = len(rates) - 100
        inside += found.soonest_s <= rest <= found.latest_s
    assert 0.84 < inside / nights < 0.96


def test_the_pace_is_that_of_the_last_minutes() -> None:
    """A lane is lost after an hour: the rate halves."""
    pace, done = Pace(10**9), 1_000
    for second in range(0, 4_200, 5):
        done += 500 if second < 3_600 else 250
        pace.observe(second, done)
    found = pace.outlook()
    assert found is not None
    assert RECENT_S <= 600
    assert found.rows_per_s == pytest.approx(50, rel=0.02)


def test_a_few_looks_tell_nothing() -> None:
    pace = Pace(1_000)
    for tenth in range(10):
        pace.observe(tenth / 10, 10 * tenth)
    assert pace.outlook() is None, "the first looks"
    for tenth in range(10, 100):
        pace.observe(tenth / 10, 100)
    assert pace.outlook() is not None
    blocks = Pace(1_000)
    for tenth in range(100):
        blocks.observe(tenth / 10, 100 if tenth < 90 else 200)
    assert blocks.outlook() is None, "one block, and another: no rate yet"


def test_a_night_that_stands_still_has_no_end() -> None:
    pace = Pace(1_000)
    for second in range(2_000):
        pace.observe(second, min(500, 10 + second))
    found = pace.outlook()
    assert found is not None
    assert (found.rows_per_s, found.left_s, found.latest_s) == (0, math.inf, math.inf)


def test_nothing_is_left_at_the_end() -> None:
    pace = Pace(100)
    for second in range(20):
        pace.observe(second, 10 * second)
    found = pace.outlook()
    assert found is not None
    assert (found.rows_left, found.left_s, found.latest_s) == (0, 0, 0)


def test_a_night_that_will_be_late_is_in_danger_once_it_has_looked_so_for_a_while() -> None:
    watch = WindowWatch(WINDOW)
    assert watch.look(at(0.20), outlook(6)) is None, "perhaps only its first minutes"
    assert watch.look(at(0.25), outlook(6)) is None
    assert watch.look(at(0.31), outlook(6)) is True
    assert watch.look(at(0.40), outlook(6)) is None, "it is said once"


def test_a_moment_of_slowness_is_no_danger() -> None:
    watch = WindowWatch(WINDOW)
    assert watch.look(at(0.20), outlook(6)) is None
    assert watch.look(at(0.25), outlook(4)) is None
    assert watch.look(at(0.31), outlook(6)) is None, "it begins anew"


def test_danger_is_over_when_even_the_latest_end_is_in_time() -> None:
    watch = WindowWatch(WINDOW)
    assert [watch.look(at(hour), outlook(6)) for hour in (0.2, 0.4)] == [None, True]
    assert [watch.look(at(hour), outlook(5 - hour - 0.1)) for hour in (0.5, 1.0)] == [None, None]
    assert [watch.look(at(hour), outlook(5 - hour - 0.3)) for hour in (1.1, 1.3)] == [None, False]
    assert [watch.look(at(hour), outlook(5)) for hour in (1.4, 1.6)] == [None, True]


def test_a_night_without_a_scored_row_is_in_danger_before_a_quarter_of_its_window() -> None:
    watch = WindowWatch(WINDOW)
    assert watch.look(at(0.9), None) is None
    assert [watch.look(at(hour), None) for hour in (1.01, 1.12)] == [None, True]
    assert watch.look(at(1.2), None) is None


def test_a_night_that_is_late_already_is_told_at_once() -> None:
    late = Window(opened=BEGIN, deadline=at(-1))
    assert WindowWatch(late).look(at(0.001), outlook(1)) is True
