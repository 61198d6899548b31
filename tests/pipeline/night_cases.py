"""A whole night in this process: the product's own steps, but no lane's process and no engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline_cases import scoring_tools

import pipeline.run
from engines.build import ResolvedEngine
from engines.manifest import StoredEngine
from pipeline import lane_child
from pipeline.config import Job
from pipeline.cost import own_price
from pipeline.finish import already_published, finish_run
from pipeline.lane import LaneDevice
from pipeline.report import RunReport
from pipeline.run import Again, Night, RunClock
from pipeline.score_shards import ShardScoring
from pipeline.storage import open_storage
from pipeline.versions import find_published
from tests.engines.small_stores import a_manifest


def without_an_engine(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """No model is looked at, as the engine is always the same; `put` as `setattr`."""
    put(pipeline.run, "fingerprint_model", lambda _: "model")


def the_engine(*_: object, **__: object) -> ResolvedEngine:
    """At once."""
    engine = StoredEngine(folder="none", manifest=a_manifest())
    return ResolvedEngine(engine=engine, built=False, build_s=0.0)


def score_night(job: Job, date: str, runner: Any, again: Again = "no") -> RunReport:
    """What `flows.night.run_night` does, in one thread of this process."""
    output = open_storage(job.output.uri)
    published = find_published(output, job.name, date)
    wanted = Night(job=job, date=date, again=again)
    if published and pipeline.run.is_left_alone(wanted, published, output, lambda _: None):
        return already_published(job, output, published)
    device, clock = LaneDevice(name="cpu", num_threads=1), RunClock()
    run = pipeline.run.prepare_run(
        wanted, [device], clock, lambda _: None, the_engine, replaces=published
    )
    tools = scoring_tools(job, run.plan, runner, owner=run.attempt.id, ledger=run.ledger)
    shards = lane_child.pass_over_committed(run.todo, run.ledger, lambda _: None)
    with ShardScoring(shards, tools) as scoring:
        deque(scoring, maxlen=0)
    return finish_run(run, [], own_price("here", 1.0, as_of=date), ())
