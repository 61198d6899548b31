"""One night, composed: plan and engine from the pipeline, lanes on devices, shards onto lanes.

The command line and the Prefect flow both call `run_night`; they differ in how groups of shards
are handed out (`MapGroups`) and in who is told of the progress (`Observer`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

from engines.errors import EngineCorruptError
from flows.devices import start_lanes
from flows.giving_way import at_work
from flows.lookout import Lookout, OnWarning
from flows.metrics import Meter
from flows.shipped import shipped_config
from flows.spot import notices
from pipeline.config import Job
from pipeline.cost import find_price, load_prices, own_price
from pipeline.errors import GuardError
from pipeline.finish import already_published, end_run, finish_run
from pipeline.guards import NightWatch
from pipeline.lane import Lane, LaneDevice, add_times
from pipeline.plan import Shard
from pipeline.report import DeviceUse, Price, RunReport, StageTimes
from pipeline.run import Night, PreparedRun, RunClock, lane_setup, prepare_run, watch_over
from pipeline.start_up import keep_pandas_out
from pipeline.storage import open_storage
from pipeline.store_errors import resumable
from pipeline.telemetry import Sampler
from pipeline.tuning import LaneSettings, find_tuning, with_settings
from pipeline.versions import find_published

log = logging.getLogger(__name__)

Group = Sequence[Shard]
MapGroups = Callable[[Callable[[Group], None], Sequence[Group], int], None]
"""Runs a function over all groups, so many at a time; raises what the function raises."""
GROUPS_PER_LANE = 8
"""Tasks stay coarse: a Prefect server does not like thousands, and the ledger keeps the details."""
CALLERS_PER_LANE = 2
"""Groups that a lane has at once, so that it never runs dry between two."""
PROGRESS_PERIOD_S = 0.25
DRAIN_PERIOD_S = 0.05


class Observer(Protocol):
    """Is told how the night goes."""

    def say(self, text: str) -> None:
        """Something that takes a while has begun or ended."""

    def start(self, num_rows: int, num_done: int) -> None:
        """Scoring begins; `num_done` rows were committed by an earlier attempt."""

    def update(self, times: dict[str, StageTimes]) -> None:
        """Stage times until now; called a few times a second."""

    def expect(self, end: str) -> None:
        """When the night will end, in a few words, and how that is to its deadline; as often."""

    def stop(self) -> None:
        """Scoring has ended, well or not."""


def run_night(
    night: Night,
    observer: Observer,
    map_groups: MapGroups | None = None,
    started: float | None = None,
    lanes: list[Lane] | None = None,
    on_warning: OnWarning | None = None,
) -> RunReport:
    """Score one date of a job and publish it; a published date is left as it is.

    Args:
        night: A date of a job.
        observer: Is told of the progress.
        map_groups: How groups of shards are handed to lanes; threads by default.
        started: `time.monotonic()` when the process began; now by default.
        lanes: Of the job, and closed here: whoever starts them before this module is imported gains
            that time; started here by default.
        on_warning: Is told when the deadline of the job's `window` is in danger, besides the
            observer.

    An engine from the store that does not open, or does not answer as it did, is built anew, once.

    Returns:
        The report; its status says whether this call published.
    """
    keep_pandas_out()
    job, date = night.job, night.date
    clock = RunClock(started=started if started is not None else time.monotonic())

    def attempt(lanes: list[Lane], *, rebuild: bool) -> RunReport:
        devices = [lane.device for lane in lanes]
        run: PreparedRun | None = None
        try:
            with open_lanes(lanes, job.lanes.grace_s, observer), notices(job, observer.say):
                price = price_of(job, date, night.machine_share)
                output = open_storage(job.output.uri)
                published = find_published(output, job.name, date)
                if published is not None and night.again == "no":
                    return already_published(job, output, published)
                tuned = dataclasses.replace(night, job=_tuned(job, devices[0], observer))
                run = prepare_run(
                    tuned, devices, clock, observer.say, replaces=published, rebuild=rebuild
                )
                watch = watch_over(run, price)
                lookout = Lookout(run, len(lanes), observer, on_warning)
                with resumable():
                    uses = _score(run, lanes, lookout, map_groups or map_in_threads, watch)
            with resumable():
                return finish_run(run, lanes, price, uses)
        except BaseException as error:
            if run is not None:
                end_run(run, lanes, error)
            raise

    # A date that is caught up with says nothing of how the nights are.
    metrics, working = (None, nullcontext()) if night.gives_way else (job.metrics, at_work(job))
    with working, Meter(job.name, metrics, observer) as observer:
        try:
            return observer.publish(attempt(lanes or start_lanes(job), rebuild=False))
        except EngineCorruptError as error:  # its hashes are right, or it would not be found
            log.warning("%s This run builds a new one.", error)
        return observer.publish(attempt(start_lanes(job), rebuild=True))


def _tuned(job: Job, device: LaneDevice, observer: Observer) -> Job:
    """The job with the settings that `score tune` found for this machine, if it did."""
    tuning = find_tuning(job, device.engine_device)
    if tuning is None or tuning.settings == LaneSettings():
        return job
    observer.say(f"tuned: {tuning}")
    return with_settings(job, tuning.settings)


def price_of(job: Job, date: str, machine_share: float = 1.0) -> Price:
    """The price of this machine: the job's own, or that of its entry in configs/prices.yaml.

    Args:
        job: The job.
        date: ISO date of the run.
        machine_share: Of the machine that the run pays; the price then says so.
    """
    cost = job.cost
    if cost.usd_per_hour is not None:
        price = own_price(cost.instance, cost.usd_per_hour, as_of=date)
    else:
        listed = load_prices(Path(shipped_config("prices.yaml")))
        price = find_price(listed, cost.instance, cost.market)
    if machine_share == 1:
        return price
    return dataclasses.replace(
        price,
        usd_per_hour=price.usd_per_hour * machine_share,
        source=f"{price.source}; {machine_share:.0%} of the machine, which other dates share",
    )


@contextmanager
def open_lanes(lanes: list[Lane], grace_s: float, observer: Observer) -> Iterator[None]:
    """Close the lanes after use; end their processes at once when something went wrong.

    An interruption (SIGTERM, Ctrl-C, Prefect's cancellation: no `Exception`) leaves them `grace_s`
    seconds for the shards in work; another one ends that, too. So does a guard that stops scoring.
    """
    try:
        yield
    except BaseException as error:
        try:
            is_guard = isinstance(error, GuardError)
            may_drain = is_guard or not isinstance(error, Exception)
            if may_drain and any(lane.num_pending for lane in lanes):
                why = "stopped by a guard" if is_guard else "interrupted"
                observer.say(f"{why}: {grace_s:g} s for the shards in work; again: none")
                drain(lanes, grace_s)
        finally:
            for lane in lanes:
                lane.abort()
        raise
    for lane in lanes:
        lane.close()


def drain(lanes: Sequence[Lane], grace_s: float) -> None:
    """Let all lanes finish what they are at, for `grace_s` seconds or until the next signal."""
    deadline = time.monotonic() + grace_s
    for lane in lanes:
        lane.drain()
    with next_signals() as received:
        while any(not lane.wait(0.0) for lane in lanes):
            if time.monotonic() > deadline or received:
                return
            time.sleep(DRAIN_PERIOD_S)


@contextmanager
def next_signals() -> Iterator[list[int]]:
    """Where SIGINT and SIGTERM are put meanwhile; outside of the main thread nothing puts any.

    No `threading.Event`: a handler that sets the event for which its own thread waits can meet the
    event's lock taken, by that very wait, and never comes back.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in numbers
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _score(
    run: PreparedRun,
    lanes: list[Lane],
    lookout: Lookout,
    map_groups: MapGroups,
    watch: NightWatch,
) -> tuple[DeviceUse, ...]:
    observer = lookout.observer
    num_todo = sum(shard.num_rows for shard in run.todo)
    num_rows = run.plan.num_rows
    if not run.todo:
        observer.say(f"all {len(run.plan.shards)} shards were committed before")
        return ()
    watch.check()
    for lane in lanes:
        lane.open(lane_setup(run, lane.device, len(lanes)))
    groups = split(run.todo, GROUPS_PER_LANE * len(lanes))

    choosing = threading.Lock()  # groups that come together must not all choose the same lane

    def score_group(group: Group) -> None:
        watch.check()  # a group that had not begun when another was stopped
        with choosing:
            futures = min(lanes, key=lambda lane: lane.num_pending).submit(group)
        for future in futures:
            watch.committed(future.result())

    observer.start(num_rows, num_rows - num_todo)
    devices = dict.fromkeys(lane.device.engine_device for lane in lanes)  # lanes may share a CPU
    with Sampler(devices) as sampler, _watch(lanes, lookout):
        map_groups(score_group, groups, CALLERS_PER_LANE * len(lanes))
    return sampler.use()


@contextmanager
def _watch(lanes: list[Lane], lookout: Lookout) -> Iterator[None]:
    done = threading.Event()

    def tell() -> None:
        while not done.wait(PROGRESS_PERIOD_S):
            lookout.look(add_times(lane.times() for lane in lanes))

    watcher = threading.Thread(target=tell, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        lookout.observer.stop()


def map_in_threads(
    score: Callable[[Group], None], groups: Sequence[Group], num_callers: int
) -> None:
    """Hand out groups from plain threads; no Prefect needed."""
    pool = ThreadPoolExecutor(num_callers, thread_name_prefix="group")
    try:
        for _ in pool.map(score, groups):
            pass
    finally:
        # Whoever called us ends the lanes when we raise; then the waiting threads end too.
        pool.shutdown(wait=False, cancel_futures=True)


def split(shards: Sequence[Shard], num_groups: int) -> list[Group]:
    """Consecutive groups of about equal numbers of shards, at most `num_groups`."""
    num_groups = min(num_groups, len(shards))
    bounds = [round(i * len(shards) / num_groups) for i in range(num_groups + 1)]
    return [shards[bounds[i] : bounds[i + 1]] for i in range(num_groups)]


def process_start() -> float:
    """When this process began, as `time.monotonic` counts: interpreter start and imports included.

    From /proc on Linux; elsewhere the moment of the call.
    """
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - age_s
    return time.monotonic()
