"""The page shows a night beside those before, and where its scores lie."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from html import unescape

import numpy as np
import pytest

from pipeline.distribution import count_scores
from pipeline.history import HistoryRow, row_of
from pipeline.report import Alert, RunReport, ScoreDistribution
from pipeline.report_html import render_html
from pipeline.report_text import render_markdown

Build = Callable[..., RunReport]
HOSTILE = """'"><script>alert(1)</script>"""


@pytest.fixture
def past(a_report: Build) -> Sequence[HistoryRow]:
    row = row_of(a_report(), version=1, published_at="2026-11-19T02:00:00Z")
    rates = {"2026-11-17": 100.0, "2026-11-18": 104.0, "2026-11-19": 96.0}
    return [
        dataclasses.replace(row, date=date, examples_per_sec=rate, usd_per_100k=2 / rate)
        for date, rate in rates.items()
    ]


def distribution(**changes: object) -> ScoreDistribution:
    values = np.random.default_rng(0).normal(5.0, 1.0, 4_000).astype(np.float32)
    found = ScoreDistribution(
        counts=count_scores(values), num_values=4_000, model="4f1c", head="scores"
    )
    return dataclasses.replace(found, **changes)


def contrast(one: str, other: str) -> float:
    """Of two colours, from 1 to 21; WCAG 2.2, relative luminance."""

    def luminance(color: str) -> float:
        digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_charts_stand_out_enough_to_be_seen(a_report: Build, scheme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", render_html(a_report()), re.DOTALL)
    colors = dict(re.findall(r"--(\w+): #(\w+);", light if scheme == "light" else dark))
    for text in ("ink", "muted", "good", "odd"):
        assert min(contrast(colors[text], colors[on]) for on in ("page", "card")) >= 4.5, text
    for shape in ("main", "second", "third", "rest"):
        assert contrast(colors[shape], colors["card"]) >= 3, shape


def labels(page: str) -> list[str]:
    return [unescape(label) for label in re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)]


def test_rate_and_cost_of_the_last_nights_are_drawn_and_said(
    a_report: Build, past: Sequence[HistoryRow]
) -> None:
    page = render_html(a_report(), past)
    rate, cost = labels(page)
    assert rate == (
        "Examples per second, 4 nights from 2026-11-17 to 2026-11-20: 93.7 in this one; in those "
        "before 96.0 to 104, median 100."
    )
    assert cost.startswith("Cost per 100,000 rows, 4 nights from 2026-11-17 to 2026-11-20: $0.0252")
    assert "<summary>The same in numbers</summary>" in page
    for cell in ("2026-11-18", "104", "$0.0192"):
        assert f">{cell}<" in page


@pytest.mark.parametrize("changes", [{"rows_taken_over": 1}, {"machine_share": 0.5}])
def test_nights_that_were_requeued_or_shared_the_machine_are_in_no_median(
    a_report: Build, past: Sequence[HistoryRow], changes: dict[str, float]
) -> None:
    few = dataclasses.replace(past[0], examples_per_sec=1.0, **changes)
    rate, _ = labels(render_html(a_report(), [few, *past[1:2]]))
    assert rate.endswith("in those before 1.00 to 104, median 104.")
    alone, _ = labels(render_html(a_report(), [few]))
    assert alone.endswith("median 1.00.")


def test_the_first_night_is_not_compared(a_report: Build) -> None:
    page = render_html(a_report())
    assert labels(page) == []
    assert "The same in numbers" not in page


def test_scores_are_drawn_with_those_of_the_nights_before(a_report: Build) -> None:
    found = distribution(
        before=distribution().counts,
        nights=("2026-11-19", "2026-11-18"),
        psi={"scores": 0.31},
        chance={"scores": 0.01},
    )
    page = render_html(a_report(distribution=found))
    (label,) = labels(page)
    assert label.startswith("Histogram. Scores of this night, from ")
    assert "a major shift" in label
    assert 'class="outline"' in page
    assert "as a line, 2 nights before" in page


def test_a_first_night_draws_its_scores_alone(a_report: Build) -> None:
    page = render_html(a_report(distribution=distribution()))
    assert 'class="outline"' not in page
    assert "no earlier night of this model to compare with" in page


def test_a_night_that_counted_no_score_has_no_histogram(a_report: Build) -> None:
    assert labels(render_html(a_report(distribution=distribution(counts="")))) == []


@pytest.mark.parametrize(
    ("render", "next_part"),
    [(render_html, "Where the time went"), (render_markdown, "cost per 100,000 rows")],
)
def test_alerts_are_told_above_everything_else(
    a_report: Build, render: Callable[[RunReport], str], next_part: str
) -> None:
    alert = Alert(name="rate", text="62.5 rows/s, 37.5% below the median of the last 7 nights.")
    page = render(a_report(alerts=(alert,)))
    assert 0 < page.index("37.5% below") < page.rindex(next_part)
    assert "37.5% below" not in render(a_report())


def test_hostile_texts_of_other_nights_stay_text(
    a_report: Build, past: Sequence[HistoryRow]
) -> None:
    attacked = [dataclasses.replace(row, date=f"2026-11-1{HOSTILE}") for row in past]
    alerts = (Alert(name=HOSTILE, text=HOSTILE),)
    page = render_html(a_report(alerts=alerts, distribution=distribution()), attacked)
    assert "<script>" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 5
