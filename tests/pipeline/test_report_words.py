"""Numbers and sentences are for people, and never flatter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pipeline import report_words as words
from pipeline.cost import cost_of
from pipeline.report import Ceilings, Phases, RunReport, StageTimes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (97.06, "97.1"),
        (999.6, "1,000"),
        (1_234.5, "1,234"),
        (12_345_678.0, "12,345,678"),
    ],
)
def test_amounts_have_three_significant_digits(value: float, text: str) -> None:
    assert words.amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "$0"), (0.01234, "$0.0123"), (0.5, "$0.500"), (1.5, "$1.50"), (1_234.5, "$1,234.50")],
)
def test_dollars_show_cents_or_three_digits(value: float, text: str) -> None:
    assert words.usd(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.424, "0.42 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (185.2, "3 min 05 s"),
        (3_599.9, "1 h 00 min"),
        (7_450.0, "2 h 04 min"),
    ],
)
def test_durations_use_the_unit_that_fits(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"),
        (0.0000001, "<0.1%"),
        (0.5, "50.0%"),
        (0.9999, ">99.9%"),
        (1.0, "100%"),
        (12.345, "1,234.5%"),
    ],
)
def test_percentages_round_neither_to_nothing_nor_to_all(share: float, text: str) -> None:
    assert words.percent(share) == text


def test_agreement_that_misses_its_limit_does_not_look_as_if_it_met_it() -> None:
    assert words.agreement(0.969999) == "0.9699"


def test_foreign_text_loses_control_characters_and_line_breaks() -> None:
    assert words.plain("a\nb\x1b[31m\ud800\u202e") == "a b\ufffd[31m\ufffd\ufffd"


def test_long_messages_are_cut_but_long_paths_are_not() -> None:
    assert len(words.message("x" * 1_000)) == words.MAX_MESSAGE_CHARACTERS
    assert words.plain("x" * 1_000) == "x" * 1_000


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "3,992 of 4,000 rows scored, 8 quarantined"),
        ({"scored": 4_000, "quarantined": 0}, "All 4,000 rows scored"),
        ({"rows": 0, "scored": 0, "quarantined": 0}, "No rows to score"),
        (
            {"degraded": True},
            "3,992 of 4,000 rows scored, 8 quarantined; the input is damaged",
        ),
        (
            {"scored": 4_000, "quarantined": 0, "status": "already_published"},
            "Already published: all 4,000 rows scored",
        ),
    ],
)
def test_the_headline_says_what_happened(
    a_report: Callable[..., RunReport], changes: dict[str, object], text: str
) -> None:
    assert words.headline(a_report(**changes)) == text


def test_rows_that_nobody_could_read_are_told_where_rates_and_prices_count_them(
    a_report: Callable[..., RunReport],
) -> None:
    assert words.subline(a_report()).endswith(" threads.")
    damaged = a_report(quarantined_by_reason={"row_group_unreadable": 2_000, "truncated": 2})
    said = words.subline(damaged)
    assert said.endswith(" threads. Rate and price count 2,000 rows of damaged row groups.")


def test_ceilings_are_compared_with_the_speed_while_scoring(
    a_report: Callable[..., RunReport],
) -> None:
    report = a_report(
        phases=Phases(startup_s=1, plan_s=1, engine_s=96, score_s=2, publish_s=0),
        stages={"write": StageTimes(busy_s=1, wait_s=1, items=1_000)},
        ceilings=Ceilings(
            decode_per_sec=1_000.0, engine_per_sec=2_000.0, engine_with_copies_per_sec=0.0
        ),
    )
    assert [limit.reached for limit in words.limits(report)] == [0.5, 0.25, None]


def test_costs_per_100k_add_up_to_the_headline(a_report: Callable[..., RunReport]) -> None:
    report = a_report()
    total = sum(part.amount for part in words.costs_per_100k(report))
    assert total == pytest.approx(report.cost.usd_per_100k)
    assert sum(part.share for part in words.costs_per_100k(report)) == pytest.approx(1.0)


def test_rows_of_the_version_before_are_in_no_part_of_the_cost(
    a_report: Callable[..., RunReport],
) -> None:
    report = a_report()
    num_scored = report.rows // 4
    again = dataclasses.replace(
        report,
        rows_taken_over=report.rows - num_scored,
        cost=cost_of(report.cost.price, wall_s=10.0, score_s=5.0, build_s=1.0, rows=num_scored),
    )
    total = sum(part.amount for part in words.costs_per_100k(again))
    assert total == pytest.approx(again.cost.usd_per_100k)
    nothing_scored = dataclasses.replace(report, rows_taken_over=report.rows)
    assert sum(part.amount for part in words.costs_per_100k(nothing_scored)) == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"interruptions": 1}, "1 interruption; no row scored twice"),
        (
            {"interruptions": 2, "rows_replayed": 2_048, "replay_is_exact": False},
            "2 interruptions; at most 2,048 rows scored twice, $0.000123",
        ),
        ({"interruptions": 1, "rows_replayed": 1}, "1 interruption; 1 row scored twice, $0.000123"),
        ({"rows_replayed": 64}, "none; 64 rows scored twice, $0.000123"),
    ],
)
def test_interruptions_are_one_line_with_what_they_cost(
    a_report: Callable[..., RunReport], changes: dict[str, object], sentence: str | None
) -> None:
    cost = dataclasses.replace(a_report().cost, replay_usd=0.000123)
    assert words.interruption_sentence(a_report(cost=cost, **changes)) == sentence


def test_replay_is_a_part_of_the_costs_when_there_was_any(
    a_report: Callable[..., RunReport],
) -> None:
    cost = cost_of(
        a_report().cost.price, wall_s=100, score_s=80, build_s=5, rows=4_000, replay_s=20
    )
    parts = {part.name: part.share for part in words.costs_per_100k(a_report(cost=cost))}
    expected = {"scoring": 0.6, "building the engine": 0.05, "other": 0.15, "replay": 0.2}
    assert parts == pytest.approx(expected)
    assert "replay" not in {part.name for part in words.costs_per_100k(a_report())}


def test_reasons_are_ordered_by_frequency(a_report: Callable[..., RunReport]) -> None:
    assert words.reasons(a_report())[0] == ("format_not_accepted", 3)


def test_a_stage_that_often_waited_is_no_bottleneck(a_report: Callable[..., RunReport]) -> None:
    stages = {"infer": StageTimes(busy_s=7, wait_s=3, items=1)}
    assert words.bottleneck_sentence(a_report(stages=stages, bottleneck="infer")) == (
        "No stage was busy nearly all the time; infer most of all: 70.0% of its time."
    )
