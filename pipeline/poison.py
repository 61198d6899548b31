"""Rows that may take the process with them: try them alone, or keep them away from the decoder."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from engines.errors import CudaError
from pipeline.blocks import BadRow, Block
from pipeline.lane_messages import PoisonRow, Suspect
from pipeline.plan import LostRows, Shard
from pipeline.read import groups_of
from pipeline.row_digest import digest_of
from pipeline.row_groups import UNREADABLE

if TYPE_CHECKING:
    from pipeline.score_shards import ScoringTools

STAGE = "score"
"""Decoder or engine: a dead process does not say which."""


def keep_poison_out(
    blocks: Iterable[Block | None], poison: Sequence[PoisonRow], columns: Sequence[str]
) -> Iterator[Block | None]:
    """Blocks whose poison rows are null in the decoder's columns, and noted in `Block.poison`."""
    by_shard: dict[int, dict[int, PoisonRow]] = {}
    for row in poison:
        if row.group_rows is not None:  # of such a group there is no block
            continue
        by_shard.setdefault(row.shard, {})[row.row] = row
    for block in blocks:
        found = {}
        if block is not None and block.shard.index in by_shard:
            ours = by_shard[block.shard.index]
            slots = {row - block.first_row: why for row, why in ours.items()}
            found = {slot: slots[slot] for slot in slots if 0 <= slot < block.rows.num_rows}
        yield _masked(block, found, columns) if block is not None and found else block


def _masked(block: Block, found: Mapping[int, PoisonRow], columns: Sequence[str]) -> Block:
    bad_rows = {
        slot: BadRow(
            stage=STAGE,
            reason=row.reason,
            message=row.message,
            sha256=digest_of(block.rows.slice(slot, 1).select(list(columns))),
        )
        for slot, row in found.items()
    }
    mask = np.zeros(block.rows.num_rows, bool)
    mask[list(found)] = True
    return dataclasses.replace(
        block, rows=nulled(block.rows, mask, columns), poison=bad_rows | dict(block.poison)
    )


def nulled(rows: pa.RecordBatch, mask: np.ndarray, columns: Sequence[str]) -> pa.RecordBatch:
    """`rows` with nulls in `columns` where the mask says so: no decoder touches a null."""
    import pyarrow.compute as pc  # 0.06 s, which most nights do not need

    chosen = pa.array(mask)
    for name in columns:
        column = rows.column(name)
        nulls = pa.nulls(rows.num_rows, column.type)
        field = pa.field(name, column.type)
        masked = pc.if_else(chosen, nulls, column)
        rows = rows.set_column(rows.schema.get_field_index(name), field, masked)
    return rows


def try_suspects(
    suspects: Sequence[Suspect],
    tools: ScoringTools,
    score: Callable[[Iterable[Block]], Iterable[object]],
    on_cleared: Callable[[], None],
) -> None:
    """Score each suspect alone. Whoever reads the marks learns which one this process dies of.

    Args:
        suspects: In the order in which they are tried; those of a shard are together.
        tools: What they are scored with; what is warmed up by rows without content.
        score: Decodes and infers blocks; what comes out is thrown away.
        on_cleared: Is told after each one that this process survives.
    """
    columns, is_warm = tools.decoder.columns, False
    for suspect in suspects:  # those that were being read come first
        if suspect.is_read:
            _try_reading(suspect.shard, tools)
            on_cleared()
    in_blocks = [suspect for suspect in suspects if not suspect.is_read]
    for shard, of_shard in groupby(in_blocks, key=lambda suspect: suspect.shard):
        for suspect, block in _rows_of(shard, list(of_shard), tools):
            if not is_warm:
                everything = np.ones(block.rows.num_rows, bool)
                empty = dataclasses.replace(block, rows=nulled(block.rows, everything, columns))
                deque(score([empty]), maxlen=0)
                is_warm = True
            where = suspect.shard.index, suspect.first_row
            tools.marks.begin(*where, suspect.num_rows, is_trial=True)
            try:
                deque(score([block]), maxlen=0)
            except CudaError:  # the device is lost to this process
                raise
            except Exception:  # an engine that refuses a row survives it
                pass
            tools.marks.end(*where)
            on_cleared()


def lost_to_reading(shard: Shard, poison: Sequence[PoisonRow]) -> tuple[LostRows, ...]:
    """Rows of a shard that are not read because reading them has ended a process."""
    return tuple(
        LostRows(
            first_row=row.row,
            num_rows=row.group_rows,
            reason=UNREADABLE,
            message=f"reading it ends the process: {row.reason}, {row.message}",
        )
        for row in sorted(poison, key=lambda row: row.row)
        if row.shard == shard.index and row.group_rows is not None
    )


def _try_reading(shard: Shard, tools: ScoringTools) -> None:
    """Read each row group of a shard alone, except those that are known to do harm."""
    known = {lost.first_row for lost in lost_to_reading(shard, tools.poison)}
    for group in groups_of(shard, tools.source):
        first_row = group.first_row - shard.first_row
        if first_row not in known:
            where = shard.index, first_row
            tools.marks.begin(*where, group.num_rows, is_trial=True, is_read=True)
            deque(tools.read_unmarked([group]), maxlen=0)
            tools.marks.end(*where, is_read=True)


def _rows_of(
    shard: Shard, suspects: Sequence[Suspect], tools: ScoringTools
) -> Iterator[tuple[Suspect, Block]]:
    """The rows of each suspect as a block; a block that was in work is one that was read.

    Without the rows that are known to do harm: they would end this process, too.
    """
    wanted = deque(sorted(suspects, key=lambda suspect: suspect.first_row))
    for block in keep_poison_out(tools.read([shard]), tools.poison, tools.decoder.columns):
        assert block is not None
        end = block.first_row + block.rows.num_rows
        while wanted and wanted[0].first_row < end:
            suspect = wanted.popleft()
            rows = block.rows.slice(suspect.first_row - block.first_row, suspect.num_rows)
            first_row = suspect.first_row
            yield suspect, dataclasses.replace(block, first_row=first_row, rows=rows, poison={})
        if not wanted:
            return
