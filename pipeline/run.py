"""A run from plan to report; whoever has lanes (flows/) scores the shards in between."""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.build import ResolvedEngine
from engines.gate import Accuracy
from engines.manifest import EngineManifest
from engines.model import fingerprint_model
from pipeline.config import Job
from pipeline.cost import cost_of
from pipeline.engine import get_engine, load_class_names, request_for
from pipeline.errors import GuardError
from pipeline.footers import check_pin
from pipeline.lane import NO_TIME, Lane, LaneDevice, add_times
from pipeline.lane_messages import LaneSetup, PoisonRow, WatchLimits
from pipeline.ledger import Attempt, CommitRecord, Ledger, utc_now
from pipeline.limit import limit_of, sum_of_ceilings
from pipeline.part import OutputLayout
from pipeline.plan import Plan, Shard, make_plan, run_id_of
from pipeline.publish import (
    check_complete,
    count_reasons,
    publish,
    published_folder,
    read_report,
    write_reports,
)
from pipeline.quarantine import read_samples
from pipeline.report import (
    DeviceUse,
    EngineFacts,
    EngineRung,
    Phases,
    Price,
    RunReport,
    StageTimes,
)
from pipeline.row_groups import DAMAGES
from pipeline.storage import MANIFEST, open_storage, probe
from pipeline.telemetry import joules_per_1000
from pipeline.tuning import settings_of
from pipeline.watchdog import memory_share

GIB = 2**30
SLOWEST_ENGINE_PER_S = 1.0
"""Rows per second of an engine whose ladder does not tell its rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run that is planned, pinned and has its engine; nothing is scored yet."""

    job: Job
    plan: Plan
    resolved: ResolvedEngine
    ledger: Ledger
    attempt: Attempt
    todo: tuple[Shard, ...]
    """Shards without a commit record."""
    poison: tuple[PoisonRow, ...]
    """Rows that killed a process of an earlier attempt."""
    clock: RunClock


@dataclass(slots=True)
class RunClock:
    """When the phases of this attempt began; seconds of `time.monotonic`."""

    started: float
    """Process start."""
    ready: float = 0.0
    planned: float = 0.0
    prepared: float = 0.0
    scored: float = 0.0


def prepare_run(
    job: Job,
    date: str,
    device: LaneDevice,
    clock: RunClock,
    say: Callable[[str], None],
    *,
    force: bool = False,
) -> PreparedRun:
    """Plan the date, check the store, get the engine and open the ledger.

    Args:
        job: The job.
        date: ISO date of the run.
        device: What the lanes run on; decides the engine.
        clock: Gets the times of the phases.
        say: Is told in a few words what takes long.
        force: Build a new engine even when there is one, because that one does not open. The time
            that it took to find out counts as the engine's.
    """
    clock.ready = clock.ready or time.monotonic()
    source, output = open_storage(job.input.uri), open_storage(job.output.uri)
    class_names = load_class_names(job.model.class_names)
    plan = make_plan(job, date, source)
    clock.planned = clock.planned or time.monotonic()
    if plan.num_rows < job.limits.min_rows:
        raise GuardError(
            f"{source.uri}: {plan.num_rows:,} rows for {date}; expected at least "
            f"{job.limits.min_rows:,} (limits.min_rows). Nothing was scored; wait for the rest, "
            f"or run with `--set limits.min_rows={plan.num_rows}`."
        )
    request = request_for(job, plan.num_features, device.engine_device)
    fingerprint = fingerprint_model(request.model)
    # Whatever is wrong with the job has been found by now: from here on the output is written to.
    probe(output, f"{job.name}/_runs")
    resolved = get_engine(job, plan, request, fingerprint, say, force=force)
    clock.prepared = time.monotonic()
    ledger = Ledger(output, job.name, run_id_of(plan, job, resolved.engine.key, class_names))
    attempt = _open_attempt(ledger, job, plan, resolved, clock)
    done = ledger.records()
    todo = tuple(shard for shard in plan.shards if shard.index not in done)
    return PreparedRun(
        job=job,
        plan=plan,
        resolved=resolved,
        ledger=ledger,
        attempt=attempt,
        todo=todo,
        poison=ledger.poison(),
        clock=clock,
    )


