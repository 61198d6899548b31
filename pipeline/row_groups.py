"""Row groups that are not read: those that are damaged, and those that would take all memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import one_line
from pipeline.read_ahead import Range, RangedFile

UNREADABLE, TOO_LARGE = "row_group_unreadable", "row_group_too_large"
"""Reasons for quarantine."""
DAMAGES = frozenset((UNREADABLE, TOO_LARGE))
"""A run with such rows is degraded: the input is damaged."""
GIB = 2**30
MAX_GROUP_BYTES = 4 * GIB
"""Most memory for a row group's columns where the job does not say, on a lane with twice as much.
Reading a group takes 1.1 times of what its columns promise, however small its blocks are (380 MiB
of JPEGs, of features, and of zeros that compress to nothing; pyarrow 26)."""
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, IndexError)
"""What pyarrow raises on damaged files; the store, too, raises OSError."""
PIECE_BYTES = 1 << 20
SAMPLED_BYTES = 8 << 20
"""Of a row group, by its footer, that are decoded together when a few rows are picked. A group of
32 MB in 1,000 columns took 1.2 s in pieces of 1 MiB, 0.5 s of 4 MiB and 0.3 s of 16 MiB."""
TRIAL_ROWS = 1 << 10
"""Rows that are looked at together to find out whether a group can be read."""
STREAM_BYTES = 1 << 6
"""Any size makes pyarrow open a chunk without reading it."""


def max_group_bytes(max_group_gib: float | None, lane_bytes: int) -> int:
    """Bytes of a row group's columns beyond which it is not read.

    Args:
        max_group_gib: As the job says, if it does.
        lane_bytes: Memory that a lane may take.
    """
    return int(max_group_gib * GIB) if max_group_gib else min(MAX_GROUP_BYTES, lane_bytes // 2)


def open_parquet(file: Any) -> pq.ParquetFile:
    """A Parquet file whose pages are checked against their checksums, where they have some."""
    return pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)


def batches(
    parquet: pq.ParquetFile,
    groups: Sequence[int],
    columns: Sequence[str],
    num_rows: int,
    *,
    use_threads: bool = False,
) -> Iterator[pa.RecordBatch]:
    """Rows of some row groups, at most `num_rows` at a time and never none.

    Text must be UTF-8: damage that no checksum tells would end up in parts, which other programs
    then cannot read. Numbers and times may be what they are: DuckDB has a time of 24:00:00.
    """
    for rows in parquet.iter_batches(
        num_rows, row_groups=list(groups), columns=list(columns), use_threads=use_threads
    ):
        if rows.num_rows:
            rows.validate()
            for column in rows.columns:
                column.validate(full=not pa.types.is_primitive(column.type))
            yield rows


def begin_reading(
    file: Any, parquet: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str]
) -> None:
    """Have the columns of some row groups fetched, where the file is far away.

    What a damaged footer promises is not: who reads it will see.
    """
    if not isinstance(file, RangedFile):
        return
    ranges: list[Range] = []
    for group in groups:
        with suppress(*PARQUET_ERRORS):
            chunks = _chunks(file, parquet, group, columns)
            ranges += [_range_of(chunk, file.num_bytes) for chunk in chunks]
    file.will_read(ranges)


def rows_at(
    file: Any,
    parquet: pq.ParquetFile,
    group: int,
    columns: Sequence[str],
    places: npt.NDArray[np.int64],
) -> pa.Table:
    """Some rows of a row group, of which only a piece is decoded at a time.

    Args:
        file: The file.
        parquet: The same.
        group: The row group.
        columns: Columns of the rows.
        places: Indices within the group, ascending; at least one.

    Raises:
        Exception: One of PARQUET_ERRORS; the group may have other rows than it promises.
    """
    begin_reading(file, parquet, [group], columns)
    promised = parquet.metadata.row_group(group)
    piece_rows = max(1, SAMPLED_BYTES * promised.num_rows // max(1, promised.total_byte_size))
    found: list[pa.RecordBatch] = []
    first = 0
    for rows in batches(parquet, [group], columns, piece_rows):
        end = first + rows.num_rows
        inside = places[(first <= places) & (places < end)] - first
        if len(inside):  # copied; and not by `take`: it imports Arrow's functions, 0.06 s
            found.append(pa.concat_batches([rows.slice(place, 1) for place in inside.tolist()]))
        first = end
    if first != promised.num_rows:
        raise pa.ArrowInvalid(f"row group {group}: {first} rows of {promised.num_rows}")
    return pa.Table.from_batches(found)


def why_too_large(
    file: Any, parquet: pq.ParquetFile, group: int, columns: Sequence[str], max_bytes: int
) -> str | None:
    """What a row group's footer promises, if it is more than `max_bytes`; None: it may be read.

    A footer that promises a million million rows promises as many values in memory: small pages do
    not make it harmless.

    Raises:
        OSError: One of the columns is encrypted.
    """
    promised = parquet.metadata.row_group(group)
    chunks = _chunks(file, parquet, group, columns)
    num_bytes = max(
        sum(chunk.total_uncompressed_size for chunk in chunks),
        sum(chunk.total_compressed_size for chunk in chunks),
        promised.num_rows * _row_bytes(parquet.schema_arrow, columns),
    )
    if num_bytes <= max_bytes:
        return None
    return (
        f"row group {group} promises {promised.num_rows:,} rows of {num_bytes / GIB:,.2f} GiB; at "
        f"most {max_bytes / GIB:,.2f} GiB are read (limits.max_group_gib)"
    )


def why_lost(
    file: Any, parquet: pq.ParquetFile, group: int, columns: Sequence[str], max_bytes: int
) -> tuple[str, str] | None:
    """Reason code and message, unless a row group can be read and has all rows that it promises.

    It is read to its end, and nothing of it is kept.

    Raises:
        OSError: The store failed: a group is damaged only if its bytes can be had.
    """
    try:
        too_large = why_too_large(file, parquet, group, columns, max_bytes)
    except PARQUET_ERRORS as error:
        return UNREADABLE, f"row group {group}: {one_line(error)}"
    if too_large:
        return TOO_LARGE, too_large
    wrong = _what_is_wrong(file, parquet, group, columns)
    if wrong:
        _read_bytes(file, _chunks(file, parquet, group, columns))
        # The store may have failed for a moment.
        wrong = _what_is_wrong(file, parquet, group, columns)
    return (UNREADABLE, f"row group {group}: {wrong}") if wrong else None


def _what_is_wrong(
    file: Any, parquet: pq.ParquetFile, group: int, columns: Sequence[str]
) -> str | None:
    num_rows, promised = 0, parquet.metadata.row_group(group).num_rows
    begin_reading(file, parquet, [group], columns)
    try:
        for rows in batches(parquet, [group], columns, TRIAL_ROWS):
            num_rows += rows.num_rows
    except PARQUET_ERRORS as error:
        return one_line(error)
    return None if num_rows == promised else f"{num_rows:,} rows of {promised:,} that it promises"


def _chunks(file: Any, parquet: pq.ParquetFile, group: int, columns: Sequence[str]) -> list[Any]:
    """What the footer says of a group's chunks of some columns; a nested column has several."""
    names, paths = set(columns), enumerate(parquet.reader.column_paths)
    wanted = [index for index, path in paths if not names.isdisjoint(_names_above(path))]
    # Asked what an encrypted chunk is like, pyarrow (26.0) ends the process. A reader of no rows
    # raises, and reads nothing: but for `pre_buffer`, which would fetch all chunks.
    unread = pq.ParquetFile(
        file, metadata=parquet.metadata, buffer_size=STREAM_BYTES, pre_buffer=False
    ).reader
    try:
        next(unread.iter_batches(0, [group], wanted, use_threads=False), None)
    except OSError as error:
        if "decrypt" in str(error):
            raise OSError("a column of the job is encrypted") from None
        raise
    promised = parquet.metadata.row_group(group)
    return [promised.column(index) for index in wanted]


