"""The one place where the stages are chained: read -> decode -> infer -> write, all at once.

On a device decoding and inference are stages of their own; a CPU's cores do both for a block.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from engines.runner import HostRunner, Runner
from pipeline.block_size import QUEUE_DEPTH
from pipeline.blocks import Block, DecodedBlock, Decoder, ScoredBlock
from pipeline.commits import Commit, Commits
from pipeline.infer import batches_of, infer_blocks
from pipeline.lane_messages import PoisonRow
from pipeline.ledger import CommitRecord, Ledger
from pipeline.overlap import Awaited, Stage
from pipeline.part import OutputLayout, build_parts
from pipeline.plan import Shard
from pipeline.poison import keep_poison_out, lost_to_reading, nulled
from pipeline.read import BlockReader, Reading
from pipeline.report import Ceilings, StageTimes
from pipeline.row_groups import MAX_GROUP_BYTES
from pipeline.score_on_cores import CoreScoring
from pipeline.storage import Storage
from pipeline.work_marks import WorkMarks

READER_SHARES_CORES = 8
"""Cores below which one thread reads fast enough for all: decoding Parquet on several would only
take them from the engine, and cost a fifth more in all."""
ANY_NUMBER = 0
"""Of items in a queue."""
CEILING_S = 0.1
"""How long each ceiling is measured: long enough for some batches, short against any night."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringTools:
    """What a lane keeps open from shard to shard."""

    source: Storage
    ledger: Ledger
    decoder: Decoder
    runner: Runner
    layout: OutputLayout
    passthrough: tuple[str, ...]
    owner: str
    """The attempt that commits."""
    marks: WorkMarks
    """Are told which blocks are in work."""
    poison: tuple[PoisonRow, ...] = ()
    """Rows that are not tried again."""
    max_group_bytes: int = MAX_GROUP_BYTES
    """Row groups that promise more are not read."""
    queue_depth: int = QUEUE_DEPTH
    """Blocks that may wait between two stages."""
    rows_side_by_side: int = 0
    """Of shards that may be committed while another is gathered, where the store is far away."""
    core_threads: int | None = None
    """Threads that each take a block from decoding to its scores, with a `HostRunner` and a decoder
    that many threads may use; None: decoder and engine are stages side by side."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(dict.fromkeys((*self.passthrough, *self.decoder.columns)))

    def read(
        self,
        shards: Iterable[Shard | None],
        *,
        use_threads: bool = True,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Block | None]:
        """Blocks of shards, as the decoder wants them; without row groups that end the process."""
        reader = self._reader(use_threads, self._mark_read)
        return reader.blocks(self._lost(shards), is_over)

    @contextmanager
    def _mark_read(self, shard: Shard) -> Iterator[None]:
        self.marks.begin(shard.index, 0, shard.num_rows, is_read=True)
        try:
            yield
        finally:
            self.marks.end(shard.index, 0, is_read=True)

    def _lost(self, shards: Iterable[Shard | None]) -> Iterator[Shard | None]:
        """Shards that know what may not be read of them."""
        for shard in shards:
            lost = () if shard is None else lost_to_reading(shard, self.poison)
            yield dataclasses.replace(shard, lost=lost) if shard and lost else shard

    def read_unmarked(
        self, shards: Iterable[Shard | None], *, use_threads: bool = True
    ) -> Iterator[Block | None]:
        """The same, and nobody will know that these shards were read should the process end."""
        return self._reader(use_threads).blocks(shards)

    def _reader(self, use_threads: bool, reading: Reading = nullcontext) -> BlockReader:
        return BlockReader(
            source=self.source,
            columns=self.columns,
            block_rows=self.decoder.block_rows,
            max_group_bytes=self.max_group_bytes,
            use_threads=use_threads,
            reading=reading,
        )


class ShardScoring:
    """Scores a stream of shards; iterate for the commit record of each, in order.

    Everything between reading and writing overlaps, across shards too: while one block is in the
    engine the next is decoded, the one after is read, and the shard before is uploaded.

    Args:
        shards: As they come; None says that there is none for now.
        tools: What they are scored with.
        inbox: What `shards` come from, where they have to be waited for: reading is idle meanwhile.
        is_over: Whether no other shard is to be begun, of those that were drawn either.
    """

    def __init__(
        self,
        shards: Iterable[Shard | None],
        tools: ScoringTools,
        inbox: Awaited[Shard | None] | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stages: dict[str, Stage[Any]] = {}
        self._began_store_cpu_s = store_thread_cpu_s()
        self._cores = _core_scoring(tools)
        self._depth = tools.queue_depth
        use_threads = not 0 < (tools.core_threads or 0) < READER_SHARES_CORES
        read = tools.read(shards, use_threads=use_threads, is_over=is_over)
        blocks = self._stage(
            "read",
            keep_poison_out(read, tools.poison, tools.decoder.columns),
            upstream=inbox,
            count=lambda block: block.rows.num_rows,
        )
        if self._cores:
            scored = self._stage("score", self._cores.score(blocks), upstream=blocks)
        else:
            marked = _begin_marks(blocks, tools.marks)
            decoded = self._stage("decode", _decode(marked, tools), upstream=blocks)
            inferred = _end_marks(infer_blocks(decoded, tools.runner), tools.marks)
            scored = self._stage("infer", inferred, upstream=decoded)
        self._commits = Commits(tools.ledger, tools.owner, tools.marks, tools.rows_side_by_side)
        self._committed: Stage[Commit] = self._stage(
            "write",
            self._write(scored, tools.layout),
            upstream=scored,
            count=lambda commit: commit.num_rows,
            depth=ANY_NUMBER,  # its bound is that of `Commits`
        )

    def _stage(
        self,
        name: str,
        items: Iterable[Any],
        *,
        upstream: Stage[Any] | Awaited[Any] | None = None,
        count: Any = lambda block: block.num_rows,
        depth: int | None = None,
    ) -> Stage[Any]:
        depth = self._depth if depth is None else depth
        stage = Stage(name, items, upstream=upstream, depth=depth, count=count)
        self._stages[name] = stage
        return stage

    def __enter__(self) -> ShardScoring:
        return self

    def __exit__(self, *_: object) -> None:
        for stage in self._stages.values():
            stage.stop()
        for stage in self._stages.values():
            stage.join()
        self._commits.close()

    def __iter__(self) -> Iterator[CommitRecord]:
        for commit in self._committed:
            yield commit.record()

    def _write(self, blocks: Iterable[ScoredBlock], layout: OutputLayout) -> Iterator[Commit]:
        """Gather the blocks of a shard; when all of its rows are there, commit it."""
        gathered: list[ScoredBlock] = []
        for block in blocks:
            if gathered and gathered[-1].shard is not block.shard:  # a damaged shard begins anew
                gathered = []
            gathered.append(block)
            if block.is_last:
                parts = build_parts(block.shard, gathered, layout)
                gathered = []
                yield self._commits.begin(block.shard, parts)

    def times(self) -> dict[str, StageTimes]:
        """Busy and waiting time of each stage until now."""
        times = {name: stage.times() for name, stage in self._stages.items()}
        store_cpu_s = store_thread_cpu_s() - self._began_store_cpu_s
        read = dataclasses.replace(times["read"], cpu_s=times["read"].cpu_s + store_cpu_s)
        if self._cores is None:
            return {**times, "read": read}
        write = times["write"]
        return {"read": read, **self._cores.times(read.cpu_s + write.cpu_s), "write": write}


def store_thread_cpu_s() -> float:
    """CPU seconds of the thread in which s3fs makes the requests of this process; 0 without one.

    Parts are written there, too; what is read is far more.
    """
    asyn = sys.modules.get("fsspec.asyn")
    thread = asyn.iothread[0] if asyn else None
    if thread is None or not thread.is_alive():
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _core_scoring(tools: ScoringTools) -> CoreScoring | None:
    if tools.core_threads is None:
        return None
    return CoreScoring(
        tools.decoder,
        cast("HostRunner", tools.runner),
        tools.passthrough,
        tools.core_threads,
        tools.marks,
    )


def _begin_marks(blocks: Iterable[Block | None], marks: WorkMarks) -> Iterator[Block | None]:
    for block in blocks:
        if block is not None:
            marks.begin(block.shard.index, block.first_row, block.rows.num_rows)
            marks.count(block.rows.num_rows)
        yield block


def _end_marks(blocks: Iterable[ScoredBlock], marks: WorkMarks) -> Iterator[ScoredBlock]:
    for block in blocks:
        marks.end(block.shard.index, block.first_row)
        marks.renew()  # blocks end in order: those behind it, in the decoder or a slot, have waited
        yield block


def score_alone(blocks: Iterable[Block], tools: ScoringTools) -> Iterator[ScoredBlock]:
    """Decode and infer in this thread, one block after the other."""
    return infer_blocks(_decode(blocks, tools), tools.runner)


def _decode(blocks: Iterable[Block | None], tools: ScoringTools) -> Iterator[DecodedBlock | None]:
    waiting: deque[Block] = deque()  # the decoder may draw rows ahead

    def rows() -> Iterator[pa.RecordBatch | None]:
        for block in blocks:
            if block is not None:
                waiting.append(block)
            yield None if block is None else block.rows

    for decoded in tools.decoder.decode_blocks(rows()):
        if decoded is None:
            yield None
            continue
        block = waiting.popleft()
        inputs, bad_rows = decoded
        yield DecodedBlock(
            shard=block.shard,
            first_row=block.first_row,
            passthrough=block.rows.select(list(tools.passthrough)),
            inputs=inputs,
            bad_rows=bad_rows | dict(block.poison),
        )


def measure_ceilings(shard: Shard, tools: ScoringTools) -> Ceilings:
    """Rates of decoder and engine as stages alone, on a shard's first rows; warms both up too."""
    decoder, runner = tools.decoder, tools.runner
    first = next(keep_poison_out(tools.read([shard]), tools.poison, decoder.columns))
    assert first is not None  # a plan has no empty shard
    rows = first.rows
    nothing = nulled(rows, np.ones(rows.num_rows, bool), decoder.columns)
    deque(score_alone([dataclasses.replace(first, rows=nothing)], tools), maxlen=0)
    tools.marks.begin(shard.index, 0, rows.num_rows)
    decoded = next(iter(decoder.decode_blocks([rows])))
    assert decoded is not None
    inputs, _ = decoded
    block = DecodedBlock(
        shard=shard, first_row=0, passthrough=rows.select([]), inputs=inputs, bad_rows={}
    )
    batch = next(batches_of(inputs, runner.batch_size))
    deque(runner.infer([batch]), maxlen=0)
    tools.marks.end(shard.index, 0)
    return Ceilings(
        decode_per_sec=_rate(decoder.decode_blocks, rows, rows.num_rows),
        engine_per_sec=_rate(runner.infer, batch, runner.batch_size),
        engine_with_copies_per_sec=_rate(
            lambda blocks: infer_blocks(blocks, runner), block, block.num_rows
        ),
    )


def _rate(work: Callable[[Iterator[Any]], Iterator[Any]], item: Any, num_rows: int) -> float:
    """Rows per second of a stage that is fed one item of `num_rows` rows again and again."""
    started = time.perf_counter()

    def items() -> Iterator[Any]:
        yield item
        while time.perf_counter() - started < CEILING_S:
            yield item

    num_items = sum(1 for _ in work(items()))
    return num_items * num_rows / (time.perf_counter() - started)
