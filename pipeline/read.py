"""Read shards as blocks of rows, and notice when a file is not the one that was planned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engines.in_order import map_ahead
from pipeline.blocks import BadRow, Block
from pipeline.errors import InputError, one_line
from pipeline.footers import check_pin
from pipeline.plan import LostRows, Plan, Shard
from pipeline.row_groups import (
    MAX_GROUP_BYTES,
    PARQUET_ERRORS,
    batches,
    begin_reading,
    open_parquet,
    rows_at,
    why_lost,
    why_too_large,
)
from pipeline.storage import Storage
from pipeline.store_errors import named

STAGE = "read"
SHARDS_AHEAD = 8
"""That are looked for in the ledger, and then opened, side by side where each request waits for a
network: small files come as fast as large ones. What comes of them is bounded by
`read_ahead.AHEAD_BYTES`."""
Reading = Callable[[Shard], AbstractContextManager[object]]
MAX_SAMPLED_GROUPS = 32
"""Row groups that a sample reads: a whole group is read for a few of its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """A shard, and its file, where nothing speaks against reading all row groups together."""

    shard: Shard
    file: BinaryIO | None = None
    parquet: pq.ParquetFile | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReader:
    """Reads shards as blocks of rows."""

    source: Storage
    """Where from."""
    columns: Sequence[str]
    """Of the rows."""
    block_rows: int
    """Most rows of a block."""
    max_group_bytes: int = MAX_GROUP_BYTES
    """Row groups that promise more are not read."""
    use_threads: bool = True
    """Decode columns on all cores; otherwise in the calling thread."""
    reading: Reading = nullcontext
    """Entered whenever a shard's file is opened or read, by several threads."""

    def blocks(
        self, shards: Iterable[Shard | None], is_over: Callable[[], bool] = lambda: False
    ) -> Iterator[Block | None]:
        """Blocks of at most `block_rows` rows, shard after shard, in row order.

        None among the shards says that there is none for now; it is passed on, so that the stages
        behind finish what they hold instead of waiting for more.

        A row group that is damaged, or too large, costs its rows: none of them is in a block, and
        the blocks' shard says so (`Shard.lost`). It is noticed while the shard is read, which then
        begins anew with another `Shard`: pyarrow may have delivered wrong rows before. A shard that
        is lost as a whole travels as one row without content, for the columns of its part.

        Args:
            shards: What is read; far away, several are drawn before the first of them is read.
            is_over: Says, before each of them, whether no other is to be begun.

        Raises:
            StoreUnavailableError: The bytes of a file cannot be had for now.
            InputChangedError: A file's size or version is not the planned one.
            InputError: A file cannot be read, or has other rows than its footer promised.
        """
        files: set[BinaryIO] = set()

        def open_shard(shard: Shard) -> _Opened:
            opened = self._open(shard)
            if opened.file is not None:
                files.add(opened.file)
            return opened

        num_ahead = SHARDS_AHEAD if self.source.is_far else 0
        try:
            with closing(map_ahead(open_shard, shards, num_ahead)) as several:
                for opened in several:
                    if is_over():
                        return
                    if opened is None:
                        yield None
                        continue
                    yield from self._blocks_of(opened)
                    if opened.file is not None:
                        files.remove(opened.file)
        finally:  # those that were opened ahead, and are not read
            for file in files:
                file.close()

    def _open(self, shard: Shard) -> _Opened:
        self._check_pin(shard)
        with self.reading(shard), ExitStack() as opening, suppress(*PARQUET_ERRORS):
            # What is wrong comes out later.
            if not shard.lost:
                file = self.source.open(shard.file.path, shard.file)
                opening.enter_context(file)
                parquet = open_parquet(file)
                for group in shard.row_groups:
                    if why_too_large(file, parquet, group, self.columns, self.max_group_bytes):
                        return _Opened(shard=shard)
                begin_reading(file, parquet, shard.row_groups, self.columns)
                opening.pop_all()
                return _Opened(shard=shard, file=file, parquet=parquet)
        return _Opened(shard=shard)

    def _blocks_of(self, opened: _Opened) -> Iterator[Block]:
        """All blocks of a shard."""
        with self.reading(opened.shard):
            is_whole = yield from self._at_once(opened)
            if not is_whole:
                yield from self._group_by_group(opened.shard)
        self._check_pin(opened.shard)

    def _check_pin(self, shard: Shard) -> None:
        if not self.source.is_far:  # or each request has asked for the planned version
            check_pin(shard.file, self.source)

    def _at_once(self, opened: _Opened) -> Generator[Block, None, bool]:
        """All row groups together; False: not every row came, so that nothing of it counts.

        The last block comes only when it is known to be the last one: a shard is complete with it.
        """
        shard = opened.shard
        if opened.file is None or opened.parquet is None:
            return False
        held: Block | None = None
        num_rows = 0
        try:
            with opened.file:
                for rows in self._batches(opened.parquet, shard.row_groups):
                    if num_rows + rows.num_rows > shard.num_rows:
                        return False
                    if held is not None:
                        yield held
                    held = Block(shard=shard, first_row=num_rows, rows=rows)
                    num_rows += rows.num_rows
        except PARQUET_ERRORS:
            return False  # what is wrong comes out later; pyarrow also ends early without an error
        if held is None or num_rows != shard.num_rows:
            return False
        yield held
        return True

    def _group_by_group(self, shard: Shard) -> Iterator[Block]:
        """Find out which row groups are lost, then read the others."""
        where = f"{self.source.uri}/{shard.file.path}"
        check_pin(shard.file, self.source)  # another file is not a damaged one
        try:
            with named(where), self.source.open(shard.file.path, shard.file) as file:
                parquet = open_parquet(file)
                sizes = [parquet.metadata.row_group(group).num_rows for group in shard.row_groups]
                if sum(sizes) != shard.num_rows:
                    raise InputError(
                        f"{where}: {sum(sizes)} rows in row groups {shard.row_groups}; expected "
                        f"{shard.num_rows}, as when the run was planned. Write the file again."
                    )
                known = {lost.first_row: (lost.reason, lost.message) for lost in shard.lost}
                good: dict[int, int] = {}
                lost: list[LostRows] = []
                first_row = 0
                for group, num_rows in zip(shard.row_groups, sizes, strict=True):
                    why = known.get(first_row) if num_rows else None
                    if why is None:
                        why = why_lost(file, parquet, group, self.columns, self.max_group_bytes)
                    if why is None:
                        good[group] = first_row
                    elif num_rows:
                        lost.append(_lost(first_row, num_rows, *why))
                    first_row += num_rows
                judged = dataclasses.replace(shard, lost=tuple(lost))
                begin_reading(file, parquet, tuple(good), self.columns)
                yield from self._rest(parquet, judged, good)
        except PARQUET_ERRORS as error:
            raise InputError(
                f"{where}: it cannot be read ({one_line(error)}); expected the Parquet file that "
                "was planned. Look at the store, and run the same command again."
            ) from error

    def _rest(self, parquet: pq.ParquetFile, shard: Shard, good: dict[int, int]) -> Iterator[Block]:
        """Blocks of the groups in `good`, by their first rows; they have been read once before."""
        if shard.end_row == 0:
            yield _no_rows(parquet.schema_arrow, shard, self.columns)
            return
        for group, first_row in good.items():
            for rows in self._batches(parquet, [group]):
                yield Block(shard=shard, first_row=first_row, rows=rows)
                first_row += rows.num_rows

    def _batches(self, parquet: pq.ParquetFile, groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
        return batches(parquet, groups, self.columns, self.block_rows, use_threads=self.use_threads)


def groups_of(shard: Shard, source: Storage) -> list[Shard]:
    """Each row group of a shard that has rows, as if it were a shard of its own."""
    with source.open(shard.file.path, shard.file) as file:
        metadata = open_parquet(file).metadata
        sizes = [metadata.row_group(group).num_rows for group in shard.row_groups]
    firsts = itertools.accumulate(sizes, initial=shard.first_row)
    return [
        dataclasses.replace(shard, row_groups=(group,), first_row=first, num_rows=size)
        for group, first, size in zip(shard.row_groups, firsts, sizes, strict=False)
        if size
    ]


def _lost(first_row: int, num_rows: int, reason: str, message: str) -> LostRows:
    return LostRows(first_row=first_row, num_rows=num_rows, reason=reason, message=message)


def _no_rows(schema: pa.Schema, shard: Shard, columns: Sequence[str]) -> Block:
    """What stands for a shard of which nothing is left: one row without content, judged already."""
    nulls = {name: pa.nulls(1, schema.field(name).type) for name in columns}
    why = shard.lost[0]
    bad_row = BadRow(stage=STAGE, reason=why.reason, message=why.message, sha256="")
    rows = pa.RecordBatch.from_pydict(nulls)
    return Block(shard=shard, first_row=0, rows=rows, poison={0: bad_row})


def sample_rows(
    plan: Plan,
    source: Storage,
    columns: Sequence[str],
    num_rows: int,
    seed: int,
    max_group_bytes: int = MAX_GROUP_BYTES,
) -> pa.Table:
    """About `num_rows` rows from randomly chosen row groups all over the input, shuffled.

    Rows of one row group are often alike (one user, one hour), so each group gives only a few.
    Damaged groups are left out, and those that promise more than `max_group_bytes`.

    Raises:
        InputError: No group can be read, or files have columns that cannot be one.
    """
    rng = np.random.default_rng(seed)
    groups = [(shard.file, group) for shard in plan.shards for group in shard.row_groups]
    rng.shuffle(groups)
    per_group = max(1, -(-num_rows // min(len(groups), MAX_SAMPLED_GROUPS)))
    sampled: list[pa.Table] = []
    damaged: Exception = InputError("nothing was planned")
    for pinned, group in groups:
        if sum(len(table) for table in sampled) >= num_rows:
            break
        try:
            where = f"{source.uri}/{pinned.path}"
            with named(where), source.open(pinned.path, pinned) as file:
                parquet = open_parquet(file)
                if too_large := why_too_large(file, parquet, group, columns, max_group_bytes):
                    raise pa.ArrowInvalid(too_large)
                sampled.append(_some_rows(file, parquet, group, columns, per_group, rng))
        except PARQUET_ERRORS as error:  # who scores it quarantines it
            damaged = error
    if not sampled:
        raise InputError(
            f"{source.uri}: no row group can be read ({one_line(damaged)}); expected intact "
            "Parquet pages. Write the files again."
        )
    try:
        table = pa.concat_tables(sampled, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"{source.uri}: {one_line(error)}; expected columns that are alike in all files. "
            "Write the files again."
        ) from None
    return table.take(rng.permutation(len(table))[:num_rows])


def _some_rows(
    file: BinaryIO,
    parquet: pq.ParquetFile,
    group: int,
    columns: Sequence[str],
    num_rows: int,
    rng: np.random.Generator,
) -> pa.Table:
    """Up to `num_rows` rows of a row group."""
    promised = parquet.metadata.row_group(group).num_rows
    chosen = rng.choice(promised, min(num_rows, promised), replace=False, shuffle=False)
    return rows_at(file, parquet, group, columns, np.sort(chosen))
