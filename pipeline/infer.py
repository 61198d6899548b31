"""Feed decoded blocks to an engine in fixed batches, and put its outputs back together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from engines.runner import Runner
from pipeline.blocks import Array, DecodedBlock, Inputs, ScoredBlock, pad


def infer_blocks(blocks: Iterable[DecodedBlock | None], runner: Runner) -> Iterator[ScoredBlock]:
    """Score blocks in order. The last batch of a block is padded, and unpadded again.

    The runner draws batches ahead as far as it wants, so that copies and computation overlap;
    blocks wait in `waiting` until all of their batches have come out, which keeps rows on a device
    alive while they are copied. None among the blocks says that there is none for now, and brings
    out what is in flight.
    """
    waiting: deque[DecodedBlock] = deque()

    def batches() -> Iterator[Inputs | None]:
        for block in blocks:
            if block is None:
                yield None
                continue
            waiting.append(block)
            yield from batches_of(block.inputs, runner.batch_size)

    collected: list[tuple[Array, ...]] = []
    for outputs in runner.infer(batches()):
        collected.append(outputs)
        if len(collected) * runner.batch_size >= waiting[0].num_rows:
            block = waiting.popleft()
            yield ScoredBlock(
                shard=block.shard,
                first_row=block.first_row,
                passthrough=block.passthrough,
                outputs=_join(collected, block.num_rows),
                bad_rows=block.bad_rows,
            )
            collected = []


def batches_of(inputs: Inputs, batch_size: int) -> Iterator[Inputs]:
    """Full batches of rows in host memory; rows on a device are one batch, full or not.

    Not all runners take the latter: who decodes on a device must score there.
    """
    if not isinstance(inputs, np.ndarray):
        yield inputs
        return
    for start in range(0, len(inputs), batch_size):
        yield pad(inputs[start : start + batch_size], batch_size)


def _join(collected: list[tuple[Array, ...]], num_rows: int) -> tuple[Array, ...]:
    return tuple(np.concatenate(parts)[:num_rows] for parts in zip(*collected, strict=True))
