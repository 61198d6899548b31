"""Score blocks on a CPU: each core takes a block from encoded rows to scores, batch by batch.

On a device, stages work side by side; on a CPU they would only take cores and caches from each
other. Here a batch's pixels or features are still in the core's cache when its engine reads them,
and no core waits for another before the last block of a night.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Lock

import numpy as np

from engines.in_order import Item, Result, map_in_order
from engines.runner import HostRunner, Outputs
from pipeline.block_size import BLOCKS_AHEAD
from pipeline.blocks import Array, BadRow, Block, Decoder, ScoredBlock, pad
from pipeline.report import Ceilings, StageTimes
from pipeline.row_digest import digest_of
from pipeline.unanswered import STAGE, run_batch
from pipeline.work_marks import WorkMarks

MEASURED_BLOCKS = 4
"""Blocks of each core with which its ceilings are measured: some tenths of a second of pictures."""

Decoded = tuple[Block, list[Array], dict[int, BadRow]]
"""A block, the engine's batches of it, the last one padded, and its bad rows by position."""


class CoreScoring:
    """Scores a stream of blocks on several threads, and keeps their times.

    Args:
        decoder: Its `decode` may be called from several threads.
        runner: Opened; computes a batch in the calling thread.
        passthrough: Columns that go through unscored.
        num_threads: Blocks that are worked on at once.
        marks: Are told which blocks are in work.
        on_ceilings: Gets the rates of decoder and engine alone, once.
    """

    def __init__(
        self,
        decoder: Decoder,
        runner: HostRunner,
        passthrough: tuple[str, ...],
        num_threads: int,
        marks: WorkMarks,
        on_ceilings: Callable[[Ceilings], None],
    ) -> None:
        self._decoder = decoder
        self._runner = runner
        self._passthrough = list(passthrough)
        self._num_threads = num_threads
        self._marks = marks
        self._on_ceilings = on_ceilings
        self._lock = Lock()
        self._num_rows = 0
        self._decode_s = self._infer_s = 0.0
        self._started: float | None = None
        self._ended: float | None = None

    def score(self, blocks: Iterable[Block | None]) -> Iterator[ScoredBlock]:
        """Score blocks in order; None among them says that there is none for now.

        The first blocks are decoded by all threads, then inferred by all: that measures the
        ceilings, by CPU seconds, and their scores count as any others.
        """
        source = iter(blocks)
        with ThreadPoolExecutor(self._num_threads, "core") as pool:
            self._started = time.perf_counter()
            yield from self._measure(pool, list(self._first_blocks(source)))
            num_ahead = self._num_threads * (1 + BLOCKS_AHEAD)
            with closing(map_in_order(pool, self._score_block, source, num_ahead)) as scored:
                for block in scored:
                    if block is not None:
                        yield block
            self._ended = time.perf_counter()

    def times(self) -> dict[str, StageTimes]:
        """Seconds of all threads until now. They wait for rows, or for the writer.

        They wait for decoding and inference together: each has its part of that by what it takes.
        """
        with self._lock:
            num_rows, decode_s, infer_s = self._num_rows, self._decode_s, self._infer_s
        alive_s = 0.0
        if self._started is not None:
            alive_s = (self._ended or time.perf_counter()) - self._started
        busy_s = decode_s + infer_s
        idle_s = max(0.0, alive_s * self._num_threads - busy_s)
        decode_idle_s = idle_s * (decode_s / busy_s if busy_s else 0.5)
        return {
            "decode": StageTimes(busy_s=decode_s, wait_s=decode_idle_s, items=num_rows),
            "infer": StageTimes(busy_s=infer_s, wait_s=idle_s - decode_idle_s, items=num_rows),
        }

    def _first_blocks(self, blocks: Iterator[Block | None]) -> Iterator[Block]:
        """Blocks to measure with, all of the first shard: waiting for another could be long."""
        most = self._num_threads * (1 + MEASURED_BLOCKS)
        for block in blocks:
            if block is None:
                continue
            yield block
            most -= 1
            if not most or block.is_last:
                return

    def _measure(self, pool: ThreadPoolExecutor, blocks: list[Block]) -> Iterator[ScoredBlock]:
        num_warm = self._num_threads if len(blocks) > self._num_threads else 0
        yield from pool.map(self._score_block, blocks[:num_warm])
        measured = blocks[num_warm:]
        if not measured:
            return
        decoded, decode_s, decode_cpu_s = _timed(pool, self._decode, measured)
        began_cpu_s = time.process_time()
        outputs, infer_s, _ = _timed(pool, self._infer, decoded)
        # OpenVINO computes in threads of its own; the reader is ahead as far as it may be by now.
        infer_cpu_s = time.process_time() - began_cpu_s
        num_rows = sum(block.rows.num_rows for block in measured)
        self._count(num_rows, decode_s, infer_s)
        # There may be fewer blocks than threads, or one too many; and others may take the cores.
        thread_rows = num_rows * self._num_threads
        self._on_ceilings(
            Ceilings(
                decode_per_sec=thread_rows / decode_cpu_s,
                engine_per_sec=thread_rows / infer_cpu_s,
                engine_with_copies_per_sec=thread_rows / infer_cpu_s,  # a CPU copies nothing
            )
        )
        for (block, _, bad_rows), answers in zip(decoded, outputs, strict=True):
            yield self._scored(block, answers, bad_rows)

    def _score_block(self, block: Block) -> ScoredBlock:
        answers: list[Outputs] = []
        bad_rows: dict[int, BadRow] = {}
        decode_s = infer_s = 0.0
        self._begin(block)
        ended = time.perf_counter()
        for first in range(0, block.rows.num_rows, self._runner.batch_size):
            began = ended
            batch = self._decode_batch(block, first, bad_rows)
            decoded_at = time.perf_counter()
            answers.append(self._run(block, first, batch, bad_rows))
            ended = time.perf_counter()
            decode_s += decoded_at - began
            infer_s += ended - decoded_at
        self._count(block.rows.num_rows, decode_s, infer_s)
        return self._scored(block, answers, bad_rows)

    def _decode(self, block: Block) -> Decoded:
        bad_rows: dict[int, BadRow] = {}
        self._begin(block)
        firsts = range(0, block.rows.num_rows, self._runner.batch_size)
        batches = [self._decode_batch(block, first, bad_rows) for first in firsts]
        self._end(block)  # until all are decoded it waits
        return block, batches, bad_rows

    def _decode_batch(self, block: Block, first: int, bad_rows: dict[int, BadRow]) -> Array:
        """A full batch from row `first` of a block on; what is bad is noted in `bad_rows`."""
        batch_size = self._runner.batch_size
        inputs, bad = self._decoder.decode(block.rows.slice(first, batch_size))
        bad_rows.update({first + slot: row for slot, row in bad.items()})
        return pad(inputs, batch_size)

    def _infer(self, decoded: Decoded) -> list[Outputs]:
        block, batches, bad_rows = decoded
        size = self._runner.batch_size
        self._mark(block)
        outputs = [self._run(block, k * size, batch, bad_rows) for k, batch in enumerate(batches)]
        self._end(block)
        return outputs

    def _run(self, block: Block, first: int, batch: Array, bad_rows: dict[int, BadRow]) -> Outputs:
        """The answers to a batch from row `first` on; what is refused is noted in `bad_rows`."""
        outputs, refused = run_batch(self._runner, batch, lambda: self._mark(block))
        for slot, message in refused.items():
            row = block.rows.slice(first + slot, 1).select(list(self._decoder.columns))
            bad_row = BadRow(
                stage=STAGE, reason="engine_refused", message=message, sha256=digest_of(row)
            )
            bad_rows.setdefault(first + slot, bad_row)
        return outputs

    def _mark(self, block: Block) -> None:
        self._marks.begin(block.shard.index, block.first_row, block.rows.num_rows)

    def _begin(self, block: Block) -> None:
        self._mark(block)
        self._marks.count(block.rows.num_rows)

    def _end(self, block: Block) -> None:
        self._marks.end(block.shard.index, block.first_row)

    def _scored(
        self, block: Block, answers: list[Outputs], bad_rows: dict[int, BadRow]
    ) -> ScoredBlock:
        self._end(block)
        num_rows = block.rows.num_rows
        return ScoredBlock(
            shard=block.shard,
            first_row=block.first_row,
            passthrough=block.rows.select(self._passthrough),
            outputs=tuple(np.concatenate(parts)[:num_rows] for parts in zip(*answers, strict=True)),
            bad_rows=bad_rows | dict(block.poison),
        )

    def _count(self, num_rows: int, decode_s: float, infer_s: float) -> None:
        with self._lock:
            self._num_rows += num_rows
            self._decode_s += decode_s
            self._infer_s += infer_s


def _timed(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: list[Item]
) -> tuple[list[Result], float, float]:
    """The results of all items; the seconds of all threads, by the clock and of the CPU."""

    def timed(item: Item) -> tuple[Result, float, float]:
        started, cpu_s = time.perf_counter(), time.thread_time()
        result = work(item)
        return result, time.perf_counter() - started, time.thread_time() - cpu_s

    results, seconds, cpu_seconds = zip(*pool.map(timed, items), strict=True)
    return list(results), sum(seconds), sum(cpu_seconds)
