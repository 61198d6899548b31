"""Score blocks on a CPU: each core takes a block from encoded rows to scores, a piece at a time.

On a device, stages work side by side; on a CPU they would only take cores and caches from each
other. Here pixels or features are still in a cache near the core when its engine reads them, and
no core waits for another before the last block of a night.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Lock

import numpy as np

from engines.in_order import map_in_order
from engines.runner import HostRunner, Outputs
from pipeline.block_size import BLOCKS_AHEAD
from pipeline.blocks import Array, BadRow, Block, Decoder, ScoredBlock, pad
from pipeline.report import NO_TIME, StageTimes
from pipeline.row_digest import digest_of
from pipeline.unanswered import STAGE, run_batch
from pipeline.work_marks import WorkMarks

DECODED_BYTES = 2 << 20
"""Of the engine's input that a core decodes before it infers; one batch, if that is larger.

Not one batch of features at a time, as each call waits for Python's lock, whose owner may wait for
a core: with an MLP 32-256-128-1 and 10 million rows in batches of 2,048, two warm cores waited for
6.7 % of the time when each batch was decoded by itself, and for 5.0, 4.5 and 4.1 % with pieces of
1, 2 and 8 MiB (medians of 6 rounds in turns, AMD EPYC with 1 MiB of cache a core). In a whole night
in batches of 4,096 the gain is too small to be told from noise."""


class CoreScoring:
    """Scores a stream of blocks on several threads, and keeps their times.

    Args:
        decoder: Its `decode` may be called from several threads.
        runner: Opened; computes a batch in the calling thread.
        passthrough: Columns that go through unscored.
        num_threads: Blocks that are worked on at once.
        marks: Are told which blocks are in work.
    """

    def __init__(
        self,
        decoder: Decoder,
        runner: HostRunner,
        passthrough: tuple[str, ...],
        num_threads: int,
        marks: WorkMarks,
    ) -> None:
        self._decoder = decoder
        self._runner = runner
        self._passthrough = list(passthrough)
        self._num_threads = num_threads
        self._marks = marks
        self._rows_at_once = runner.batch_size * max(1, DECODED_BYTES // runner.input.num_bytes)
        self._lock = Lock()
        self._decode = self._infer = NO_TIME
        self._began_cpu_s = time.process_time()
        self._started: float | None = None
        self._ended: float | None = None

    def score(self, blocks: Iterable[Block | None]) -> Iterator[ScoredBlock]:
        """Score blocks in order; None among them says that there is none for now."""
        num_ahead = self._num_threads * (1 + BLOCKS_AHEAD)
        with ThreadPoolExecutor(self._num_threads, "core") as pool:
            self._started = time.perf_counter()
            with closing(map_in_order(pool, self._score_block, blocks, num_ahead)) as scored:
                for block in scored:
                    if block is not None:
                        yield block
            self._ended = time.perf_counter()

    def times(self, others_cpu_s: float) -> dict[str, StageTimes]:
        """Seconds of all threads until now. They wait for rows, or for the writer.

        They wait for decoding and inference together: each has its part of that by what it takes.
        CPU seconds of threads that are nobody's are the engine's: OpenVINO computes in its own.
        Until the end, those of blocks in work are among them.

        Args:
            others_cpu_s: CPU seconds of the stages before and after.
        """
        with self._lock:
            decode, infer = self._decode, self._infer
        if self._started is None:
            return {"decode": decode, "infer": infer}
        alive_s = (self._ended or time.perf_counter()) - self._started
        busy_s = decode.busy_s + infer.busy_s
        idle_s = max(0.0, alive_s * self._num_threads - busy_s)
        decode_idle_s = idle_s * (decode.busy_s / busy_s if busy_s else 0.5)
        all_cpu_s = time.process_time() - self._began_cpu_s
        engine_cpu_s = max(infer.cpu_s, all_cpu_s - decode.cpu_s - others_cpu_s)
        return {
            "decode": dataclasses.replace(decode, wait_s=decode_idle_s),
            "infer": dataclasses.replace(infer, wait_s=idle_s - decode_idle_s, cpu_s=engine_cpu_s),
        }

    def _score_block(self, block: Block) -> ScoredBlock:
        answers: list[Outputs] = []
        bad_rows: dict[int, BadRow] = {}
        decoding, inferring = _StopWatch(), _StopWatch()
        self._mark(block)
        self._marks.count(block.rows.num_rows)
        for first in range(0, block.rows.num_rows, self._rows_at_once):
            with decoding:
                inputs = self._decode_piece(block, first, bad_rows)
            with inferring:
                answers += self._infer_piece(block, first, inputs, bad_rows)
        with self._lock:
            self._decode += decoding.times(block.rows.num_rows)
            self._infer += inferring.times(block.rows.num_rows)
        return self._scored(block, answers, bad_rows)

    def _decode_piece(self, block: Block, first: int, bad_rows: dict[int, BadRow]) -> Array:
        """Some batches from row `first` of a block on; what is bad is noted in `bad_rows`."""
        inputs, bad = self._decoder.decode(block.rows.slice(first, self._rows_at_once))
        bad_rows.update({first + slot: row for slot, row in bad.items()})
        return inputs

    def _infer_piece(
        self, block: Block, first: int, inputs: Array, bad_rows: dict[int, BadRow]
    ) -> Iterator[Outputs]:
        """The answers to each batch of the rows from row `first` on."""
        size = self._runner.batch_size
        for start in range(0, len(inputs), size):
            batch = pad(inputs[start : start + size], size)
            yield self._run(block, first + start, batch, bad_rows)

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

    def _scored(
        self, block: Block, answers: list[Outputs], bad_rows: dict[int, BadRow]
    ) -> ScoredBlock:
        self._marks.end(block.shard.index, block.first_row)
        num_rows = block.rows.num_rows
        return ScoredBlock(
            shard=block.shard,
            first_row=block.first_row,
            passthrough=block.rows.select(self._passthrough),
            outputs=tuple(np.concatenate(parts)[:num_rows] for parts in zip(*answers, strict=True)),
            bad_rows=bad_rows | dict(block.poison),
        )


class _StopWatch:
    """Seconds that a thread spends within it, by the clock and of the CPU."""

    def __init__(self) -> None:
        self._busy_s = self._cpu_s = 0.0

    def __enter__(self) -> None:
        self._busy_s -= time.perf_counter()
        self._cpu_s -= time.thread_time()

    def __exit__(self, *_: object) -> None:
        self._busy_s += time.perf_counter()
        self._cpu_s += time.thread_time()

    def times(self, num_rows: int) -> StageTimes:
        """As those of a stage that let so many rows pass."""
        return StageTimes(busy_s=self._busy_s, wait_s=0.0, items=num_rows, cpu_s=self._cpu_s)
