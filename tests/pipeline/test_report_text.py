"""The terminal's and Prefect's report read well, whatever the data contains."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from pipeline.report import QuarantineSample, RunReport, UnreadableFile
from pipeline.report_engine import EngineRows
from pipeline.report_html import render_html
from pipeline.report_text import render_markdown, render_text
from pipeline.report_words import limits

Build = Callable[..., RunReport]
EMPTY = {
    "rows": 0,
    "scored": 0,
    "quarantined": 0,
    "quarantined_by_reason": {},
    "quarantine_samples": (),
    "stages": {},
    "ceilings": None,
    "bottleneck": "none",
}


def printed(report: RunReport, *, encoding: str = "utf-8", width: int = 80) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    Console(file=stream, width=width, color_system=None).print(render_text(report))
    stream.seek(0)
    return stream.read()


def a_sample(message: str) -> QuarantineSample:
    return QuarantineSample(file="a.parquet", row=1, reason="corrupt", message=message)


def test_the_terminal_report_has_what_the_morning_wants_to_know(a_report: Build) -> None:
    text = printed(a_report())
    for fact in (
        "3,992 of 4,000 rows scored, 8 quarantined",
        "93.7, everything included; 526 while scoring",
        "$0.0252: scoring $0.00449",
        "c6i.large, on demand, $0.085 an hour",
        "The bottleneck was decode: busy 97.1% of its time.",
        "openvino int8, batches of 8, built in 31.4 s",
        "0.9921 with fp32 on 512 held-out rows",
        "missed the gate",
        "demo-2026-11-20-7d1f03c9",
        "s3://lake/scores/demo/dt=2026-11-20/_MANIFEST.json",
    ):
        assert fact in text


def test_several_engines_are_told_apart_and_one_is_not_told_twice(a_report: Build) -> None:
    engines = (
        EngineRows(key="0123456789abcdef", device="NVIDIA L4", rows=3_000),
        EngineRows(key="fedcba9876543210", device=None, rows=1),
    )
    report, alone = a_report(engines=engines), a_report(engines=engines[:1])
    said = "0123456789ab for NVIDIA L4: 3,000 rows; fedcba987654 for a device that nobody knows"
    for text in (" ".join(printed(report).split()), render_markdown(report), render_html(report)):
        assert said in text
    assert "all engines" not in printed(alone) + render_markdown(alone)
    assert "All engines" not in render_html(alone)


def test_interruptions_are_on_the_terminal_and_in_markdown(a_report: Build) -> None:
    report = a_report(interruptions=2, rows_replayed=2_048, replay_is_exact=False)
    said = "2 interruptions; at most 2,048 rows scored twice, $0"
    assert said in printed(report)
    assert said in render_markdown(report)
    assert "interruption" not in printed(a_report())


def test_what_is_only_of_the_last_attempt_says_so(a_report: Build) -> None:
    again = a_report(attempts=2)
    texts = [" ".join(printed(again).split()), render_markdown(again)]
    for label in ("phases", "started", "busy 97.1% of its time."):
        assert all(f"{label} (last attempt)" in text for text in texts), label
    page = render_html(again)
    assert "<h2>Where the time went (last attempt)</h2>" in page
    assert "<dt>Started (last attempt)</dt>" in page
    once = a_report()
    for text in (printed(once), render_markdown(once), render_html(once)):
        assert "last attempt" not in text


def test_the_terminal_report_fits_80_columns_without_colour(a_report: Build) -> None:
    text = printed(a_report())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_loses_no_name_and_no_digit(a_report: Build, width: int) -> None:
    report = a_report()
    text = printed(report, width=width)
    assert "…" not in text
    for name in (*report.stages, *(limit.name for limit in limits(report))):
        assert f"\n{name} " in text


def test_a_terminal_that_knows_only_ascii_gets_the_report_too(a_report: Build) -> None:
    assert "3,992 of 4,000 rows scored" in printed(a_report(), encoding="ascii")


@pytest.mark.parametrize("render", [printed, render_markdown])
def test_a_published_run_says_that_nothing_was_left_to_do(
    a_report: Build, render: Callable[[RunReport], str]
) -> None:
    text = render(a_report(status="already_published"))
    assert "Already published: 3,992 of 4,000 rows scored" in text
    assert "Nothing was left to do" in text


@pytest.mark.parametrize("render", [printed, render_markdown])
def test_a_run_without_rows_has_a_report(
    a_report: Build, render: Callable[[RunReport], str]
) -> None:
    text = render(a_report(**EMPTY))
    assert "No rows to score" in text
    assert "Quarantined rows" not in text


def test_console_markup_and_escape_sequences_in_messages_stay_text(a_report: Build) -> None:
    text = printed(a_report(quarantine_samples=(a_sample("[red]x[/] \x1b[2J [/nope]"),)))
    assert "[red]x[/]" in text
    assert "\x1b" not in text


def test_markdown_tables_keep_their_columns_whatever_a_message_contains(a_report: Build) -> None:
    sample = a_sample("a | b \\| c <script>\n| d `e` [f](g)")
    lines = render_markdown(a_report(quarantine_samples=(sample,))).splitlines()
    (line,) = (line for line in lines if "script" in line)
    assert len(re.split(r"(?<!\\)(?:\\\\)*\|", line)) == len(
        "| file | row | reason | message |".split("|")
    )
    assert "<script" not in line.replace("\\<", "")
    assert "[f](g)" not in line


def test_markdown_has_one_headline_and_the_sections(a_report: Build) -> None:
    lines = render_markdown(a_report()).splitlines()
    assert lines[0] == "# 3,992 of 4,000 rows scored, 8 quarantined"
    assert [line for line in lines if line.startswith("## ")] == [
        "## The bottleneck was decode: busy 97.1% of its time.",
        "## Ceilings of this device",
        "## Engine candidates",
        "## Quarantined rows",
        "## This run",
    ]


@pytest.mark.parametrize("render", [printed, render_markdown])
def test_files_that_cannot_be_read_are_told_of(
    a_report: Build, render: Callable[[RunReport], str]
) -> None:
    torn = UnreadableFile(path="dt=1/a.parquet", num_bytes=4_096, version="v", message="0 bytes")
    text = render(a_report(quarantined=0, scored=4_000, degraded=True, unreadable_files=(torn,)))
    for fact in (
        "All 4,000 rows scored; 1 file cannot be read",
        "Unreadable files",
        "4,096",
        "row count unknown",
        "0 bytes",
    ):
        assert fact in text
    assert "Unreadable files" not in render(a_report())
