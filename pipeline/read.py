"""Read shards as blocks of rows, and notice when a file is not the one that was planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.blocks import Block
from pipeline.errors import InputChangedError, InputError, one_line
from pipeline.plan import Plan, Shard
from pipeline.storage import Storage


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

    Raises:
        InputChangedError: A file's size or version is not the planned one.
        InputError: A file delivers other rows than its footer promised, or is damaged.
    """
    for shard in shards:
        if shard is None:
            yield None
            continue
        where = f"{source.uri}/{shard.file.path}"
        _check_pin(shard, source)
        num_read = 0
        try:
            with source.open(shard.file.path) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
                for rows in parquet.iter_batches(
                    block_rows,
                    row_groups=list(shard.row_groups),
                    columns=list(columns),
                    use_threads=use_threads,
                ):
                    if rows.num_rows == 0:
                        continue
                    yield Block(shard=shard, first_row=num_read, rows=rows)
                    num_read += rows.num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{where}: rows from {shard.first_row + num_read} cannot be read "
                f"({one_line(error)}); expected intact Parquet pages. Write the file again."
            ) from error
        # pyarrow delivers too few rows from some damaged files without an error.
        if num_read != shard.num_rows:
            raise InputError(
                f"{where}: {num_read} rows in row groups {shard.row_groups}; expected "
                f"{shard.num_rows}, as its footer says. Write the file again."
            )
        _check_pin(shard, source)


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
    """
    rng = np.random.default_rng(seed)
    groups = [(shard.file, group) for shard in plan.shards for group in shard.row_groups]
    rng.shuffle(groups)
    per_group = max(1, -(-num_rows // min(len(groups), MAX_SAMPLED_GROUPS)))
    sampled: list[pa.Table] = []
    for pinned, group in groups:
        if sum(len(table) for table in sampled) >= num_rows:
            break
        with source.open(pinned.path) as file:
            table = pq.ParquetFile(file, pre_buffer=False).read_row_group(
                group, columns=list(columns)
            )
        sampled.append(table.take(rng.permutation(len(table))[:per_group]))
    table = pa.concat_tables(sampled)
    return table.take(rng.permutation(len(table))[:num_rows])


MAX_SAMPLED_GROUPS = 32
"""Row groups that a sample reads: a whole group is read for a few of its rows."""
