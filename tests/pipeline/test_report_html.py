"""The page is complete, self-contained, and safe to open."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.report import Price, QuarantineSample, RunReport, UnreadableFile
from pipeline.report_html import render_html

Build = Callable[..., RunReport]
HOSTILE = """'"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x00\x1b[2J\ud800"""
VOID = {"meta", "link"}


class Page(HTMLParser):
    """What a browser would see: the tags, the text, and whether all of them are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile(report: RunReport) -> RunReport:
    """The same report with every foreign text replaced by an attack."""
    engine = dataclasses.replace(
        report.engine,
        key=HOSTILE,
        runtime=HOSTILE,
        precision=HOSTILE,
        reason=HOSTILE,
        rungs=(dataclasses.replace(report.engine.rungs[0], runtime=HOSTILE, error=HOSTILE),),
    )
    price = Price(
        instance=HOSTILE,
        market=HOSTILE,
        usd_per_hour=1.0,
        source=f"https://example.com/{HOSTILE}",
        as_of=HOSTILE,
    )
    sample = QuarantineSample(file=HOSTILE, row=1, reason=HOSTILE, message=HOSTILE)
    names = ("run_id", "job", "date", "bottleneck", "device", "started_at", "finished_at")
    texts: dict[str, Any] = dict.fromkeys((*names, "output", "manifest", "status"), HOSTILE)
    return dataclasses.replace(
        report,
        **texts,
        engine=engine,
        cost=dataclasses.replace(report.cost, price=price),
        stages={HOSTILE: report.stages["decode"]},
        quarantined_by_reason={HOSTILE: 8},
        quarantine_samples=(sample,),
        degraded=True,
        unreadable_files=(
            UnreadableFile(path=HOSTILE, num_bytes=1, version=HOSTILE, message=HOSTILE),
        ),
    )


def test_the_page_has_what_the_morning_wants_to_know(a_report: Build) -> None:
    text = Page(render_html(a_report())).text
    for fact in (
        "3,992 of 4,000 rows scored, 8 quarantined",
        "everything included, 526 while scoring",
        "$0.0252 per 100,000 rows; $0.00101 for the whole run.",
        "building the engine $0.0185",
        "c6i.large, on demand, $0.085 an hour",
        "as of 2025-07-01",
        "The bottleneck was decode: busy 97.1% of its time.",
        "engine with copies",
        "70.9%",
        "openvino int8, batches of 8, built in 31.4 s",
        "0.9921 with fp32 on 512 held-out rows; at least 0.97 required",
        "Fastest candidate that passed the gate: 1.9 times fp32.",
        "missed the gate",
        "format_not_accepted",
        "Premature end of JPEG data. Stopped at line 238/369",
        "publish 0.48 s",
        "demo-2026-11-20-7d1f03c9",
        "s3://lake/scores/demo/dt=2026-11-20/_MANIFEST.json",
    ):
        assert fact in text


def test_every_element_is_closed(a_report: Build) -> None:
    assert Page(render_html(a_report())).open == []


def test_the_bottleneck_and_the_chosen_engine_stand_out(a_report: Build) -> None:
    strong = re.findall(r'<tr class="strong"><th scope="row">([^<]*)', render_html(a_report()))
    assert strong == ["decode", "openvino int8"]


def test_nothing_is_loaded_and_nothing_runs(a_report: Build) -> None:
    html = render_html(a_report())
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "form"} & set(page.tags)
    assert {value for name, value in page.attributes if name in ("src", "href")} == {
        "data:,",
        "https://aws.amazon.com/ec2/pricing/",
    }
    assert "url(" not in html
    assert "@import" not in html


def test_hostile_texts_reach_the_page_as_text_only(a_report: Build) -> None:
    plain, attacked = Page(render_html(a_report())), Page(render_html(hostile(a_report())))
    assert set(attacked.tags) <= set(plain.tags)
    assert {name for name, _ in attacked.attributes} <= {name for name, _ in plain.attributes}
    assert attacked.text.count("<script>alert(1)</script>") >= 15
    assert attacked.open == []


def test_hostile_texts_can_be_written_as_utf_8(a_report: Build) -> None:
    page = render_html(hostile(a_report())).encode("utf-8")
    assert b"\x00" not in page
    assert b"\x1b" not in page


def test_only_an_https_address_becomes_a_link(a_report: Build) -> None:
    report = a_report()
    price = dataclasses.replace(report.cost.price, source="javascript:alert(1)")
    changed = a_report(cost=dataclasses.replace(report.cost, price=price))
    assert "a" not in Page(render_html(changed)).tags


def test_the_page_adapts_to_dark_rooms_and_phones(a_report: Build) -> None:
    html = render_html(a_report())
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert '<html lang="en">' in html


def test_bars_never_leave_their_track(a_report: Build) -> None:
    report = a_report()
    assert report.ceilings is not None
    slow = dataclasses.replace(report.ceilings, decode_per_sec=1.0)
    widths = re.findall(r"width:([\d.]+)%", render_html(a_report(ceilings=slow)))
    assert max(float(width) for width in widths) <= 100


@pytest.mark.parametrize("status", ["published", "already_published"])
def test_a_run_without_rows_has_a_page_without_empty_sections(a_report: Build, status: str) -> None:
    page = Page(
        render_html(
            a_report(
                status=status,
                rows=0,
                scored=0,
                quarantined=0,
                quarantined_by_reason={},
                quarantine_samples=(),
                stages={},
                ceilings=None,
                bottleneck="none",
            )
        )
    )
    assert "o rows to score" in page.text
    assert "What was odd" not in page.text
    assert "How near to the limit" not in page.text
    assert ("Nothing was left to do" in page.text) == (status == "already_published")


def test_files_that_cannot_be_read_are_told_of(a_report: Build) -> None:
    torn = UnreadableFile(path="dt=1/a.parquet", num_bytes=4_096, version="v", message="0 bytes")
    text = Page(render_html(a_report(degraded=True, unreadable_files=(torn,)))).text
    for fact in (
        "1 file cannot be read",
        "dt=1/a.parquet",
        "4,096",
        "row count unknown",
        "0 bytes",
    ):
        assert fact in text
    assert "could not be read" not in Page(render_html(a_report())).text


def test_a_range_of_rows_is_shown_as_one(a_report: Build) -> None:
    sample = QuarantineSample(
        file="a", row=40, reason="row_group_too_large", message="m", num_rows=10**12
    )
    assert "40 to 1,000,000,000,039" in render_html(a_report(quarantine_samples=(sample,)))
