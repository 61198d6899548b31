"""A lane: one supervised process bound to one device, which keeps engine and decoder warm.

The process dies with its parent. When it dies by itself, is stuck or takes too much memory, its
unfinished shards go to a new one, which first finds out whether rows were to blame.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engines.devices import Cpu, Device, Gpu, this_cpu
from pipeline.errors import Interrupted, LaneError
from pipeline.lane_messages import (
    Binding,
    Cleared,
    Committed,
    DeviceLost,
    Drain,
    Failed,
    Finished,
    LaneSetup,
    Measured,
    Message,
    Progress,
    Suspect,
    WatchLimits,
)
from pipeline.lane_spawn import take_process
from pipeline.limit import add_times, ceilings_of_cores
from pipeline.report import Ceilings, StageTimes
from pipeline.suspects import Suspects
from pipeline.watchdog import Watchdog

if TYPE_CHECKING:  # these bring Arrow and more, which the process had better begin to import
    from pipeline.config import Job
    from pipeline.ledger import CommitRecord
    from pipeline.plan import Shard

JOIN_TIMEOUT_S = 10.0
OPENVINO = "engines.ovino:the_core"


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneDevice:
    """What a lane is bound to."""

    name: str
    num_threads: int
    gpu: Gpu | None = None
    """None: the CPU."""
    cpu: Cpu | None = None
    """As its own machine describes it; None: this machine's."""
    cores: frozenset[int] = frozenset()
    """CPU cores that its process is bound to; empty: not bound."""
    machine_threads: int | None = None
    """Threads of all lanes of a CPU, for which its engines are built; None: `num_threads`."""

    @property
    def engine_device(self) -> Device:
        """As the engine layer describes it."""
        return self.gpu or self.cpu or this_cpu(self.machine_threads or self.num_threads)


class LaneFigures(Protocol):
    """What a report says of a lane."""

    @property
    def device(self) -> LaneDevice:
        """What it is bound to."""

    @property
    def ceilings(self) -> Ceilings | None:
        """Its limits; None: not measured."""

    @property
    def rows_begun(self) -> int:
        """Rows that it has begun to score, committed or not."""

    def times(self) -> dict[str, StageTimes]:
        """Stage times over all processes that it has had."""


