"""A run is planned, pinned and given its engine; see finish.py for how it ends."""

from __future__ import annotations

import datetime
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engines.build import ResolvedEngine
from engines.manifest import EngineManifest
from engines.model import fingerprint_model
from pipeline.block_size import rows_at_risk, rows_side_by_side
from pipeline.config import Job
from pipeline.engine import check_class_names, check_columns, load_class_names, request_for
from pipeline.engine_pin import EnginePin, common_of
from pipeline.guards import Guards, NightWatch, accepting, lost_files
from pipeline.interruptions import earlier_attempts
from pipeline.lane import LaneDevice
from pipeline.lane_messages import LaneSetup, PoisonRow, WatchLimits
from pipeline.ledger import Attempt, CommitRecord, Ledger
from pipeline.part import ENGINE_KEY, OutputLayout
from pipeline.plan import Plan, Shard, make_plan, run_id_of, shuffled
from pipeline.process_start import process_name
from pipeline.report import Price
from pipeline.requeue import has_nothing_to_try, requeue
from pipeline.storage import Storage, open_storage, probe
from pipeline.tuning import tuned
from pipeline.versions import Published, published_folder
from pipeline.watchdog import memory_share
from pipeline.window import Window, find_window

GIB = 2**30
GetEngine = Callable[..., ResolvedEngine]
"""Called as `pipeline.engine.get_engine`."""
Again = Literal["no", "all", "quarantine"]
"""What of a date is scored although it was scored before: nothing, or these rows."""
SLOWEST_ENGINE_PER_S = 1.0
"""Rows per second of an engine whose ladder does not tell its rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Night:
    """What is asked for."""

    job: Job
    date: str
    """ISO date."""
    again: Again = "no"
    """What of a published date is scored anew, for a new version of it. `quarantine` is for a date
    that is not published, too."""
    accept: frozenset[str] = frozenset()
    """Guards that may not stop it; see `pipeline.errors.GUARDS`."""
    gives_way: bool = False
    """Whether it is one of a backfill's dates, which no backfill has to wait for."""
    machine_share: float = 1.0
    """Of this machine that it uses, and pays: dates that are scored at once share it."""

    @property
    def command(self) -> str:
        """That scores it, but for the job file's name; a backfill's dates have it too."""
        name = "requeue" if self.again == "quarantine" else "run"
        return f"score {name} JOB --date {self.date}{' --force' * (self.again == 'all')}"

    def command_accepting(self, *guards: str) -> str:
        """The same with what was accepted, and these guards besides."""
        return accepting(self.command, {*self.accept, *guards})


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run that is planned, pinned and has its engine; nothing is scored yet."""

    job: Job
    source: Storage
    output: Storage
    plan: Plan
    resolved: ResolvedEngine
    pin: EnginePin
    class_names: tuple[str, ...]
    engines: dict[str, ResolvedEngine]
    """By key, those that score in this attempt: `resolved`, and with several kinds of devices those
    that come in mid-run."""
    ledger: Ledger
    attempt: Attempt
    todo: tuple[Shard, ...]
    """Shards without a commit record, in the order in which this attempt takes them."""
    poison: tuple[PoisonRow, ...]
    """Rows that killed a process of an earlier attempt."""
    replaces: Published | None
    """The version that is published, and will be replaced; None: the date is not published."""
    clock: RunClock
    guards: Guards
    done: Mapping[int, CommitRecord]
    """Records of earlier attempts."""
    window: Window | None
    """By when it has to be published."""


@dataclass(slots=True)
class RunClock:
    """When the phases of this attempt began; seconds of `time.monotonic`."""

    started: float = field(default_factory=time.monotonic)
    """Process start, or when the date began."""
    ready: float = 0.0
    planned: float = 0.0
    prepared: float = 0.0
    scored: float = 0.0

    def stand_still(self, seconds: float) -> None:
        """Leave out so many seconds until now, as if all before had come so much later."""
        for name, moment in asdict(self).items():
            if moment:
                setattr(self, name, moment + seconds)


def is_left_alone(
    night: Night, published: Published, output: Storage, say: Callable[[str], None]
) -> bool:
    """Whether a published date stays as it is; said where something else was asked for."""
    if night.again == "quarantine" and has_nothing_to_try(night.job, published, output):
        say(f"nothing is in quarantine: version {published.version} is left as it is")
        return True
    return night.again == "no"


def prepare_run(
    night: Night,
    devices: Sequence[LaneDevice],
    clock: RunClock,
    say: Callable[[str], None],
    get_engine: GetEngine,
    *,
    replaces: Published | None = None,
) -> PreparedRun:
    """Plan the date, check the store, get the engine and open the ledger.

    Args:
        night: What is asked for.
        devices: What each of the lanes runs on; the kind of the first decides the engine.
        clock: Gets the times of the phases.
        say: Is told in a few words what takes long.
        get_engine: Finds or builds the engine where the devices are; with several kinds of them,
            that of any. When the night had another one, which does not open, the time to find that
            out counts as this one's.
        replaces: The version that is published and will be replaced.
    """
    guards = Guards(night.accept, night.command)
    clock.ready = clock.ready or time.monotonic()
    date, device = night.date, devices[0]
    job = tuned(night.job, device.engine_device, say)
    source, output = open_storage(job.input.uri), open_storage(job.output.uri)
    class_names = load_class_names(job.model.class_names)
    plan = make_plan(job, date, source)
    clock.planned = clock.planned or time.monotonic()
    guards.check_rows(job, date, plan.num_rows)
    request = request_for(job, plan.num_features, device.engine_device)
    fingerprint = fingerprint_model(request.model)
    # Whatever is wrong with the job has been found by now: from here on the output is written to.
    probe(output, f"{job.name}/_runs")
    output.check_free(published_folder(job.name, date))
    resolved = get_engine(job, plan, request, fingerprint, say)
    check_class_names(job, class_names, resolved.engine.manifest)
    check_columns(job, plan, resolved.engine.manifest)
    clock.prepared = time.monotonic()
    version = replaces.version + 1 if replaces else 1
    pin = EnginePin(
        engine=resolved.engine.key,
        common=common_of(night.job, plan.num_features, device, fingerprint),
        has_several=job.lanes.has_several_engines,
    )
    run_id = run_id_of(plan, job, pin.key, class_names, version)
    ledger = Ledger(output, job.name, run_id)
    attempt = _new_attempt(job, plan, resolved, devices, clock, output)
    ledger.open(_description(run_id, version, job, plan, resolved), attempt)
    if night.again == "quarantine":
        requeue(ledger, plan, pin, replaces, output)
    done = ledger.sound_records()
    todo = tuple(shard for shard in plan.shards if shard.index not in done)
    is_first = ledger.num_attempts() == 1
    return PreparedRun(
        job=job,
        source=source,
        output=output,
        plan=plan,
        resolved=resolved,
        pin=pin,
        class_names=class_names,
        engines={resolved.engine.key: resolved},
        ledger=ledger,
        attempt=attempt,
        todo=todo if is_first else shuffled(todo, attempt.id),
        poison=ledger.poison(),
        replaces=replaces,
        clock=clock,
        guards=guards,
        done=done,
        window=_window_of(job, date, ledger),
    )


def _window_of(job: Job, date: str, ledger: Ledger) -> Window | None:
    """From its first attempt on: a night that was interrupted gets no other deadline for it."""
    if job.window is None:
        return None
    opened = datetime.datetime.fromisoformat(ledger.attempts()[0].started_at)
    return find_window(job.window, date, opened)


def _new_attempt(
    job: Job,
    plan: Plan,
    resolved: ResolvedEngine,
    devices: Sequence[LaneDevice],
    clock: RunClock,
    output: Storage,
) -> Attempt:
    manifest = resolved.engine.manifest
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(
        seconds=time.monotonic() - clock.started
    )
    return Attempt(
        id=uuid.uuid4().hex[:12],
        started_at=began.isoformat(),
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_name(os.getpid()),
        prepared_s=clock.prepared - clock.started,
        build_s=resolved.build_s if resolved.built else 0.0,
        rows_at_risk=sum(
            rows_at_risk(job, manifest, device.num_threads, plan.shards, is_far=output.is_far)
            for device in devices
        ),
        lanes=" ".join(device.name for device in devices),
    )


def _description(
    run_id: str, version: int, job: Job, plan: Plan, resolved: ResolvedEngine
) -> dict[str, Any]:
    """What a run is, for people, and for whoever looks for what it pinned."""
    return {
        "run_id": run_id,
        "date": plan.date,
        "version": version,
        "job": job.model_dump(mode="json"),
        "engine": resolved.engine.key,
        "files": [asdict(file) for file in plan.files],
        "unreadable": [asdict(file) for file in plan.unreadable],
        "num_shards": len(plan.shards),
        "shard_rows": [shard.num_rows for shard in plan.shards],
    }


def watch_over(run: PreparedRun, price: Price) -> NightWatch:
    """What stops scoring as soon as a limit of the job cannot be kept any more."""
    earlier_s = 0.0
    if run.job.limits.max_usd is not None:
        past = earlier_attempts(run.ledger, run.attempt, run.done, run.plan.num_rows)
        earlier_s = past.wall_s

    def spent_usd() -> float:
        return (time.monotonic() - run.clock.started + earlier_s) * price.usd_per_hour / 3600

    lost, done = lost_files(run.plan), run.done.values()
    return NightWatch(run.guards, run.job, run.plan.num_rows, done, spent_usd, lost)


def lane_setup(run: PreparedRun, device: LaneDevice, num_lanes: int) -> LaneSetup:
    """What each of so many lanes must be told to score shards of the run."""
    job, plan, manifest = run.job, run.plan, run.resolved.engine.manifest
    layout = OutputLayout(
        head=job.model.head,
        class_names=run.class_names,
        compression=job.output.compression,
        wider_types=plan.wider_types,
        metadata={
            "run_id": run.ledger.run_id,
            ENGINE_KEY: manifest.key,
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
        rows_side_by_side=rows_side_by_side(job, plan.shards),
    )


def engine_rate(manifest: EngineManifest, device: LaneDevice) -> float:
    """Rows per second of a lane's engine alone, by what it did when it was built."""
    rates = [rung.rows_per_s for rung in manifest.chosen if rung.rows_per_s]
    rate = min(rates, default=SLOWEST_ENGINE_PER_S)
    if device.gpu:
        return rate
    return rate * (device.num_threads / (device.machine_threads or device.num_threads))


def watch_limits(
    job: Job, manifest: EngineManifest, device: LaneDevice, num_lanes: int
) -> WatchLimits:
    """How long a lane may be at some rows, and the memory that it may take."""
    limit_gib = job.lanes.memory_gib
    return WatchLimits(
        hang_s=job.lanes.hang_s,
        rows_per_s=engine_rate(manifest, device) / (1 if device.gpu else device.num_threads),
        max_rss_bytes=int(limit_gib * GIB) if limit_gib else memory_share(num_lanes),
    )
