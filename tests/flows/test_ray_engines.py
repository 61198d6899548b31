"""The engines of a run on a cluster: who is asked for which, and what happens without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.build import EngineRequest, ResolvedEngine
from engines.devices import Cpu, this_cpu
from engines.errors import AccuracyError, EngineCorruptError
from engines.manifest import StoredEngine
from flows.on_ray.desk import Build, Desk, News, Seat
from flows.on_ray.engines import Engines, Wanted
from pipeline.engine import request_for
from pipeline.errors import InputError
from pipeline.job_file import load_job
from pipeline.lane import LaneDevice
from tests.engines.small_devices import H200
from tests.engines.small_stores import a_manifest

NEW = this_cpu(1)
OLD = dataclasses.replace(NEW, name="an old one")


def engine_for(device: Cpu) -> ResolvedEngine:
    manifest = a_manifest(device.name, device=device)
    return ResolvedEngine(engine=StoredEngine(folder="", manifest=manifest), built=True, build_s=1)


class Night:
    """A driver and its lanes, one call after the other."""

    def __init__(self, job: Path, *sets: str) -> None:
        self.job = load_job(str(job), ["lanes.runner=ray", *sets])
        self.desk = Desk()
        self.engines = Engines(self.job, self.desk)

    def join(self, lane: str, cpu: Cpu, **more: Any) -> None:
        self.desk.join(lane, lane, LaneDevice(name=lane, num_threads=1, cpu=cpu, **more))

    def want(self, request: EngineRequest | None = None) -> None:
        plan: Any = SimpleNamespace(num_features=32)
        request = request or request_for(self.job, 32, NEW)
        self.engines.want(Wanted(plan=plan, fingerprint="f", request=request, force=False))

    def look(self) -> list[tuple[str, Exception]]:
        seen = self.desk.look()
        self.engines.look(seen.seats, seen.built)
        return list(seen.errors)

    def seat(self, lane: str) -> Seat:
        return next(seat for seat in self.desk.look().seats if seat.lane == lane)

    def asked(self, lane: str) -> Build | None:
        return self.desk.turn(lane, News()).build


@pytest.fixture
def night(features_job: Path) -> Night:
    return Night(features_job)


def test_one_lane_of_each_kind_is_asked_for_its_engine(night: Night) -> None:
    night.join("a", NEW)
    night.join("b", NEW)
    night.join("c", OLD)
    night.look()
    assert night.asked("a") is None, "nothing is wanted yet"
    night.want()
    night.look()
    asked = {lane: night.asked(lane) for lane in "abc"}
    assert {lane: build and build.request.device for lane, build in asked.items()} == {
        "a": NEW,
        "b": None,
        "c": OLD,
    }
    night.look()
    assert not any(map(night.asked, "abc")), "they are at it"


def test_a_run_begins_with_the_first_engine_that_is_there(night: Night) -> None:
    night.join("a", NEW)
    night.join("b", OLD)
    night.want()
    night.look()
    assert night.engines.first() is None
    night.desk.turn("b", News(built=engine_for(OLD)))
    night.look()
    assert night.engines.first() == engine_for(OLD)
    assert night.engines.kind_of(night.seat("a")).resolved is None


def test_a_kind_that_joins_later_gets_its_engine_then(night: Night) -> None:
    night.join("a", NEW)
    night.want()
    night.look()
    night.desk.turn("a", News(built=engine_for(NEW)))
    night.look()
    night.join("b", OLD)
    night.join("c", NEW)
    night.look()
    assert night.asked("b") is not None
    assert night.asked("c") is None
    night.desk.turn("b", News(built=engine_for(OLD)))
    night.look()
    found = {lane: night.engines.kind_of(night.seat(lane)).resolved for lane in "abc"}
    assert found == {"a": engine_for(NEW), "b": engine_for(OLD), "c": engine_for(NEW)}


def test_another_lane_builds_on_its_own_device_when_the_first_is_gone(night: Night) -> None:
    for lane in ("GPU-1", "GPU-2"):
        gpu = dataclasses.replace(H200, uuid=lane)
        night.desk.join(lane, lane, LaneDevice(name=lane, num_threads=1, gpu=gpu))
    night.want()
    night.look()
    assert night.asked("GPU-1") is not None
    night.desk.lost("GPU-1")
    night.look()
    build = night.asked("GPU-2")
    assert build is not None
    assert build.request.device == dataclasses.replace(H200, uuid="GPU-2")


def test_a_kind_without_an_engine_is_left_out_while_there_are_others(night: Night) -> None:
    night.join("a", NEW)
    night.join("b", OLD)
    night.want()
    night.look()
    error = AccuracyError("none passes")
    night.desk.turn("b", News(error=error, leaves=True))
    assert night.look() == [("b", error)]
    assert night.engines.leave_out(night.seat("b"), error)
    night.join("c", OLD)
    night.look()
    assert night.asked("c") is None
    why = night.engines.kind_of(night.seat("c")).why_not
    assert why == "there is no engine for it (none passes)"
    night.desk.turn("a", News(error=error, leaves=True))
    night.look()
    assert not night.engines.leave_out(night.seat("a"), error), "it is the last one"


def test_a_kind_whose_lanes_are_gone_does_not_keep_a_night_waiting(night: Night) -> None:
    night.join("a", NEW)
    night.join("b", OLD)
    night.want()
    night.look()
    night.desk.lost("a")
    night.look()
    assert not night.engines.leave_out(night.seat("b"), AccuracyError("none passes"))


def test_other_errors_and_those_of_lanes_at_work_are_not_about_a_build(night: Night) -> None:
    night.join("a", NEW)
    night.join("b", OLD)
    assert not night.engines.leave_out(night.seat("a"), AccuracyError("before it was asked"))
    night.want()
    night.look()
    assert not night.engines.leave_out(night.seat("b"), InputError("no rows"))
    night.desk.turn("b", News(built=engine_for(OLD)))
    night.look()
    assert not night.engines.leave_out(night.seat("b"), EngineCorruptError("it does not open"))


def test_a_job_may_ask_for_one_engine_only(features_job: Path) -> None:
    night = Night(features_job, "lanes.mix_devices=false")
    night.join("a", NEW)
    night.join("b", OLD)
    night.want()
    night.look()
    assert night.asked("a") is not None
    assert night.asked("b") is None
    assert night.engines.kind_of(night.seat("b")).why_not == (
        f"the run's engine is for {NEW.name}, and scores of two engines never meet in it "
        "(lanes.mix_devices)"
    )
