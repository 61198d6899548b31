"""One night, composed: plan and engine from the pipeline, lanes on devices, shards onto lanes.

The command line and the Prefect flow both call `run_night`; they differ in how groups of shards
are handed out (`MapGroups`) and in who is told of the progress (`Observer`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

from engines.errors import EngineCorruptError
from flows.devices import start_lanes
from flows.giving_way import at_work
from flows.lanes import Lanes, MapGroups
from flows.lookout import Lookout, OnWarning
from flows.metrics import MetricsFile
from flows.shipped import shipped_config
from flows.spot import notices
from pipeline.config import Job
from pipeline.cost import find_price, load_prices, own_price
from pipeline.errors import GuardError
from pipeline.guards import NightWatch
from pipeline.process_start import process_age_s
from pipeline.report import DeviceUse, Price, RunReport, StageTimes
from pipeline.run import Night, PreparedRun, RunClock, is_left_alone, prepare_run, watch_over
from pipeline.start_up import keep_pandas_out
from pipeline.storage import open_storage
from pipeline.store_errors import resumable
from pipeline.versions import find_published

log = logging.getLogger(__name__)


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
    clock: RunClock | None = None,
    lanes: Lanes | None = None,
    on_warning: OnWarning | None = None,
) -> RunReport:
    """Score one date of a job and publish it; a published date is left as it is.

    So is one whose quarantine is to be tried again, if there is nothing in it.

    Args:
        night: A date of a job.
        observer: Is told of the progress.
        map_groups: How groups of shards are handed to lanes that are started here; by threads by
            default.
        clock: Of this attempt; begins now by default.
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
    clock = clock or RunClock()

    def attempt(lanes: Lanes, *, rebuild: bool) -> RunReport:
        run: PreparedRun | None = None
        try:
            with open_lanes(lanes, job.lanes.grace_s, observer), notices(job, observer.say):
                price = price_of(job, date, night.machine_share)
                output = open_storage(job.output.uri)
                published = find_published(output, job.name, date)
                if published and is_left_alone(night, published, output, observer.say):
                    from pipeline.finish import already_published

                    return already_published(job, output, published)
                devices = lanes.begin(observer.say)
                get_engine = functools.partial(lanes.get_engine, force=rebuild)
                run = prepare_run(
                    night, devices, clock, observer.say, get_engine, replaces=published
                )
                watch = watch_over(run, times(price, lanes.num_machines))
                lookout = Lookout(run, len(devices), observer, on_warning)
                with resumable():
                    uses = _score(run, lanes, lookout, watch)
            from pipeline.finish import finish_run  # see `import_end`

            with resumable():
                return finish_run(run, lanes.figures, times(price, lanes.num_machines), uses)
        except BaseException as error:
            if run is not None:
                from pipeline.finish import end_run

                end_run(run, lanes.figures, error)
            raise

    # A date that is caught up with says nothing of how the nights are.
    metrics, working = (None, nullcontext()) if night.gives_way else (job.metrics, at_work(job))
    with working, MetricsFile(job.name, metrics, observer) as observer:
        try:
            return observer.publish(attempt(lanes or start_lanes(job, map_groups), rebuild=False))
        except EngineCorruptError as error:  # its hashes are right, or it would not be found
            log.warning("%s This run builds a new one.", error)
        return observer.publish(attempt(start_lanes(job, map_groups), rebuild=True))


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
    why = f"{machine_share:.0%} of the machine, which other dates share"
    return dataclasses.replace(_scaled(price, machine_share, why), machine_share=machine_share)


def times(price: Price, num_machines: float) -> Price:
    """The price of so many machines, on average; it then says so."""
    if num_machines == 1:
        return price
    return _scaled(price, num_machines, f"{num_machines:.3g} machines on average")


def _scaled(price: Price, factor: float, why: str) -> Price:
    return dataclasses.replace(
        price, usd_per_hour=price.usd_per_hour * factor, source=f"{price.source}; {why}"
    )


@contextmanager
def open_lanes(lanes: Lanes, grace_s: float, observer: Observer) -> Iterator[None]:
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
            if may_drain and lanes.is_at_work:
                why = "stopped by a guard" if is_guard else "interrupted"
                observer.say(f"{why}: {grace_s:g} s for the shards in work; again: none")
                lanes.drain(grace_s)
        finally:
            lanes.abort()
        raise
    lanes.close()


def _score(
    run: PreparedRun, lanes: Lanes, lookout: Lookout, watch: NightWatch
) -> tuple[DeviceUse, ...]:
    observer = lookout.observer
    num_todo = sum(shard.num_rows for shard in run.todo)
    num_rows = run.plan.num_rows
    if not run.todo:
        observer.say(f"all {len(run.plan.shards)} shards were committed before")
        return ()
    watch.check()
    observer.start(num_rows, num_rows - num_todo)
    threading.Thread(target=import_end, args=(run,), name="import-end", daemon=True).start()
    try:
        return lanes.score(run, lookout, watch)
    finally:
        observer.stop()


def import_end(run: PreparedRun) -> None:
    """Import what the end of a run needs; lanes have just begun to open their engine.

    Before, they would wait for it; afterwards, the publication would.
    """
    with suppress(Exception):  # told where it is used
        import pipeline.finish  # noqa: F401
        from pipeline.last_look import import_judges

        import_judges(run)


def process_start() -> float:
    """When this process began, as `time.monotonic` counts: interpreter start and imports included.

    From /proc on Linux; elsewhere the moment of the call.
    """
    return time.monotonic() - (process_age_s(os.getpid()) or 0.0)
