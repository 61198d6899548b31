"""What is said of a night's window, and of what would save it."""

from __future__ import annotations

import datetime
import io
import json
import math
from collections.abc import Callable

import pytest
from rich.console import Console

from pipeline import window_words
from pipeline.config import WindowSection
from pipeline.cost import InstancePrice
from pipeline.report import RunReport, WindowOutcome, report_from_dict
from pipeline.report_html import render_html
from pipeline.report_text import render_markdown, render_text
from pipeline.window import Outlook, find_window
from pipeline.window_words import Means, larger_instance

PRICES = tuple(
    InstancePrice(
        instance=name,
        hardware=hardware,
        on_demand_usd_per_hour=usd,
        spot_usd_per_hour=usd / 2.5,
        source="a price list",
        as_of="2026-11-01",
    )
    for name, hardware, usd in (
        ("c7i.large", "2 vCPU, 4 GB", 0.09),
        ("c7i.xlarge", "4 vCPU, 8 GB", 0.18),
        ("m7i.xlarge", "4 vCPU, 16 GB", 0.1),
        ("c7i.4xlarge", "16 vCPU, 32 GB", 0.72),
        ("g6.xlarge", "1 x L4 24 GB, 4 vCPU", 0.8),
        ("p5.4xlarge", "1 x H100 80 GB, 16 vCPU", 6.9),
        ("p5.48xlarge", "8 x H100 80 GB, 192 vCPU", 55.0),
    )
)
OPENED = datetime.datetime(2026, 11, 21, 0, 0, tzinfo=datetime.UTC)
NOW = OPENED + datetime.timedelta(hours=1)
WINDOW = find_window(
    WindowSection(deadline="07:00", timezone="Europe/Zurich"), "2026-11-20", OPENED
)
assert WINDOW is not None
LATE = Outlook(
    rows_per_s=1_000,
    rows_left=27_000_000,
    left_s=27_000,
    soonest_s=25_000,
    latest_s=29_000,
)
MEANS = Means(
    num_lanes=1,
    shards_left=400,
    instance="c7i.large",
    market="spot",
    output="s3://lake/scores",
    prices=PRICES,
)


def test_the_end_is_told_in_the_time_zone_of_the_deadline() -> None:
    said = window_words.end(NOW, LATE, WINDOW)
    assert said == "ends 09:30 (08:56 to 10:03), 2 h 30 min after its deadline"
    early = Outlook(rows_per_s=9, rows_left=9, left_s=3_600, soonest_s=3_000, latest_s=math.inf)
    said = window_words.end(NOW, early, WINDOW)
    assert said == "ends 03:00 (02:50 to no end), 4 h 00 min before its deadline"


def test_a_warning_says_what_is_expected_and_what_would_save_it() -> None:
    assert WINDOW is not None
    said = window_words.danger("users 2026-11-20", NOW, WINDOW, LATE, MEANS)
    assert said == (
        "users 2026-11-20: will miss its deadline, 07:00 Europe/Zurich on 2026-11-21: ends 09:30 "
        "(08:56 to 10:03), 2 h 30 min after its deadline; 1,000 rows/s, and it takes 1,500 rows/s. "
        "What would save it: 1 more machine like this from now on (2 lanes together), with the "
        "same command on the same output, s3://lake/scores; next night, a c7i.xlarge ($0.072 an "
        "hour)."
    )


def test_an_end_that_may_be_in_time_is_called_likely_to_be_late() -> None:
    assert WINDOW is not None
    close = Outlook(rows_per_s=1_000, rows_left=1, left_s=18_600, soonest_s=17_000, latest_s=20_000)
    assert "is likely to miss" in window_words.danger("users", NOW, WINDOW, close, MEANS)


def test_a_silent_night_is_told_apart_from_a_slow_one() -> None:
    assert WINDOW is not None
    said = window_words.danger("users", NOW, WINDOW, None, MEANS)
    assert said.startswith("users: 16.7% of its window has passed and no row is scored; expected")


@pytest.mark.parametrize(
    ("left_s", "rate", "shards_left", "said"),
    [
        (-1, 1_000.0, 400, "The deadline has passed"),
        (18_000, 0.0, 400, "Nothing moves"),
        (900, 1_000.0, 29, "It takes 30 such machines from now on, and only 29 shards are left"),
    ],
)
def test_what_cannot_be_saved_is_said(
    left_s: float, rate: float, shards_left: int, said: str
) -> None:
    found = Outlook(rows_per_s=rate, rows_left=27_000_000, left_s=1, soonest_s=1, latest_s=math.inf)
    means = Means(
        num_lanes=1,
        shards_left=shards_left,
        instance="own",
        market="spot",
        output="out",
        prices=PRICES,
    )
    assert said in window_words.rescue(left_s, found, means)


@pytest.mark.parametrize(
    ("instance", "factor", "expected"),
    [
        ("c7i.large", 1.5, "c7i.xlarge"),
        ("c7i.large", 2.5, "c7i.4xlarge"),
        ("c7i.large", 8.1, None),
        ("p5.4xlarge", 3.0, "p5.48xlarge"),
        ("g6.xlarge", 2.0, None),
        ("my-own-machine", 2.0, None),
    ],
)
def test_a_larger_machine_has_enough_of_the_same(
    instance: str, factor: float, expected: str | None
) -> None:
    found = larger_instance(PRICES, instance, factor)
    assert (found and found.instance) == expected


def test_the_report_says_whether_the_window_was_met() -> None:
    met = WindowOutcome(deadline="2026-11-21T07:00:00+01:00", met=True, margin_s=2_880)
    assert window_words.outcome(met) == (
        "met: published 48 min 00 s before 07:00 on 2026-11-21 (UTC+0100)"
    )
    missed = WindowOutcome(deadline="2026-11-21T07:00:00+01:00", met=False, margin_s=-60)
    assert window_words.outcome(missed).startswith("missed: published 1 min 00 s after 07:00")


def test_the_reports_for_terminal_page_and_artifact_tell_it(
    a_report: Callable[..., RunReport],
) -> None:
    met = WindowOutcome(deadline="2026-11-21T07:00:00+01:00", met=True, margin_s=2_880)
    for window, count in ((met, 1), (None, 0)):
        report = a_report(window=window)
        console = Console(file=io.StringIO(), width=200)
        console.print(render_text(report))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        for text in (shown, render_markdown(report), render_html(report)):
            assert text.count("met: published 48 min 00 s before 07:00") == count
        assert report_from_dict(json.loads(report.to_json())) == report