class Lane:
    """Has its process at once, which imports its libraries while the run is planned.

    The process that began with the command, or one of its own; see `pipeline.lane_spawn`.

    Args:
        device: What its process is bound to.
        ahead: What the process imports before it knows the run; see `modules_ahead`.
        is_kept: Whether its process outlives `close`, for the next run; `abort` ends it.

    `score` may be called from several threads; shards of all callers form one stream, so that the
    process never runs dry between two groups.
    """

    def __init__(
        self, device: LaneDevice, ahead: tuple[str, ...] = (), *, is_kept: bool = False
    ) -> None:
        self.device = device
        self._ahead = ahead
        self._is_kept = is_kept
        self._finished = threading.Event()
        """Set when the process has done what it was given for a run, or has ended."""
        self.num_restarts = 0
        self._measured: Ceilings | None = None
        self._core_threads: int | None = None
        self._lock = threading.RLock()
        self._setup: LaneSetup | None = None
        self._pending: dict[int, tuple[Shard, Future[CommitRecord]]] = {}
        self._closing = False
        self._error: Exception | None = None
        """What stopped the lane; whoever comes later is told the same."""
        self._past_times: dict[str, StageTimes] = {}
        self._times: dict[str, StageTimes] = {}
        self._past_rows_begun = 0
        self._suspects = Suspects()
        self._start()

    def _start(self) -> None:
        self._taken = taken = take_process()
        self._process, self._connection, self._marks = taken.process, taken.connection, taken.marks
        self._watchdog: Watchdog | None = None
        self._last_words = ""
        device = self.device
        gpu_uuid = device.gpu.uuid if device.gpu else None
        self._send(Binding(gpu_uuid=gpu_uuid, cores=device.cores, ahead=self._ahead))
        self._receiver = threading.Thread(target=self._receive, name="lane-receiver", daemon=True)
        self._receiver.start()

    def open(self, setup: LaneSetup) -> None:
        """Tell the process what to score with; for a lane that is kept this begins another run."""
        with self._lock:
            if self.is_ready:
                self._forget_last_run()
            self._setup, self._core_threads = setup, setup.core_threads
            self._send_setup(setup)

    @property
    def is_ready(self) -> bool:
        """Whether the lane is kept, and waits for a run: its first, or another."""
        is_free = self._setup is None and self._error is None
        return self._is_kept and is_free and self._process.is_alive()

    def _forget_last_run(self) -> None:
        self._closing = False
        self._finished.clear()
        self.num_restarts, self._measured, self._suspects = 0, None, Suspects()
        self._past_times, self._times = {}, {}
        self._past_rows_begun = -self._marks.rows_begun

    def _send_setup(self, setup: LaneSetup) -> None:
        found = self._suspects
        self._send(
            dataclasses.replace(
                setup,
                poison=(*setup.poison, *found.poison),
                suspects=tuple(found.to_try),
            )
        )
        if self._watchdog is None:
            self._watchdog = Watchdog(self._process, self._marks, setup.limits)
            self._watchdog.start()
        self._watchdog.limits = self._limits(setup)

    def _limits(self, setup: LaneSetup) -> WatchLimits:
        """Of the run, by what is known by now of its decoder and its rows."""
        rates = [setup.limits.rows_per_s]
        if (ceilings := self.ceilings) is not None:
            num_threads = 1 if self.device.gpu else self._core_threads or self.device.num_threads
            rates.append(ceilings.decode_per_sec / num_threads)
        return dataclasses.replace(
            setup.limits, rows_per_s=min(rates), patience=self._suspects.patience
        )

    def score(self, shards: Iterable[Shard]) -> list[CommitRecord]:
        """Score shards and wait for their commit records.

        Raises:
            PipelineError: What stopped the lane; LaneError when its process died too often;
                Interrupted after `abort`.
        """
        return [future.result() for future in self.submit(shards)]

    def submit(self, shards: Iterable[Shard]) -> list[Future[CommitRecord]]:
        """Hand shards in without waiting; a future for the commit record of each."""
        with self._lock:
            return [self._submit(shard) for shard in shards]

    def _submit(self, shard: Shard) -> Future[CommitRecord]:
        future: Future[CommitRecord] = Future()
        if self._closing:
            future.set_exception(
                self._error or Interrupted("the lane is closed; run the same command again.")
            )
            return future
        self._pending[shard.index] = (shard, future)
        self._send(shard)
        return future

    @property
    def num_pending(self) -> int:
        """Shards that were handed in and are not committed yet."""
        return len(self._pending)

    def times(self) -> dict[str, StageTimes]:
        """Stage times over all processes that this lane has had."""
        with self._lock:
            return add_times([self._past_times, self._times])

    @property
    def ceilings(self) -> Ceilings | None:
        """Its limits; None: not known yet."""
        if self._core_threads is None:
            return self._measured
        return ceilings_of_cores(self.times(), self._core_threads)

    @property
    def rows_begun(self) -> int:
        """Rows that all processes of this lane have begun to score, committed or not."""
        with self._lock:
            return self._past_rows_begun + self._marks.rows_begun

    def close(self) -> None:
        """End the run, and with it the process, after the shards that it has.

        Then `times` are final, until a lane that is kept is opened again.
        """
        if self._setup is None:  # it has none: do not wait for its imports
            if not self._is_kept:
                self.abort()
            return
        with self._lock:
            self._closing = True
            self._send(None)
        if self._is_kept and self._finished.wait(JOIN_TIMEOUT_S):
            self._setup = None
            return
        self._send(None)
        self._process.join(JOIN_TIMEOUT_S)
        self._end_process()

    def drain(self) -> None:
        """Begin no other shard; `wait` until those in work are committed."""
        with self._lock:
            self._closing = True
            self._send(Drain())

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process to end by itself; whether it did."""
        # By the thread that collects its exit code: of two that wait for a process, one may be told
        # that there is none, and take it for alive.
        self._receiver.join(timeout_s)
        return not self._receiver.is_alive()

    def abort(self) -> None:
        """End the process at once. Committed shards stay; the others raise Interrupted."""
        with self._lock:
            self._closing = True
        self._end_process()
        self._fail(Interrupted("interrupted; the same command goes on where this one stopped."))

    def _end_process(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._receiver.join()
        self._connection.close()

    def _send(self, message: Binding | LaneSetup | Shard | Drain | None) -> None:
        try:
            self._connection.send(message)
        except OSError:
            # The process is dead: the receiver notices and sends it all again to a new one.
            return

    def _receive(self) -> None:
        connection = self._connection
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                break
            self._heed(message)
        self._taken.reap()
        self._replace_process()
        if self._closing:
            self._finished.set()

    def _heed(self, message: Message) -> None:
        match message:
            case Measured():
                self._measured = self._measured or message.ceilings
                self._tell_watchdog()
            case Cleared():
                self._suspects.cleared()
            case Progress():
                self._times = message.times
                self._tell_watchdog()
            case Committed():
                self._finish(message.record)
            case Finished():
                self._finished.set()
            case DeviceLost():
                self._last_words = f": {message.why}"
            case Failed():
                self._fail(message.error)

    def _tell_watchdog(self) -> None:
        with self._lock:
            if self._setup is not None and self._watchdog is not None:
                self._watchdog.limits = self._limits(self._setup)

    def _finish(self, record: CommitRecord) -> None:
        with self._lock:
            _, future = self._pending.pop(record.shard)
            self._suspects.committed()
        future.set_result(record)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._closing = True
            self._error = self._error or error
            pending, self._pending = self._pending, {}
        for _, future in pending.values():
            future.set_exception(error)

    def _replace_process(self) -> None:
        with self._lock:
            self._past_times = add_times([self._past_times, self._times])
            self._times = {}
            if self._closing:
                return
            self._suspects.died(self._in_work(), *self._why_it_died())
            if self._setup is None or self._suspects.is_hopeless:
                _, why = self._why_it_died()
                self._fail(
                    LaneError(
                        f"{self.device.name}: its process died {self.num_restarts + 1} times, the "
                        f"last time: {why}; expected it to live, and no rows explain it. Committed "
                        "shards are kept; see the log for what it said last."
                    )
                )
                return
            self.num_restarts += 1
            self._past_rows_begun += self._marks.rows_begun
            self._start()
            self._send_setup(self._setup)
            for shard, _ in self._pending.values():
                self._send(shard)

    def _in_work(self) -> list[Suspect]:
        """What the dead process was at, of shards that are not committed."""
        marks, pending = self._marks.in_work(), self._pending
        return [
            Suspect(
                shard=pending[mark.shard][0],
                first_row=mark.first_row,
                num_rows=mark.num_rows,
                is_read=mark.is_read,
            )
            for mark in marks
            if mark.shard in pending
        ]

    def _why_it_died(self) -> tuple[str, str]:
        """Reason code and message."""
        if self._watchdog is not None and self._watchdog.verdict is not None:
            return self._watchdog.verdict
        code = self._process.exitcode or 0
        with suppress(ValueError):
            return "crashed", f"exit code {code} ({signal.Signals(-code).name})"
        return "crashed", f"exit code {code}{self._last_words}"


def modules_ahead(job: Job, device: LaneDevice) -> tuple[str, ...]:
    """The decoder and runtime that a lane will most likely use; see `Binding.ahead`.

    DALI takes more than a second to import, OpenVINO 0.1 s. On a GPU the engine is imported later:
    CUDA takes memory of the device.
    """
    lanes = job.lanes
    if job.input.images is None:
        return ()
    if device.gpu is not None and lanes.gpu_decode.enabled:
        return ("pipeline.decode_images_gpu",)
    if device.gpu is not None:
        return ("pipeline.decode_images",)
    decoder = "decode_windows" if lanes.cpu_decoder == "window" else "decode_images"
    return (f"pipeline.{decoder}", OPENVINO)
