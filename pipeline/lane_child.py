"""What runs inside a lane's process: shards come in over a pipe, commit records go back."""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection

from engines.errors import CudaError
from engines.in_order import map_ahead
from engines.load import open_runner
from pipeline.block_size import QUEUE_DEPTH, block_rows
from pipeline.blocks import Decoder
from pipeline.config import Job
from pipeline.errors import portable
from pipeline.lane_messages import (
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
)
from pipeline.ledger import CommitRecord, Ledger
from pipeline.overlap import Awaited
from pipeline.plan import Shard
from pipeline.poison import try_suspects
from pipeline.read import SHARDS_AHEAD
from pipeline.row_groups import max_group_bytes
from pipeline.score_shards import (
    ScoringTools,
    ShardScoring,
    measure_ceilings,
    score_alone,
)
from pipeline.start_up import keep_pandas_out, leave
from pipeline.storage import open_storage
from pipeline.work_marks import WorkMarks

log = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 0.25
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt; source: glibc's malloc.h."""
KEPT_BLOCK_BYTES = 32 << 20
"""Larger blocks still come and go as pages: glibc's own upper bound for its dynamic threshold."""
KEPT_HEAP_BYTES = 128 << 20
EXIT_DEVICE_LOST = 3

SendMessage = Callable[[Message], None]


def score_what_comes(connection: Connection, marks: WorkMarks) -> None:
    """One run after the other: a `LaneSetup`, then shards until None; a None instead ends it."""
    keep_freed_memory()
    keep_pandas_out()
    with suppress(EOFError, OSError):  # the parent does not need us any more
        while isinstance(setup := connection.recv(), LaneSetup):
            if not _score_run(setup, connection, marks):
                return


def _score_run(setup: LaneSetup, connection: Connection, marks: WorkMarks) -> bool:
    """Score the shards of a run; whether another may follow."""
    send_lock = threading.Lock()

    def send(message: Message) -> None:
        with send_lock:
            connection.send(message)

    inbox = Inbox()
    receiver = threading.Thread(target=_receive, args=(connection, inbox), daemon=True)
    receiver.start()
    try:
        _score(setup, inbox, send, marks)
    except CudaError as error:  # it stays: every later call of this process would fail, too
        log.error("%s", error)
        send(DeviceLost(str(error)))
        leave(EXIT_DEVICE_LOST)
    except Exception as error:  # the boundary of the process: the parent raises it again
        send(Failed(portable(error)))
        return False
    receiver.join()
    send(Finished())
    return not inbox.is_last


