"""Read shards as blocks of rows, and notice when a file is not the one that was planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.blocks import BadRow, Block
from pipeline.errors import InputChangedError, InputError, one_line
from pipeline.plan import Plan, Shard
from pipeline.storage import Storage
from pipeline.store_errors import named

UNREADABLE = "row_group_unreadable"


def read_blocks(
    shards: Iterable[Shard | None],
    source: Storage,
    columns: Sequence[str],
    block_rows: int,
    *,
    use_threads: bool = True,
) -> Iterator[Block | None]:
    """Blocks of at most `block_rows` rows, shard after shard, in row order.

    None among the shards says that there is none for now; it is passed on, so that the stages
    behind finish what they hold instead of waiting for more.

    Args:
        shards: What is read.
        source: Where from.
        columns: Columns of the rows.
        block_rows: Most rows of a block.
        use_threads: Decode columns on all cores; otherwise in the calling thread.

    A damaged row group comes as rows without content, each already judged (`Block.poison`). Its
    shard then begins anew with row 0: pyarrow may have delivered wrong rows before it noticed.

    Raises:
        StoreUnavailableError: The bytes of a file cannot be had for now.
        InputChangedError: A file's size or version is not the planned one.
        InputError: A file cannot be read, or has other rows than its footer promised.
    """
    for shard in shards:
        if shard is None:
            yield None
            continue
        _check_pin(shard, source)
        num_rows = 0
        try:
            with source.open(shard.file.path) as file:
                for rows in _open(file).iter_batches(
                    block_rows,
                    row_groups=list(shard.row_groups),
                    columns=list(columns),
                    use_threads=use_threads,
                ):
                    if rows.num_rows:
                        yield Block(shard=shard, first_row=num_rows, rows=rows)
                        num_rows += rows.num_rows
        except (pa.ArrowException, OSError):
            pass  # what is wrong comes out below; pyarrow also ends early without an error
        if num_rows != shard.num_rows:
            yield from _read_group_by_group(shard, source, columns, block_rows)
        _check_pin(shard, source)


def _open(file: Any) -> pq.ParquetFile:
    return pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)


def _read_group_by_group(
    shard: Shard, source: Storage, columns: Sequence[str], block_rows: int
) -> Iterator[Block]:
    where = f"{source.uri}/{shard.file.path}"
    _check_pin(shard, source)  # another file is not a damaged one
    try:
        with named(where), source.open(shard.file.path) as file:
            parquet = _open(file)
            sizes = [parquet.metadata.row_group(group).num_rows for group in shard.row_groups]
            if sum(sizes) != shard.num_rows:
                raise InputError(
                    f"{where}: {sum(sizes)} rows in row groups {shard.row_groups}; expected "
                    f"{shard.num_rows}, as when the run was planned. Write the file again."
                )
            first_row = 0
            for group, num_rows in zip(shard.row_groups, sizes, strict=True):
                try:
                    table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
                    if len(table) != num_rows:
                        raise pa.ArrowInvalid(f"{len(table)} rows of {num_rows}")
                    bad_row = None
                except (pa.ArrowException, OSError) as error:
                    _read_bytes(file, parquet.metadata.row_group(group))
                    table = _without_content(parquet.schema_arrow, columns, num_rows)
                    bad_row = BadRow(
                        stage="read",
                        reason=UNREADABLE,
                        message=f"row group {group}: {one_line(error)}",
                        sha256="",
                    )
                for rows in table.combine_chunks().to_batches(block_rows):
                    poison = dict.fromkeys(range(rows.num_rows), bad_row) if bad_row else {}
                    yield Block(shard=shard, first_row=first_row, rows=rows, poison=poison)
                    first_row += rows.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{where}: it cannot be read ({one_line(error)}); expected the Parquet file that was "
            "planned. Write it again."
        ) from error


def _read_bytes(file: Any, group: Any) -> None:
    """Raise what the store raises: a row group is damaged only if its bytes can be had."""
    for index in range(group.num_columns):
        column = group.column(index)
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.read(column.total_compressed_size)


def _without_content(schema: pa.Schema, columns: Sequence[str], num_rows: int) -> pa.Table:
    return pa.table({name: pa.nulls(num_rows, schema.field(name).type) for name in columns})


def _check_pin(shard: Shard, source: Storage) -> None:
    pinned, now = shard.file, source.info(shard.file.path)
    if now is None or (now.num_bytes, now.version) != (pinned.num_bytes, pinned.version):
        found = "gone" if now is None else f"{now.num_bytes} bytes, version {now.version}"
        raise InputChangedError(
            f"{source.uri}/{pinned.path}: {found}; expected {pinned.num_bytes} bytes, version "
            f"{pinned.version}, as when the run was planned. Run again to score the new data."
        )


def sample_rows(
    plan: Plan, source: Storage, columns: Sequence[str], num_rows: int, seed: int
) -> pa.Table:
    """About `num_rows` rows from randomly chosen row groups all over the input, shuffled.

    Rows of one row group are often alike (one user, one hour), so each group gives only a few.
    Damaged groups are left out.

    Raises:
        InputError: No group can be read.
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
            with named(f"{source.uri}/{pinned.path}"), source.open(pinned.path) as file:
                table = _open(file).read_row_group(group, columns=list(columns))
        except (pa.ArrowException, OSError) as error:  # who scores it quarantines it
            damaged = error
            continue
        sampled.append(table.take(rng.permutation(len(table))[:per_group]))
    if not sampled:
        raise InputError(
            f"{source.uri}: no row group can be read ({one_line(damaged)}); expected intact "
            "Parquet pages. Write the files again."
        )
    table = pa.concat_tables(sampled)
    return table.take(rng.permutation(len(table))[:num_rows])


MAX_SAMPLED_GROUPS = 32
"""Row groups that a sample reads: a whole group is read for a few of its rows."""
