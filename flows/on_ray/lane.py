"""What runs on a node of a cluster: one lane, which asks the desk for shards until there are none.

The lane is the very one that scores on a single machine: a process of its own, watched, replaced
when it dies, and asked about the rows that killed it. This is only how it gets its work. Light: all
that is imported here takes its time from that process, which begins on the same core.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING

from engines.errors import EngineNotFoundError
from engines.store import EngineStore
from flows.on_ray.desk import Build, News
from flows.on_ray.line import DeskCalls
from flows.on_ray.node import LaneCall, Node
from flows.spot import Metadata, watch
from pipeline.errors import ConfigError, portable
from pipeline.lane import Lane
from pipeline.lane_messages import LaneSetup
from pipeline.ledger import CommitRecord, Ledger, run_folder
from pipeline.report import DeviceUse
from pipeline.storage import open_storage
from pipeline.telemetry import Sampler
from pipeline.watchdog import memory_share

if TYPE_CHECKING:
    from engines.build import ResolvedEngine

PERIOD_S = 0.1
"""Between two turns at the desk, when nothing happens."""
BREATH_S = 0.02
"""Between two turns at least: shards may be small."""
LINGER_S = 1.0
SHARED = "expected storage that all nodes share. Use s3://, or a disk that every node has mounted"


def serve(call: LaneCall, node: Node, desk: DeskCalls, lane: Lane) -> None:
    """Be a lane until the desk says that it is over."""
    service = _Service(call, node, desk, lane)
    try:
        service.work()
    except Exception as error:  # the boundary of the process: the driver decides what it means
        service.leave(portable(error))
    finally:
        service.close()
    while not desk.turn(call.lane, News(leaves=True)).end:
        time.sleep(LINGER_S)  # a lane in its place would only be told to leave, too


class _Service:
    """One lane at work for the desk.

    Args:
        call: What the driver wants.
        node: Where it is.
        desk: Who knows the work.
        lane: Its process imports meanwhile.
    """

    def __init__(self, call: LaneCall, node: Node, desk: DeskCalls, lane: Lane) -> None:
        self._call, self._node, self._desk, self._lane = call, node, desk, lane
        self._device = lane.device
        self._opened = ExitStack()
        self._lock = threading.Lock()
        self._records: list[CommitRecord] = []
        self._said: list[str] = []
        self._built: ResolvedEngine | None = None
        self._error: BaseException | None = None
        self._sampler: Sampler | None = None
        self._wake = threading.Event()
        self._notice = threading.Event()
        """Set when the machine is about to be taken away."""
        desk.join(call.lane, node.name, self._device)

    def work(self) -> None:
        """Do what the desk says, until it says that there is nothing left to do."""
        self._watch_for_notices()
        while True:
            orders = self._desk.turn(self._call.lane, self._news())
            if orders.end:
                return self.leave()
            if orders.drain or self._notice.is_set():
                return self._drain()
            if orders.build is not None:
                build = (orders.build,)
                threading.Thread(target=self._build, args=build, name="build", daemon=True).start()
            if orders.setup is not None:
                self._open(orders.setup)
            for future in self._lane.submit(orders.shards):
                future.add_done_callback(self._committed)
            self._wake.wait(PERIOD_S)
            self._wake.clear()
            time.sleep(BREATH_S)
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """End everything that was begun here."""
        self._opened.close()
        self._lane.abort()

    def leave(self, error: Exception | None = None) -> None:
        """Tell the desk the last news; `error` is why, if the desk did not ask for it."""
        if self._lane.num_pending:  # others did it meanwhile
            self._lane.abort()
        self._lane.close()
        last = dataclasses.replace(self._news(), uses=self._uses(), error=error, leaves=True)
        self._desk.turn(self._call.lane, last)

    def _drain(self) -> None:
        """Begin no other shard, and leave when those in work are committed, or the time is up."""
        deadline = time.monotonic() + self._call.job.lanes.grace_s
        self._lane.drain()
        while not self._lane.wait(PERIOD_S) and time.monotonic() < deadline:
            self._desk.turn(self._call.lane, self._news())
        self.leave()

    def _open(self, setup: LaneSetup) -> None:
        job, node = setup.job, self._node
        output = open_storage(job.output.uri)
        if output.read(f"{run_folder(job.name, setup.run_id)}/run.json") is None:
            raise ConfigError(
                f"output.uri: {output.uri}: {node.name} does not see the run that was begun there; "
                f"{SHARED}."
            )
        store = EngineStore(open_storage(job.engine.store))
        try:
            engine = store.fetch(store.get(setup.engine.key))
        except EngineNotFoundError:
            raise ConfigError(
                f"engine.store: {store.files.uri}: {node.name} does not see engine "
                f"{setup.engine.key[:12]}; {SHARED}."
            ) from None
        limits = setup.limits
        if job.lanes.memory_gib is None:  # the driver knows the lane's speed, not this memory
            limits = dataclasses.replace(limits, max_rss_bytes=memory_share(node.num_lanes))
        setup = dataclasses.replace(
            setup,
            engine=engine,
            num_threads=self._device.num_threads,
            limits=limits,
            poison=Ledger(output, job.name, setup.run_id).poison(),
        )
        self._sampler = self._opened.enter_context(Sampler([self._device.engine_device]))
        self._lane.open(setup)

    def _build(self, build: Build) -> None:
        """Find or make an engine, on this lane's device and beside its process, which waits."""
        from pipeline.engine import get_engine

        try:
            resolved = get_engine(
                build.job,
                build.plan,
                build.request,
                build.fingerprint,
                self._say,
                force=build.force,
            )
        except Exception as error:
            self._error = error
        else:
            with self._lock:
                self._built = resolved
        self._wake.set()

    def _say(self, text: str) -> None:
        with self._lock:
            self._said.append(text)
        self._wake.set()

    def _committed(self, future: Future[CommitRecord]) -> None:
        if error := future.exception():
            self._error = self._error or error
        else:
            with self._lock:
                self._records.append(future.result())
        self._wake.set()

    def _news(self) -> News:
        with self._lock:
            records, self._records = self._records, []
            said, self._said = self._said, []
            built, self._built = self._built, None
        return News(
            records=tuple(records),
            times=self._lane.times(),
            ceilings=self._lane.ceilings,
            rows_begun=self._lane.rows_begun,
            said=tuple(said),
            built=built,
        )

    def _uses(self) -> tuple[DeviceUse, ...]:
        """What the devices did meanwhile; meters of several nodes have the same names."""
        if self._sampler is None:
            return ()
        self._opened.close()
        return tuple(
            dataclasses.replace(
                use, energy_meter=use.energy_meter and f"{self._node.name} {use.energy_meter}"
            )
            for use in self._sampler.use()
        )

    def _watch_for_notices(self) -> None:
        if self._call.job.cost.market != "spot":
            return
        stopped = threading.Event()
        self._opened.callback(stopped.set)

        def on_notice(what: str) -> None:
            self._say(f"{what}: its lane finishes what is in work and leaves")
            self._notice.set()

        arguments = (Metadata.from_environment(), on_notice, stopped)
        threading.Thread(target=watch, args=arguments, name="spot", daemon=True).start()
