"""`score report` and `score compare` find the nights that they are asked for, in 80 columns."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.nights import compare_facts, last_facts, render_comparison, render_last, report_of
from pipeline.config import Job
from pipeline.errors import InputError
from pipeline.history import read_history, record_night
from pipeline.local_storage import LocalStorage
from tests.pipeline.conftest import REPORT

WALL_S = {17: 40.0, 18: 38.0, 19: 42.0, 20: 90.0}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job with four published nights, the last of them slow."""
    for day, wall_s in WALL_S.items():
        publish(tmp_path / "out", day, wall_s)
    return Job.model_validate(
        {
            "name": "demo",
            "input": {"uri": "in", "passthrough": ["id"], "images": {"column": "image"}},
            "model": {"source": "model.onnx"},
            "output": {"uri": str(tmp_path / "out")},
            "cost": {"instance": "c6i.large"},
        }
    )


def publish(root: Path, day: int, wall_s: float, rows: int = 4_000, **changes: Any) -> None:
    """What a night leaves behind; keywords replace fields of its report."""
    date = f"2026-11-{day}"
    report = dataclasses.replace(
        REPORT,
        date=date,
        run_id=f"{date}-7d1f",
        rows=rows,
        wall_s=wall_s,
        examples_per_sec=rows / wall_s,
        building_s=0.0,
        **changes,
    )
    published = {"run_id": report.run_id, "version": 1, "published_at": f"{date}T02:00:00Z"}
    folder = root / "demo" / f"dt={date}"
    folder.mkdir(parents=True)
    manifest = {**published, "report": report.to_dict()}
    (folder / "_MANIFEST.json").write_text(json.dumps(manifest))
    output = LocalStorage(str(root))
    record_night(output, report, version=1, published_at=published["published_at"])


def shown(renderable: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def test_the_last_nights_are_a_table_and_the_alerts_of_the_newest(job: Job) -> None:
    facts = last_facts(job, 2)
    assert [night["date"] for night in facts["nights"]] == ["2026-11-19", "2026-11-20"]
    names = [alert["name"] for alert in facts["alerts"]]
    assert names == ["rate"], "judged by nights that are not in the table, too"
    text = shown(render_last(facts))
    assert "2026-11-20  4,000         0.2%    44.4  0.0252  1 min 30 s  openvino int8" in text
    assert "2026-11-18" not in text
    assert "rate: 44.4 rows/s, 55.6% below" in " ".join(text.split())


def test_nights_whose_quarantine_was_tried_again_are_in_no_median(job: Job) -> None:
    for day in (21, 22, 23, 24, 25):
        publish(Path(job.output.uri), day, 1.0, rows_taken_over=3_990)
    text = shown(render_last(last_facts(job, 9)))
    assert "2026-11-25" in text
    assert "median 4,000 97.6 0.0252 41.0 s" in " ".join(text.split())
    assert "\nmedian" not in shown(render_last(last_facts(job, 5))), "there is none to take it of"


def test_nights_that_shared_the_machine_are_in_no_median_of_others(job: Job) -> None:
    half = dataclasses.replace(REPORT.cost.price, machine_share=0.5)
    for day in (14, 15, 16):
        cost = dataclasses.replace(REPORT.cost, price=half)
        publish(Path(job.output.uri), day, 1_000.0, cost=cost)
    text = shown(render_last(last_facts(job, 9)))
    assert "2026-11-14" in text
    assert "median 4,000 97.6 0.0252 41.0 s" in " ".join(text.split())


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_cuts_no_number_off(width: int, job: Job) -> None:
    text = shown(render_last(last_facts(job, 2)), width)
    assert "…" not in text
    assert "\n2026-11-20 " in text


def test_nights_of_a_hundred_million_rows_fit_into_80_columns(job: Job) -> None:
    publish(Path(job.output.uri), 21, 20_000.0, rows=100_000_000)
    text = shown(render_last(last_facts(job, 30)))
    assert "100,000,000" in text
    assert "5 h 33 min" in text


def test_the_report_without_a_date_is_that_of_the_newest_night(job: Job) -> None:
    assert report_of(job, None).date == "2026-11-20"
    assert report_of(job, "2026-11-18").date == "2026-11-18"


def test_a_night_that_is_missing_in_the_history_is_written_by_its_report(job: Job) -> None:
    output = LocalStorage(job.output.uri)
    before = read_history(output, "demo")
    output.delete("demo/_history/2026-11-18_v1_2026-11-18-7d1f.parquet")
    assert len(read_history(output, "demo")) == 3
    report_of(job, "2026-11-18")
    assert read_history(output, "demo") == before


def test_two_nights_stand_side_by_side(job: Job) -> None:
    facts = compare_facts(job, "2026-11-17", "2026-11-20")
    figures = {figure["name"]: figure for figure in facts["figures"]}
    assert figures["wall-clock time"]["change"] == pytest.approx(1.25)
    assert json.loads(json.dumps(facts))["changed"] == []
    text = " ".join(shown(render_comparison(facts)).split())
    assert "wall-clock time 40.0 s 1 min 30 s +125.0%" in text
    assert "scores, stability index: cannot be compared" in text
    assert "changed: neither engine nor machine nor price" in text


def test_what_is_not_published_is_said_with_the_way_out(job: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dt=2026-11-21: not published"):
        compare_facts(job, "2026-11-20", "2026-11-21")
    other = job.model_copy(update={"name": "other"})
    for asked in (lambda: last_facts(other, 3), lambda: report_of(other, None)):
        with pytest.raises(InputError, match=f"{tmp_path}/out/other: no night in its history"):
            asked()