def _open_attempt(
    ledger: Ledger, job: Job, plan: Plan, resolved: ResolvedEngine, clock: RunClock
) -> Attempt:
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(
        seconds=time.monotonic() - clock.started
    )
    attempt = Attempt(
        id=uuid.uuid4().hex[:12],
        started_at=began.isoformat(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    description = {
        "run_id": ledger.run_id,
        "date": plan.date,
        "job": job.model_dump(mode="json"),
        "engine": resolved.engine.key,
        "files": [asdict(file) for file in plan.files],
        "unreadable": [asdict(file) for file in plan.unreadable],
        "num_shards": len(plan.shards),
    }
    ledger.open(description, attempt)
    return attempt


def lane_setup(run: PreparedRun, device: LaneDevice, num_lanes: int) -> LaneSetup:
    """What each of so many lanes must be told to score shards of the run."""
    job, plan, manifest = run.job, run.plan, run.resolved.engine.manifest
    layout = OutputLayout(
        head=job.model.head,
        class_names=load_class_names(job.model.class_names),
        compression=job.output.compression,
        metadata={
            "run_id": run.ledger.run_id,
            "engine_key": manifest.key,
            "model_fingerprint": manifest.model_fingerprint,
            "input_fingerprint": plan.input_fingerprint,
        },
    )
    return LaneSetup(
        job=job,
        engine=run.resolved.engine,
        feature_columns=plan.feature_columns,
        num_features=plan.num_features,
        layout=layout,
        run_id=run.ledger.run_id,
        attempt=run.attempt.id,
        num_threads=device.num_threads,
        limits=watch_limits(job, run.resolved.engine.manifest, device, num_lanes),
        poison=run.poison,
    )


def watch_limits(
    job: Job, manifest: EngineManifest, device: LaneDevice, num_lanes: int
) -> WatchLimits:
    """How long a lane may be at some rows, and the memory that it may take."""
    chosen = (manifest.runtime, manifest.precision)
    rates = [
        rung.rows_per_s
        for rung in manifest.rungs
        if rung.rows_per_s and (rung.runtime, rung.precision) == chosen
    ]
    limit_gib = job.lanes.memory_gib
    num_cores = device.machine_threads or device.num_threads
    return WatchLimits(
        hang_s=job.lanes.hang_s,
        rows_per_s=min(rates, default=SLOWEST_ENGINE_PER_S) / (1 if device.gpu else num_cores),
        max_rss_bytes=int(limit_gib * GIB) if limit_gib else memory_share(num_lanes),
    )


def finish_run(
    run: PreparedRun, lanes: Sequence[Lane], price: Price, uses: tuple[DeviceUse, ...]
) -> RunReport:
    """Check the ledger, publish, and write the report.

    Args:
        run: The run; all its shards are committed.
        lanes: What scored them.
        price: Of the machine.
        uses: What the devices did meanwhile.

    Raises:
        GuardError: A limit of the job was exceeded; nothing was published.
        VerifyError: The ledger does not account for every row.
        InputChangedError: A file that could not be read has been written again.
    """
    run.clock.scored = time.monotonic()
    source, output = open_storage(run.job.input.uri), open_storage(run.job.output.uri)
    for file in run.plan.unreadable:
        check_pin(file, source)  # perhaps it was only being written when the run was planned
    records = run.ledger.records()
    check_complete(run.plan, records, run.job)
    report = _make_report(run, lanes, records, price, uses)
    if not publish(run.job, run.plan, run.ledger, records, report, output):
        return already_published(run.job, run.plan.date)
    write_reports(output, report)
    return report


def already_published(job: Job, date: str) -> RunReport:
    """The report of a date that has been published before, marked as such."""
    output = open_storage(job.output.uri)
    report = read_report(output, job.name, date)
    write_reports(output, report)  # a crash after publication may have left them out
    return dataclasses.replace(report, status="already_published")


def _make_report(
    run: PreparedRun,
    lanes: Sequence[Lane],
    records: Mapping[int, CommitRecord],
    price: Price,
    uses: tuple[DeviceUse, ...],
) -> RunReport:
    job, plan, clock = run.job, run.plan, run.clock
    output = open_storage(job.output.uri)
    attempts = run.ledger.attempts()
    now = time.monotonic()
    earlier_s = sum(_seconds_of(past, records) for past in attempts if past.id != run.attempt.id)
    wall_s = now - clock.started + earlier_s
    build_s = run.resolved.build_s if run.resolved.built else 0.0
    score_s = clock.scored - clock.prepared
    cost = cost_of(
        price, wall_s=wall_s, score_s=score_s + earlier_s, build_s=build_s, rows=plan.num_rows
    )
    stages = add_times(lane.times() for lane in lanes)
    ceilings = sum_of_ceilings(lane.ceilings for lane in lanes)
    num_scored = sum(record.num_scored for record in records.values())
    folder = f"{output.uri}/{published_folder(job.name, plan.date)}"
    return RunReport(
        run_id=run.ledger.run_id,
        job=job.name,
        date=plan.date,
        status="published",
        rows=plan.num_rows,
        scored=num_scored,
        quarantined=plan.num_rows - num_scored,
        quarantined_by_reason=count_reasons(records),
        quarantine_samples=read_samples(run.ledger, records, output),
        shards=len(plan.shards),
        shards_reused=len(plan.shards) - len(run.todo),
        attempts=len(attempts),
        examples_per_sec=plan.num_rows / wall_s,
        wall_s=wall_s,
        phases=Phases(
            startup_s=clock.ready - clock.started,
            plan_s=clock.planned - clock.ready,
            engine_s=clock.prepared - clock.planned,
            score_s=score_s,
            publish_s=now - clock.scored,
        ),
        usd_per_100k=cost.usd_per_100k,
        cost=cost,
        engine=_engine_facts(run.resolved, build_s),
        stages=stages,
        ceilings=ceilings,
        bottleneck=bottleneck_of(stages),
        device=_describe(lanes, run),
        started_at=run.attempt.started_at,
        finished_at=utc_now(),
        output=folder,
        manifest=f"{folder}/{MANIFEST}",
        devices=uses,
        joules_per_1000_rows=joules_per_1000(uses, stages.get("write", NO_TIME).items),
        settings=settings_of(job).given(),
        num_lanes=len(lanes),
        degraded=bool(plan.unreadable or DAMAGES & count_reasons(records).keys()),
        unreadable_files=plan.unreadable,
        limit=limit_of(
            ceilings,
            stages,
            cost,
            rows=plan.num_rows,
            num_lanes=len(lanes),
            num_threads=_num_core_threads(job, lanes),
        ),
    )


def bottleneck_of(stages: Mapping[str, StageTimes]) -> str:
    """The stage that was busy for the longest time."""
    return max(stages, key=lambda name: stages[name].busy_s, default="none")


def _num_core_threads(job: Job, lanes: Sequence[Lane]) -> int | None:
    """Threads of a lane whose stages share the cores; None on a device."""
    if not lanes or lanes[0].device.gpu is not None:
        return None
    return job.lanes.engine_threads or lanes[0].device.num_threads


def _seconds_of(attempt: Attempt, records: Mapping[int, CommitRecord]) -> float:
    """Wall-clock seconds of an attempt that did not finish: until its last commit."""
    commits = [record.committed_at for record in records.values() if record.owner == attempt.id]
    if not commits:
        return 0.0
    began, ended = map(datetime.datetime.fromisoformat, (attempt.started_at, max(commits)))
    return (ended - began).total_seconds()


def _engine_facts(resolved: ResolvedEngine, build_s: float) -> EngineFacts:
    manifest = resolved.engine.manifest
    accuracy = manifest.accuracy
    return EngineFacts(
        key=manifest.key,
        runtime=manifest.runtime,
        precision=manifest.precision,
        batch_size=manifest.batch_size,
        agreement=accuracy.agreement,
        min_agreement=manifest.gate.min_agreement,
        num_held_out=accuracy.num_rows,
        reason=manifest.reason,
        rungs=tuple(
            EngineRung(
                runtime=rung.runtime,
                precision=rung.precision,
                rows_per_s=rung.rows_per_s,
                passed=rung.passed,
                error=rung.error,
                failures=rung.failures,
                note=rung.note,
                float_layers=rung.float_layers,
                **_fidelity(rung.accuracy),
            )
            for rung in manifest.rungs
        ),
        built=resolved.built,
        build_s=build_s,
    )


def _fidelity(accuracy: Accuracy | None) -> dict[str, Any]:
    names = ("agreement", "cosine", "divergence", "metric_name", "metric", "reference_metric")
    return {name: getattr(accuracy, name, None) for name in names}


def _describe(lanes: Sequence[Lane], run: PreparedRun) -> str:
    name = run.resolved.engine.manifest.device.name
    if not lanes:
        return f"{name}, nothing left to score"
    plural = "lanes" if len(lanes) > 1 else "lane"
    return f"{name}, {len(lanes)} {plural} of {lanes[0].device.num_threads} threads"
