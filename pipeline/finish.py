"""How a run ends: checked, published and reported, or stopped with a word on what is undone."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence

from pipeline.alerts import find_alerts
from pipeline.config import Job
from pipeline.cost import cost_of
from pipeline.engine_facts import engines_of
from pipeline.errors import StorageError
from pipeline.footers import check_pins
from pipeline.history import nights_before, row_of
from pipeline.interruptions import earlier_attempts, note_end
from pipeline.lane import LaneFigures
from pipeline.last_look import Findings, check_before_publication
from pipeline.ledger import CommitRecord, utc_now
from pipeline.limit import add_times, bottleneck_of, limit_of, sum_of_ceilings
from pipeline.plan import input_files
from pipeline.publish import (
    check_complete,
    count_reasons,
    draft_of,
    note_publication,
    publish,
    write_reports,
)
from pipeline.quarantine import read_samples
from pipeline.report import (
    NO_TIME,
    DeviceUse,
    Phases,
    Price,
    RunReport,
    WindowOutcome,
    report_from_dict,
)
from pipeline.report_engine import EngineRows
from pipeline.row_groups import DAMAGES
from pipeline.run import PreparedRun
from pipeline.storage import MANIFEST, Storage
from pipeline.telemetry import joules_per_1000
from pipeline.tuning import settings_of
from pipeline.versions import (
    REPORT_HTML,
    Published,
    find_published,
    published_folder,
    settle,
)
from pipeline.window import Window


def finish_run(
    run: PreparedRun, lanes: Sequence[LaneFigures], price: Price, uses: tuple[DeviceUse, ...]
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
        InputChangedError: A file has been written again, or is gone.
    """
    run.clock.scored = time.monotonic()
    output = run.output
    # Also those that could not be read: perhaps they were only being written.
    listed = input_files(run.job, run.plan.date, run.source)
    check_pins([*run.plan.files, *run.plan.unreadable], run.source, listed)
    records = run.ledger.sound_records()
    check_complete(run.plan, records)
    findings = check_before_publication(run, records, count_reasons(records))
    report = _make_report(run, lanes, records, price, uses, findings)
    past = nights_before(output, run.job.name, run.plan.date)
    version = run.replaces.version + 1 if run.replaces else 1
    now = row_of(report, version=version, published_at=report.finished_at)
    report = dataclasses.replace(report, alerts=find_alerts(now, past, run.job.alerts))
    draft = draft_of(run.job, run.plan, run.ledger, records, report)
    if not publish(draft, output, run.replaces):
        before = run.replaces
        first = None if before else find_published(output, run.job.name, run.plan.date)
        if first is None:
            expected = f"version {before.version}, run {before.run_id}" if before else "it to stay"
            raise StorageError(
                f"{report.output}: another version was published meanwhile; expected {expected}. "
                "Nothing was changed; look at `score status`, and run the same command again if "
                "you still want it."
            )
        return already_published(run.job, output, first)
    write_reports(output, report, past)
    published_at = draft.manifest["published_at"]
    note_publication(run.job, output, report, version=version, published_at=published_at)
    return report


def already_published(job: Job, output: Storage, published: Published) -> RunReport:
    """The report of a version that has been published before, marked as such.

    What follows a publication is done, too, where it is not: a crash may have come between.
    """
    settle(output, published)
    report = report_from_dict(published.manifest["report"])
    published_at = published.manifest["published_at"]
    if output.info(f"{published.folder}/{REPORT_HTML}") is None:  # the last that is written
        write_reports(output, report, nights_before(output, job.name, report.date))
    note_publication(job, output, report, version=published.version, published_at=published_at)
    return dataclasses.replace(report, status="already_published")


def end_run(run: PreparedRun, lanes: Sequence[LaneFigures], error: BaseException) -> None:
    """Write down that this attempt ends without publishing, and how much it leaves undone.

    Args:
        run: The run.
        lanes: Of it; their processes have ended.
        error: Why.
    """
    rows_begun = sum(lane.rows_begun for lane in lanes)
    note_end(run.ledger, run.attempt, rows_begun, error)