def keep_freed_memory() -> None:
    """Let the C library use freed memory again instead of giving it back to the kernel at once.

    It would take every array of pixels as fresh, zeroed pages: 130 page faults, 0.2 ms of CPU for
    each picture (Xeon 2.5 GHz, KVM). glibc only; elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_HEAP_BYTES)


def make_decoder(
    job: Job,
    feature_columns: tuple[str, ...],
    num_features: int,
    num_threads: int,
    batch_size: int = 1,
    on_gpu: bool = False,
) -> Decoder:
    """The decoder for the job's kind of input; it decodes on the CPU.

    Args:
        job: The job.
        feature_columns: Columns of a features job.
        num_features: Width of its rows.
        num_threads: CPU threads of the lane.
        batch_size: Of the engine; blocks hold whole batches, or each would end with a padded one.
            `lanes.block_rows` is taken as it is.
        on_gpu: The engine computes on a GPU: decoding is a stage of its own, on all threads.
    """
    images, size, lanes = job.input.images, job.model.size, job.lanes
    by_window = lanes.cpu_decoder == "window" and not on_gpu
    if images is not None and by_window:
        from pipeline.decode_windows import WindowDecoder

        return WindowDecoder(images, size, block_rows(job, "window", batch_size))
    if images is not None:
        from pipeline.decode_images import ImageDecoder

        num_threads = lanes.decode_threads or num_threads
        return ImageDecoder(images, size, num_threads, block_rows(job, "dali", batch_size))
    from pipeline.decode_features import FeatureDecoder

    assert job.input.features is not None
    num_rows = block_rows(job, "features", batch_size)
    return FeatureDecoder(job.input.features, feature_columns, num_features, num_rows)


def make_lane_decoder(setup: LaneSetup) -> Decoder:
    """The decoder of a lane: for images on the GPU, where the engine computes there too."""
    job, engine = setup.job, setup.engine.manifest
    on_gpu, how = engine.device.kind == "gpu", job.lanes.gpu_decode
    if job.input.images is None or not on_gpu or not how.enabled:
        return make_decoder(
            job,
            setup.feature_columns,
            setup.num_features,
            setup.num_threads,
            engine.batch_size,
            on_gpu,
        )
    from pipeline.decode_images_gpu import GpuImageDecoder

    return GpuImageDecoder(
        job.input.images,
        job.model.size,
        num_threads=job.lanes.decode_threads or setup.num_threads,
        block_rows=engine.batch_size,
        hardware_decoder_load=how.hardware_decoder_load,
    )


def _score(setup: LaneSetup, inbox: Inbox, send: SendMessage, marks: WorkMarks) -> None:
    job = setup.job
    with ExitStack() as opened:
        tools = ScoringTools(
            source=open_storage(job.input.uri),
            ledger=Ledger(open_storage(job.output.uri), job.name, setup.run_id),
            decoder=opened.enter_context(make_lane_decoder(setup)),
            runner=opened.enter_context(
                open_runner(setup.engine, job.lanes.engine_threads or setup.num_threads)
            ),
            layout=setup.layout,
            passthrough=job.input.passthrough,
            owner=setup.attempt,
            queue_depth=job.lanes.queue_depth or QUEUE_DEPTH,
            rows_side_by_side=setup.rows_side_by_side,
            core_threads=setup.core_threads,
            marks=marks,
            poison=setup.poison,
            max_group_bytes=max_group_bytes(job.limits.max_group_gib, setup.limits.max_rss_bytes),
        )
        for row in setup.poison:
            tools.ledger.note_poison(row)  # before anything is tried again: a resume must know
        try_suspects(
            setup.suspects,
            tools,
            lambda blocks: score_alone(blocks, tools),
            lambda: send(Cleared()),
        )
        first = inbox.get()
        if first is None:
            return
        if tools.core_threads is None:
            send(Measured(measure_ceilings(first, tools)))
        given = Awaited(inbox.stream(first))
        shards = pass_over_committed(given, tools.ledger, lambda record: send(Committed(record)))
        scoring = opened.enter_context(ShardScoring(shards, tools, given, inbox.is_over))
        stopped = threading.Event()
        reporter = threading.Thread(target=_report, args=(scoring, send, stopped), daemon=True)
        reporter.start()
        try:
            for record in scoring:
                send(Committed(record))
        finally:
            inbox.end(now=True)  # after an error the reader may be waiting for a shard: let it end
            stopped.set()
            reporter.join()
        send(Progress(scoring.times()))


class Inbox:
    """Shards that wait for their turn."""

    def __init__(self) -> None:
        self._shards: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._is_over = threading.Event()
        self.is_last = False
        """Whether no other run may follow."""

    def put(self, shard: Shard) -> None:
        """Another one."""
        self._shards.put(shard)

    def end(self, *, now: bool) -> None:
        """No more come; `now`: those that wait are left to others, too."""
        if now:
            self._is_over.set()
        self._shards.put(None)

    def is_over(self) -> bool:
        """Whether none is to be begun any more."""
        return self._is_over.is_set()

    def get(self) -> Shard | None:
        """The next one, waited for; None at the end."""
        shard = self._shards.get()
        return None if self._is_over.is_set() else shard

    def stream(self, first: Shard) -> Iterator[Shard | None]:
        """Shards as they come; None before each time that the next has to be waited for."""
        shard: Shard | None = first
        while shard is not None:
            yield shard
            if self._shards.empty():
                yield None
            shard = self.get()


def pass_over_committed(
    shards: Iterable[Shard | None], ledger: Ledger, on_found: Callable[[CommitRecord], None]
) -> Iterator[Shard | None]:
    """The shards that nobody has committed when their turn comes (R4).

    Somebody else may be at the same run; or the process before this one died after a commit and
    before its parent heard of it.

    Args:
        shards: As they come; None is passed on.
        ledger: Of the run.
        on_found: Is told the record of each shard that is left out.
    """

    def look(shard: Shard) -> tuple[Shard, CommitRecord | None]:
        return shard, ledger.record_of(shard)

    num_ahead = SHARDS_AHEAD if ledger.is_far else 0
    with closing(map_ahead(look, shards, num_ahead)) as looked:
        for found in looked:
            shard, record = found or (None, None)
            if record is None:
                yield shard
            else:
                on_found(record)


def _receive(connection: Connection, inbox: Inbox) -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = None
        if message is None or isinstance(message, Drain):
            inbox.is_last = message is not None
            inbox.end(now=inbox.is_last)
            return
        inbox.put(message)


def _report(scoring: ShardScoring, send: SendMessage, stopped: threading.Event) -> None:
    while not stopped.wait(PROGRESS_PERIOD_S):
        send(Progress(scoring.times()))
