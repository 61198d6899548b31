"""Footers of Parquet files: what a plan needs of each, or why the file cannot be read at all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputChangedError, one_line
from pipeline.report import UnreadableFile
from pipeline.storage import FileInfo, Storage
from pipeline.store_errors import named

FOOTER_GUESS_BYTES = 1 << 16
"""Read at once from a file's end; most footers fit, so that one request is enough."""
MAX_FOOTER_BYTES = 64 << 20
"""One that is made to be harmful takes up to a thousand times its size in memory, in structures of
three bytes each; a true one takes about ten times."""
LARGE_FOOTER_BYTES = 1 << 18
"""Larger ones are parsed one after the other."""
MAX_LIST_ITEMS = 1_000_000
"""Row groups of a file, or columns of a row group: Arrow's own limit."""
PARQUET_MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
NUM_FOOTER_READERS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedFile:
    """One input file as it was when the run was planned (R2)."""

    path: str
    """Relative to the input's root."""
    num_bytes: int
    version: str
    """ETag, or modification time in ns."""
    footer_sha256: str
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Footer:
    """What the plan keeps of a file's footer: its column chunks are a thousand times as much."""

    file: PinnedFile
    group_rows: tuple[int, ...]
    schema: pa.Schema
    """The same object for files that have equal ones."""


_one_large_footer = threading.Lock()


class _DamagedError(Exception):
    """What is wrong with a file, in a few words."""


def read_footers(source: Storage, infos: Sequence[FileInfo]) -> list[Footer | UnreadableFile]:
    """The footers of some files, in order.

    Raises:
        InputChangedError: A file has fewer bytes than when it was listed.
        StoreUnavailableError: The store failed, which says nothing about the file.
    """
    schemas: dict[pa.Schema, pa.Schema] = {}

    def read(info: FileInfo) -> Footer | UnreadableFile:
        try:
            return _read_footer(source, info, schemas)
        except _DamagedError as damage:
            return UnreadableFile(
                path=info.path,
                num_bytes=info.num_bytes,
                version=info.version,
                message=str(damage),
            )

    with ThreadPoolExecutor(NUM_FOOTER_READERS) as pool:
        return list(pool.map(read, infos))


def check_pin(pinned: PinnedFile | UnreadableFile, source: Storage) -> None:
    """Raise InputChangedError unless a file is the one that was planned."""
    _check_same(pinned, source.info(pinned.path), source.uri)


def check_pins(
    files: Iterable[PinnedFile | UnreadableFile], source: Storage, listed: Iterable[FileInfo]
) -> None:
    """The same for many files that were listed just now; others may have come meanwhile."""
    now = {info.path: info for info in listed}
    for file in files:
        _check_same(file, now.get(file.path), source.uri)


def _check_same(pinned: PinnedFile | UnreadableFile, now: FileInfo | None, root: str) -> None:
    if now is None or (now.num_bytes, now.version) != (pinned.num_bytes, pinned.version):
        found = "gone" if now is None else f"{now.num_bytes} bytes, version {now.version}"
        raise InputChangedError(
            f"{root}/{pinned.path}: {found}; expected {pinned.num_bytes} bytes, version "
            f"{pinned.version}, as when the run was planned. Run again to score the new data."
        )


def _read_footer(source: Storage, info: FileInfo, schemas: dict[pa.Schema, pa.Schema]) -> Footer:
    with named(f"{source.uri}/{info.path}"), source.open(info.path, info) as file:
        footer = _footer_bytes(file, info, FOOTER_GUESS_BYTES, source.uri)
    with _one_large_footer if len(footer) > LARGE_FOOTER_BYTES else nullcontext():
        num_rows, sizes, schema = _parse(footer)
    if min(sizes, default=0) < 0 or sum(sizes) != num_rows:
        raise _DamagedError(f"damaged footer ({num_rows} rows, and {sum(sizes)} in its row groups)")
    pinned = PinnedFile(
        path=info.path,
        num_bytes=info.num_bytes,
        version=info.version,
        footer_sha256=hashlib.sha256(footer).hexdigest(),
        num_rows=num_rows,
    )
    return Footer(file=pinned, group_rows=sizes, schema=schemas.setdefault(schema, schema))


def _parse(footer: bytes) -> tuple[int, tuple[int, ...], pa.Schema]:
    """Rows of the file, those of each row group, and the schema."""
    try:
        # The metadata are at the end: a footer alone, between magic bytes, parses as a file.
        # Its `schema` would make a cycle with the metadata, and so keep megabytes for a while.
        with pq.ParquetFile(
            pa.BufferReader(PARQUET_MAGIC + footer),
            # Memory for a list is taken before its items are there: some hundred bytes for each.
            thrift_container_size_limit=min(len(footer), MAX_LIST_ITEMS),
        ) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
        sizes = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        schema.names  # noqa: B018  # names that are no text are found here, and not at night
    except pa.ArrowNotImplementedError as error:  # damage can look so, too
        raise _DamagedError(
            f"a footer with a type that pyarrow cannot read ({one_line(error)})"
        ) from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _DamagedError(f"damaged footer ({one_line(error)})") from None
    return metadata.num_rows, sizes, schema


def _footer_bytes(file: Any, info: FileInfo, guess_bytes: int, root: str) -> bytes:
    """The footer with its length and the magic bytes behind it."""
    num_bytes = info.num_bytes
    tail_bytes = min(num_bytes, guess_bytes)
    file.seek(num_bytes - tail_bytes)
    tail: bytes = file.read(tail_bytes)
    if len(tail) < tail_bytes:
        raise InputChangedError(
            f"{root}/{info.path}: ends {tail_bytes - len(tail)} bytes early; expected {num_bytes} "
            "bytes, as it was listed. Run again to score what it is now."
        )
    if num_bytes == 0:
        raise _DamagedError("0 bytes")
    if tail[-4:] == ENCRYPTED_MAGIC:
        raise _DamagedError("its footer is encrypted")
    if len(tail) < 12 or tail[-4:] != PARQUET_MAGIC:
        raise _DamagedError("no Parquet magic bytes at its end")
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if footer_bytes > num_bytes:
        raise _DamagedError(f"a footer of {footer_bytes} bytes in a file of {num_bytes}")
    if footer_bytes > MAX_FOOTER_BYTES:
        raise _DamagedError(f"a footer of {footer_bytes} bytes, more than {MAX_FOOTER_BYTES}")
    if footer_bytes > tail_bytes:
        return _footer_bytes(file, info, footer_bytes, root)
    return tail[-footer_bytes:]