def _make_report(
    run: PreparedRun,
    lanes: Sequence[LaneFigures],
    records: Mapping[int, CommitRecord],
    price: Price,
    uses: tuple[DeviceUse, ...],
    findings: Findings,
) -> RunReport:
    job, plan, clock, output = run.job, run.plan, run.clock, run.output
    now = time.monotonic()
    earlier = earlier_attempts(run.ledger, run.attempt, records, plan.num_rows)
    rows_replayed = earlier.rows_replayed + _rows_repeated(run, lanes, records)
    rows_taken_over = _rows_taken_over(run, records)
    rows_scored = plan.num_rows - rows_taken_over
    own_s = now - clock.started
    wall_s = own_s + earlier.clock_s
    build_s = run.resolved.build_s if run.resolved.built else 0.0
    score_s = clock.scored - clock.prepared
    replay_share = rows_replayed / max(1, rows_replayed + rows_scored)
    replay_s = (score_s + earlier.score_s) * replay_share
    cost = cost_of(
        price,
        wall_s=own_s + earlier.wall_s,
        score_s=score_s + earlier.score_s,
        build_s=build_s + earlier.build_s,
        rows=rows_scored,
        replay_s=replay_s,
    )
    stages = add_times(lane.times() for lane in lanes)
    engine, engines = engines_of(run, records)
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
        attempts=run.ledger.num_attempts(),
        examples_per_sec=rows_scored / wall_s,
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
        engine=engine,
        engines=engines,
        stages=stages,
        ceilings=sum_of_ceilings(lanes),
        bottleneck=bottleneck_of(stages),
        device=_describe(lanes, run, engines),
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
        drift=findings.drift,
        distribution=findings.distribution,
        accepted=run.guards.accepted,
        interruptions=earlier.num_interruptions,
        rows_replayed=rows_replayed,
        replay_is_exact=earlier.is_exact,
        replay_s=replay_s,
        window=_outcome(run.window),
        rows_taken_over=rows_taken_over,
        scoring_s=score_s + earlier.score_s,
        building_s=build_s + earlier.build_s,
        limit=limit_of(
            lanes,
            stages,
            price,
            rows=rows_scored,
            num_threads=_num_core_threads(job, lanes),
        ),
    )


def _outcome(window: Window | None) -> WindowOutcome | None:
    if window is None:
        return None
    margin_s = window.margin_s(datetime.datetime.now(datetime.UTC))
    return WindowOutcome(deadline=window.deadline.isoformat(), met=margin_s >= 0, margin_s=margin_s)


def _num_core_threads(job: Job, lanes: Sequence[LaneFigures]) -> int | None:
    """Threads of a lane whose stages share the cores; None on a device."""
    if not lanes or lanes[0].device.gpu is not None:
        return None
    return job.lanes.engine_threads or lanes[0].device.num_threads


def _rows_repeated(
    run: PreparedRun, lanes: Sequence[LaneFigures], records: Mapping[int, CommitRecord]
) -> int:
    """Rows that this attempt began more often than it committed: its lanes' processes died."""
    owned = [record for record in records.values() if record.owner == run.attempt.id]
    committed = sum(record.num_rows for record in owned)
    return max(0, sum(lane.rows_begun for lane in lanes) - committed)


def _rows_taken_over(run: PreparedRun, records: Mapping[int, CommitRecord]) -> int:
    """Rows that an attempt of the version before scored: `score requeue` left them as they were."""
    if run.replaces is None:
        return 0
    before = {record.owner for record in run.replaces.records().values()}
    return sum(record.num_rows for record in records.values() if record.owner in before)


def _describe(lanes: Sequence[LaneFigures], run: PreparedRun, engines: Sequence[EngineRows]) -> str:
    own = run.resolved.engine.manifest.device.name
    names = dict.fromkeys(engine.device for engine in engines if engine.device)
    name = " and ".join(names) or own
    if not lanes:
        return f"{name}, nothing left to score"
    plural = "lanes" if len(lanes) > 1 else "lane"
    return f"{name}, {len(lanes)} {plural} of {lanes[0].device.num_threads} threads"
