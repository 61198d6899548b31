"""Nights that are interrupted: the report counts it, and says what it cost."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.features_nights import (
    DATE,
    NUM_ROWS,
    SMALL_SHARDS,
    commits,
    night,
    wait_for_commits,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]


def records_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in commits(output)]


def attempts_of(output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those that began, and how those ended that could say so."""
    files = sorted(output.glob("users/_runs/*/attempts/*.json"))
    begun = [path for path in files if not path.name.endswith(".end.json")]
    ended = [path for path in files if path.name.endswith(".end.json")]
    return ([json.loads(p.read_text()) for p in begun], [json.loads(p.read_text()) for p in ended])


def check_costs(report: dict[str, Any]) -> None:
    cost = report["cost"]
    shares = ("scoring_usd", "building_usd", "other_usd", "replay_usd")
    assert sum(cost[share] for share in shares) == pytest.approx(cost["usd"])
    assert cost["replay_usd"] == pytest.approx(
        report["replay_s"] * cost["price"]["usd_per_hour"] / 3600
    )


def test_a_night_that_drains_replays_nothing(
    start_score: Callable[..., Any], score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    command = night(features_job, tmp_path / "out", *SMALL_SHARDS)
    running = start_score(*command)
    wait_for_commits(running, tmp_path / "out", 5)
    running.signal(signal.SIGTERM)
    assert running.end(30).code == 75
    (_,), (end,) = attempts_of(tmp_path / "out")
    assert end["why"] == "Stop: SIGTERM"
    assert end["rows_begun"] == sum(record["num_rows"] for record in records_of(tmp_path / "out"))
    ended = score(*command)
    assert ended.code == 0, ended.err
    assert (ended.json["interruptions"], ended.json["rows_replayed"]) == (1, 0)
    assert (ended.json["replay_is_exact"], ended.json["replay_s"]) == (True, 0)
    check_costs(ended.json)
    shown = score("report", features_job, "--date", DATE, "--set", f"output.uri={tmp_path / 'out'}")
    assert "1 interruption; no row scored twice" in shown.out


def test_a_night_without_time_to_drain_counts_the_rows_that_it_drops(
    start_score: Callable[..., Any], score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = night(features_job, output, *SMALL_SHARDS, "--set", "lanes.grace_s=0")
    for name in ("SIGTERM", "SIGINT"):
        num_before = len(commits(output))
        running = start_score(*command)
        wait_for_commits(running, output, num_before + 30)
        running.signal(getattr(signal, name))
        assert running.end(30).code == 75
        assert {end["why"] for end in attempts_of(output)[1]} >= {f"Stop: {name}"}
    begun, ends = attempts_of(output)
    dropped = sum(end["rows_begun"] for end in ends)
    dropped -= sum(record["num_rows"] for record in records_of(output))
    assert 0 <= dropped <= sum(attempt["rows_at_risk"] for attempt in begun)
    ended = score(*command)
    assert ended.code == 0, ended.err
    report = ended.json
    assert (report["attempts"], report["interruptions"]) == (3, 2)
    assert (report["rows_replayed"], report["replay_is_exact"]) == (dropped, True)
    assert report["rows"] == NUM_ROWS
    check_costs(report)


def test_a_night_that_was_killed_is_counted_as_at_most_what_was_at_risk(
    start_score: Callable[..., Any],
    score: Callable[..., Any],
    features_job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "out"
    command = night(features_job, output, *SMALL_SHARDS)
    running = start_score(*command)
    wait_for_commits(running, output, 20)
    running.kill_group()
    running.end()
    (attempt,), ends = attempts_of(output)
    assert not ends
    left = NUM_ROWS - sum(record["num_rows"] for record in records_of(output))
    ended = score(*command)
    assert ended.code == 0, ended.err
    report = ended.json
    assert (report["interruptions"], report["replay_is_exact"]) == (1, False)
    assert report["rows_replayed"] == min(attempt["rows_at_risk"], left) > 0
    assert report["cost"]["replay_usd"] > 0
    check_costs(report)
    shown = score("report", features_job, "--date", DATE, "--set", f"output.uri={output}")
    said = f"1 interruption; at most {report['rows_replayed']:,} rows scored twice, $"
    assert said in shown.out
    page = (output / "users" / f"dt={DATE}" / "_report.html").read_text()
    assert said in page


def test_a_guard_that_stops_a_night_is_no_reason_to_score_again(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    strict = score(*night(features_job, output, "--set", "limits.max_quarantined=0.0001"))
    assert strict.code == 3
    (_,), (end,) = attempts_of(output)
    assert " of 40,000 rows (0.0" in end["why"]  # with the first shard that was too much
    assert 0 < end["rows_begun"] <= NUM_ROWS
    ended = score(*night(features_job, output))
    assert (ended.json["interruptions"], ended.json["replay_is_exact"]) == (1, True)
    scored = ended.json["stages"]["write"]["items"]
    assert end["rows_begun"] - ended.json["rows_replayed"] + scored == NUM_ROWS
    assert score("status", features_job, "--json").code == 0
