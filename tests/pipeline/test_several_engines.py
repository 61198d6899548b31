"""A run of several engines: which ledger an attempt finds, and what the report says of each."""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from night_cases import without_an_engine
from pipeline_cases import DATE, SumRunner, a_job, job_data, scoring_tools, users, write_input

import pipeline.run
from engines.build import ResolvedEngine
from engines.devices import Cpu
from engines.manifest import StoredEngine
from pipeline.cost import own_price
from pipeline.finish import finish_run
from pipeline.lane import LaneDevice
from pipeline.run import Night, PreparedRun, RunClock, engine_rate, lane_setup
from pipeline.score_shards import ShardScoring
from pipeline.verify import verify_published
from tests.engines.small_stores import a_manifest

NEW = Cpu(name="new", architecture="x", instructions=(), num_threads=4)
OLD = dataclasses.replace(NEW, name="old")


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    without_an_engine(monkeypatch.setattr)


def lane_on(cpu: Cpu) -> LaneDevice:
    return LaneDevice(name="lane", num_threads=cpu.num_threads, cpu=cpu)


def engine_for(cpu: Cpu) -> ResolvedEngine:
    engine = StoredEngine(folder="none", manifest=a_manifest(cpu.name, device=cpu))
    return ResolvedEngine(engine=engine, built=False, build_s=0.0)


def prepared(root: Path, cpu: Cpu, **lanes: Any) -> PreparedRun:
    job = a_job(
        job_data(root),
        lanes=lanes,
        limits={"drift_rows": 0},
        engine={"store": str(root / "engines")},
    )
    return pipeline.run.prepare_run(
        Night(job=job, date=DATE),
        [lane_on(cpu)],
        RunClock(),
        lambda _: None,
        lambda *_, **__: engine_for(cpu),
    )


def score(run: PreparedRun, resolved: ResolvedEngine, shards: slice) -> None:
    """What a lane with this engine does."""
    run.engines.setdefault(resolved.engine.key, resolved)
    setup = lane_setup(dataclasses.replace(run, resolved=resolved), lane_on(NEW), 1)
    changes = {"layout": setup.layout, "owner": run.attempt.id, "ledger": run.ledger}
    tools = scoring_tools(run.job, run.plan, SumRunner(), **changes)
    with ShardScoring(run.todo[shards], tools) as scoring:
        deque(scoring, maxlen=0)


@pytest.mark.parametrize(
    ("lanes", "is_same"),
    [({"runner": "ray"}, True), ({}, False), ({"runner": "ray", "mix_devices": False}, False)],
)
def test_on_a_cluster_an_attempt_on_another_kind_goes_on_with_the_same_ledger(
    tmp_path: Path, lanes: dict[str, Any], is_same: bool
) -> None:
    write_input(tmp_path / "in", users(100))
    runs = [prepared(tmp_path, cpu, **lanes) for cpu in (NEW, OLD)]
    assert (runs[0].ledger.run_id == runs[1].ledger.run_id) is is_same


def test_the_report_counts_the_rows_of_each_engine_over_all_attempts(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(100))
    first = prepared(tmp_path, OLD, runner="ray")
    score(first, engine_for(OLD), slice(0, 1))
    run = prepared(tmp_path, NEW, runner="ray")
    assert len(run.todo) == 4
    score(run, engine_for(NEW), slice(0, 3))
    third = dataclasses.replace(NEW, name="third")
    score(run, engine_for(third), slice(3, 4))
    report = finish_run(run, [], own_price("here", 1.0, as_of=DATE), ())
    assert report.engine.key == engine_for(NEW).engine.key
    assert report.engine.common == run.pin.common != ""
    assert {(each.key, each.device, each.rows) for each in report.engines} == {
        (engine_for(NEW).engine.key, "new", 60),
        (engine_for(third).engine.key, "third", 20),
        (engine_for(OLD).engine.key, None, 20),  # no store has it, as nobody has built it
    }
    assert report.engines[0].device == "new"
    assert report.device == "new and third, nothing left to score"
    assert verify_published(run.output.uri, "users", DATE)["rows"] == 100


def test_a_lanes_rate_is_its_share_of_what_its_engine_did_when_it_was_built() -> None:
    manifest = engine_for(NEW).engine.manifest
    assert engine_rate(manifest, lane_on(NEW)) == 1_000
    half = LaneDevice(name="cpu0", num_threads=2, machine_threads=4)
    assert engine_rate(manifest, half) == 500
    nothing = dataclasses.replace(manifest, rungs=())
    assert engine_rate(nothing, lane_on(NEW)) == 1