def _names_above(path: Sequence[str]) -> Iterator[str]:
    """By which pyarrow reads a chunk: its column's, and those of the fields that it is in."""
    return itertools.accumulate(path, "{}.{}".format)


def _row_bytes(schema: pa.Schema, columns: Sequence[str]) -> float:
    """Memory of a row at least."""
    return sum(_value_bytes(schema.field(name).type) for name in columns)


def _value_bytes(kind: pa.DataType) -> float:
    if pa.types.is_fixed_size_list(kind):
        return float(kind.list_size * _value_bytes(kind.value_type))
    try:
        return float(kind.bit_width / 8)
    except ValueError:  # of variable length: it has an offset
        return 4.0


def _range_of(chunk: Any, file_bytes: int) -> Range:
    """Where a column chunk is, as far as the footer can be believed; (0, 0): nowhere."""
    places = (chunk.dictionary_page_offset, chunk.data_page_offset)
    begin = min((place for place in places if place), default=0)
    end = min(begin + chunk.total_compressed_size, file_bytes)
    return (begin, end) if 0 <= begin < end else (0, 0)


def _read_bytes(file: Any, chunks: Sequence[Any]) -> None:
    """Raise what the store raises. Where the footer tells nonsense there is nothing to be read."""
    file.seek(0, os.SEEK_END)
    file_bytes = file.tell()
    for chunk in chunks:
        begin = end = 0
        with suppress(*PARQUET_ERRORS):
            begin, end = _range_of(chunk, file_bytes)
        file.seek(begin)
        for start in range(begin, end, PIECE_BYTES):
            file.read(min(PIECE_BYTES, end - start))
