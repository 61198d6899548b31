"""The one place where the stages are chained: read -> decode -> infer -> write, all at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from engines.runner import Runner
from pipeline.blocks import Block, DecodedBlock, Decoder, ScoredBlock, pad
from pipeline.infer import infer_blocks
from pipeline.ledger import CommitRecord, Ledger
from pipeline.overlap import Stage
from pipeline.part import OutputLayout, build_parts
from pipeline.plan import Shard
from pipeline.read import read_blocks
from pipeline.report import Ceilings, StageTimes
from pipeline.storage import Storage

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


class ShardScoring:
    """Scores a stream of shards; iterate for the commit record of each, in order.

    Everything between reading and writing overlaps, across shards too: while one block is in the
    engine the next is decoded, the one after is read, and the shard before is uploaded.
    """

    def __init__(self, shards: Iterable[Shard | None], tools: ScoringTools) -> None:
        columns = tuple(dict.fromkeys((*tools.passthrough, *tools.decoder.columns)))
        self._stages: dict[str, Stage[Any]] = {}
        blocks = self._stage(
            "read",
            read_blocks(shards, tools.source, columns, tools.decoder.block_rows),
            depth=2,
            count=lambda block: block.rows.num_rows,
        )
        decoded = self._stage("decode", _decode(blocks, tools), upstream=blocks)
        scored = self._stage("infer", infer_blocks(decoded, tools.runner), upstream=decoded)
        self._committed: Stage[CommitRecord] = self._stage(
            "write", _write(scored, tools), upstream=scored, count=lambda record: record.num_rows
        )

    def _stage(
        self,
        name: str,
        items: Iterable[Any],
        *,
        upstream: Stage[Any] | None = None,
        depth: int = 2,
        count: Any = lambda block: block.num_rows,
    ) -> Stage[Any]:
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

    def __iter__(self) -> Iterator[CommitRecord]:
        return iter(self._committed)

    def times(self) -> dict[str, StageTimes]:
        """Busy and waiting time of each stage until now."""
        return {name: stage.times() for name, stage in self._stages.items()}


def _decode(blocks: Iterable[Block | None], tools: ScoringTools) -> Iterator[DecodedBlock | None]:
    for block in blocks:
        if block is None:
            yield None
            continue
        inputs, bad_rows = tools.decoder.decode(block.rows)
        yield DecodedBlock(
            shard=block.shard,
            first_row=block.first_row,
            passthrough=block.rows.select(list(tools.passthrough)),
            inputs=inputs,
            bad_rows=bad_rows,
        )


def _write(blocks: Iterable[ScoredBlock], tools: ScoringTools) -> Iterator[CommitRecord]:
    """Gather the blocks of a shard; when all of its rows are there, commit it."""
    gathered: list[ScoredBlock] = []
    for block in blocks:
        gathered.append(block)
        if block.first_row + block.num_rows == block.shard.num_rows:
            parts = build_parts(block.shard, gathered, tools.layout)
            gathered = []
            yield tools.ledger.commit(block.shard, parts, tools.owner)


def measure_ceilings(shard: Shard, tools: ScoringTools) -> Ceilings:
    """Rates of decoder and engine alone, on the first rows of a shard; warms both up too."""
    columns = tools.decoder.columns
    blocks = read_blocks([shard], tools.source, columns, tools.decoder.block_rows)
    first = next(iter(blocks))
    assert first is not None  # a plan has no empty shard
    rows = first.rows
    inputs, _ = tools.decoder.decode(rows)
    decode_per_sec = _rate(lambda: len(tools.decoder.decode(rows)[0]))

    batch = pad(inputs[: tools.runner.batch_size], tools.runner.batch_size)
    per_call = max(1, len(inputs) // len(batch))

    def run_engine() -> int:
        return sum(len(batch) for _ in tools.runner.infer([batch] * per_call))

    decoded = DecodedBlock(
        shard=shard, first_row=0, passthrough=rows.select([]), inputs=inputs, bad_rows={}
    )

    def run_with_copies() -> int:
        (scored,) = infer_blocks([decoded], tools.runner)
        return len(scored.outputs[0])

    run_engine()
    return Ceilings(
        decode_per_sec=decode_per_sec,
        engine_per_sec=_rate(run_engine),
        engine_with_copies_per_sec=_rate(run_with_copies),
    )


def _rate(work: Any) -> float:
    """Rows per second of a function that returns how many it did."""
    num_rows, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < CEILING_S:
        num_rows += work()
    return float(num_rows / elapsed_s)
