"""The report survives JSON unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pipeline.report import RunReport, StageTimes, UnreadableFile, report_from_dict
from pipeline.report_engine import EngineRows


def test_a_report_read_back_from_json_is_the_same(a_report: Callable[..., RunReport]) -> None:
    torn = UnreadableFile(path="a.parquet", num_bytes=4_096, version="v", message="0 bytes")
    report = a_report(degraded=True, unreadable_files=(torn,))
    assert report_from_dict(json.loads(report.to_json())) == report


def test_a_report_without_stages_and_ceilings_reads_back(
    a_report: Callable[..., RunReport],
) -> None:
    report = a_report(stages={}, ceilings=None, quarantine_samples=(), quarantined_by_reason={})
    assert report_from_dict(json.loads(report.to_json())) == report


def test_a_report_from_before_devices_were_sampled_reads_back(
    a_report: Callable[..., RunReport],
) -> None:
    data = json.loads(a_report(devices=(), joules_per_1000_rows=None).to_json())
    del data["devices"], data["joules_per_1000_rows"]
    assert report_from_dict(data) == a_report(devices=(), joules_per_1000_rows=None)


def test_a_report_from_before_interruptions_were_counted_reads_back(
    a_report: Callable[..., RunReport],
) -> None:
    data = json.loads(a_report().to_json())
    for name in ("interruptions", "rows_replayed", "replay_is_exact", "replay_s"):
        del data[name]
    del data["cost"]["replay_usd"]
    assert report_from_dict(data) == a_report()


def test_the_engines_of_a_report_read_back(a_report: Callable[..., RunReport]) -> None:
    engines = (EngineRows(key="a", device="new", rows=3), EngineRows(key="b", device=None, rows=1))
    report = a_report(engines=engines)
    assert report_from_dict(json.loads(report.to_json())) == report
    data = json.loads(a_report().to_json())  # of a version that knew of one only
    del data["engines"], data["engine"]["common"]
    assert report_from_dict(data) == a_report()


def test_json_keeps_foreign_characters_readable(a_report: Callable[..., RunReport]) -> None:
    assert "Zürich" in a_report(device="Zürich 1").to_json()


@pytest.mark.parametrize("key", ["run_id", "cost", "engine"])
def test_an_incomplete_object_is_refused(a_report: Callable[..., RunReport], key: str) -> None:
    data = a_report().to_dict()
    del data[key]
    with pytest.raises((KeyError, TypeError)):
        report_from_dict(data)


def test_stage_times_of_lanes_add_up() -> None:
    one = StageTimes(busy_s=1.0, wait_s=2.0, items=3)
    assert one + one == StageTimes(busy_s=2.0, wait_s=4.0, items=6)
