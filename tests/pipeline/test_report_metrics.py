"""Figures for Prometheus: true, readable by real parsers, and the ones that dashboards ask for."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from pipeline.report import (
    Alert,
    DeviceUse,
    Drift,
    Limit,
    RunReport,
    ScoreDistribution,
    StageTimes,
    WindowOutcome,
)
from pipeline.report_metrics import RunFigures, night_gauges, render_metrics, run_gauges

INFRA = Path(__file__).parents[2] / "infra"
FILES = (INFRA / "grafana" / "nightscore.json", INFRA / "prometheus" / "nightscore.yaml")
HOSTILE = 'a"b\\c\nd} 1'
FIGURES = RunFigures(
    is_working=True,
    has_failed=False,
    started_at=1_000.0,
    updated_at=1_060.0,
    num_rows=1_000,
    num_done=400,
    rows_per_s=50.0,
    stages={"decode": StageTimes(busy_s=3.0, wait_s=1.5, items=400)},
)


@pytest.fixture
def full_report(a_report: Callable[..., RunReport]) -> RunReport:
    """A report that knows everything."""
    return a_report(
        devices=(
            DeviceUse(name="H200", kind="gpu", num_samples=9, duration_s=9, utilisation_mean=0.8),
        ),
        joules_per_1000_rows=12.5,
        limit=Limit(
            per_sec=9, rate_per_sec=8, reached=0.9, bound_by="x", gap_usd=0, gap_usd_per_100k=0
        ),
        drift=Drift(rows=32, agreement=0.99),
        distribution=ScoreDistribution(
            counts="", num_values=9, model="m", head="scores", psi={"scores": 0.02}
        ),
        window=WindowOutcome(deadline="2026-11-21T07:00:00+01:00", met=False, margin_s=-30.0),
        alerts=(Alert(name="rate", text="slower"),),
        quarantined_by_reason={"truncated": 2},
    )


def values(text: str) -> dict[tuple[str, ...], float]:
    """By name and labels, but the job's; both parsers must agree."""
    read: list[dict[tuple[str, ...], float]] = []
    for parse in (open_metrics, prometheus):
        found = {}
        for family in parse(text + "# EOF\n"):
            assert family.type == "gauge", family.name
            assert family.documentation
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("job_name")
                found[(sample.name, *labels.values())] = sample.value
        read.append(found)
    assert read[0] == read[1]
    return read[0]


def test_a_run_at_work_says_how_far_it_is() -> None:
    found = values(render_metrics("users", run_gauges(FIGURES)))
    assert found[("nightscore_run_working",)] == 1
    assert found[("nightscore_run_failed",)] == 0
    assert found[("nightscore_run_done_rows",)] == 400
    assert found[("nightscore_run_left_seconds",)] == 600 / 50
    assert found[("nightscore_run_stage_busy_seconds", "decode")] == 3.0
    assert found[("nightscore_run_stage_wait_seconds", "decode")] == 1.5


def test_without_a_rate_no_time_is_left() -> None:
    still = dataclasses.replace(FIGURES, rows_per_s=0.0, stages={})
    assert values(render_metrics("users", run_gauges(still)))[("nightscore_run_left_seconds",)] == 0


def test_a_published_night_says_what_its_report_says(full_report: RunReport) -> None:
    found = values(render_metrics("users", night_gauges(full_report)))
    report = full_report
    expected: dict[tuple[str, ...], float] = {
        ("nightscore_night_rows",): report.rows,
        ("nightscore_night_usd_per_100k",): report.usd_per_100k,
        ("nightscore_night_examples_per_second",): report.examples_per_sec,
        ("nightscore_night_window_margin_seconds",): -30.0,
        ("nightscore_night_drift_agreement",): 0.99,
        ("nightscore_night_joules_per_1000_rows",): 12.5,
        ("nightscore_night_alerts",): 1,
        ("nightscore_night_quarantined_by_reason_rows", "truncated"): 2,
        ("nightscore_night_device_busy_ratio", "0 H200"): 0.8,
        ("nightscore_night_psi", "scores"): 0.02,
        ("nightscore_night_part_usd", "scoring"): report.cost.scoring_usd,
        ("nightscore_night_phase_seconds", "score"): report.phases.score_s,
    }
    assert expected.items() <= found.items()


def test_the_parts_of_the_cost_are_all_of_it(full_report: RunReport) -> None:
    found = values(render_metrics("users", night_gauges(full_report)))
    parts = [value for name, value in found.items() if name[0] == "nightscore_night_part_usd"]
    assert sum(parts) == pytest.approx(found[("nightscore_night_usd",)])


def test_what_a_report_does_not_know_is_left_out(a_report: Callable[..., RunReport]) -> None:
    unknown = a_report(
        window=None, drift=None, limit=None, joules_per_1000_rows=None, ceilings=None
    )
    names = {name for name, *_ in values(render_metrics("users", night_gauges(unknown)))}
    for left_out in ("window_margin_seconds", "drift_agreement", "limit_ratio", "ceiling"):
        assert not [name for name in names if left_out in name]


def test_names_from_data_cannot_break_the_file(a_report: Callable[..., RunReport]) -> None:
    report = a_report(quarantined_by_reason={HOSTILE: 1})
    found = values(render_metrics("users", night_gauges(report)))
    assert found[("nightscore_night_quarantined_by_reason_rows", HOSTILE)] == 1


def written(report: RunReport) -> set[str]:
    return {gauge.name for gauge in (*run_gauges(FIGURES), *night_gauges(report))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_dashboard_and_alerts_ask_only_for_what_is_written(
    path: Path, full_report: RunReport
) -> None:
    asked = set(re.findall(r"\bnightscore_(?:run|night)_\w+", path.read_text()))
    assert asked
    assert asked <= written(full_report)


def test_panels_have_their_own_place_and_a_description() -> None:
    dashboard = json.loads(FILES[0].read_text())
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place: dict[str, int] = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or panel["description"], panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_alerts_say_what_is_wrong_with_which_job() -> None:
    (group,) = yaml.safe_load(FILES[1].read_text())["groups"]
    for rule in group["rules"]:
        rule: dict[str, Any]
        assert rule["labels"]["severity"] in ("page", "warn")
        assert "$labels.job_name" in rule["annotations"]["summary"]
