"""The plan of a run: pinned input files and balanced shards, from Parquet footers alone."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Job
from pipeline.errors import ConfigError, InputError, one_line
from pipeline.storage import FileInfo, Storage
from pipeline.store_errors import named

FOOTER_GUESS_BYTES = 1 << 16
"""Read at once from a file's end; most footers fit, so that one request is enough."""
PARQUET_MAGIC = b"PAR1"
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
class Shard:
    """Consecutive row groups of one input file: the unit of work, of retry and of commit."""

    index: int
    """Position in the run, from 0; names the part and the commit record."""
    file: PinnedFile
    row_groups: tuple[int, ...]
    first_row: int
    """Index within the file of the shard's first row."""
    num_rows: int

    @property
    def name(self) -> str:
        """`00017`: sorts like the index."""
        return f"{self.index:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one run of a job will score."""

    job: str
    date: str
    files: tuple[PinnedFile, ...]
    shards: tuple[Shard, ...]
    num_rows: int
    feature_columns: tuple[str, ...]
    """Expanded from the globs of the job; empty for images."""
    num_features: int
    """Width of the engine's input: columns, or the length of the fixed-size list."""

    @property
    def input_fingerprint(self) -> str:
        """sha256 over the pinned files: equal only for equal input."""
        return _digest([asdict(file) for file in self.files])


def partition_of(job: Job, date: str) -> str:
    """Sub-folder of the input that holds one date."""
    return (job.input.partition or "").replace("{date}", date)


def make_plan(job: Job, date: str, source: Storage) -> Plan:
    """Find the date's files, pin them, check their columns and cut them into shards.

    Raises:
        InputError: No rows for the date, or a file that is not Parquet.
        ConfigError: A column of the job that the files do not have, or of the wrong type.
    """
    folder = partition_of(job, date)
    infos = [info for info in source.list_files(folder) if _is_data(info.path)]
    where = f"{source.uri}/{folder}".rstrip("/")
    if not infos:
        raise InputError(
            f"{where}: no *.parquet files for {date}; expected the rows of that date. "
            "Check the date, `input.uri` and `input.partition`."
        )
    _, schema = _read_footer(source, infos[0])
    columns = _feature_columns(job, schema, f"{source.uri}/{infos[0].path}")
    num_features = _num_features(schema, columns)

    def read(info: FileInfo) -> _Footer:
        footer, found = _read_footer(source, info)
        where = f"{source.uri}/{info.path}"
        _check_columns(job, columns, found, where)
        if _num_features(found, columns) != num_features:
            raise ConfigError(
                f"{where}: {_num_features(found, columns)} features; expected {num_features}, as "
                f"in {infos[0].path}. Write the file again."
            )
        return footer

    with ThreadPoolExecutor(NUM_FOOTER_READERS) as pool:
        footers = list(pool.map(read, infos))
    files = tuple(footer.file for footer in footers)
    num_rows = sum(file.num_rows for file in files)
    if num_rows == 0:
        raise InputError(f"{where}: 0 rows in {len(files)} files; expected rows to score.")
    shards: list[Shard] = []
    for footer in footers:
        shards += _cut(footer, job.shard_rows, first_index=len(shards))
    return Plan(
        job=job.name,
        date=date,
        files=files,
        shards=tuple(shards),
        num_rows=num_rows,
        feature_columns=columns,
        num_features=num_features,
    )


def run_id_of(
    plan: Plan, job: Job, engine_key: str, class_names: Sequence[str] = (), version: int = 1
) -> str:
    """The id of a run: a function of job, date and all that decides what its output says.

    A run that was interrupted finds its ledger under this id; another input, engine or output
    layout gives another id, so that they are never mixed. A forced run of a published date has the
    `version` that it will be: it must not find the ledger of what it replaces.
    """
    pins = {
        "job": plan.job,
        "date": plan.date,
        "input": plan.input_fingerprint,
        "shards": [[shard.file.path, shard.row_groups] for shard in plan.shards],
        "reading": job.input.model_dump(exclude={"uri"}),
        "model": job.model.model_dump(),
        "compression": job.output.compression,
        "engine": engine_key,
        # Decoders differ by a level here and there.
        "decoders": [job.lanes.gpu_decode.enabled, job.lanes.cpu_decoder],
        "class_names": list(class_names),
        **({"version": version} if version > 1 else {}),
    }
    return f"{plan.date}-{_digest(pins)[:12]}"


def shuffled(shards: Sequence[Shard], seed: str) -> tuple[Shard, ...]:
    """The shards in an order of one's own, for one of several attempts at a run.

    Attempts that work at once then rarely meet at a shard, and pass over what others committed:
    two scored 414 of 400 shards, and sixteen 576, with three in work at a time each. In the same
    order, or from different points of a circle, they meet and go on side by side to the end.
    """
    return tuple(random.Random(seed).sample(shards, len(shards)))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_data(path: str) -> bool:
    """Like Spark and pyarrow: names that begin with `_` or `.` are not data."""
    hidden = any(part.startswith(("_", ".")) for part in path.split("/"))
    return path.endswith((".parquet", ".parq", ".pq")) and not hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class _Footer:
    """What the plan keeps of a file's footer: its column chunks are a thousand times as much."""

    file: PinnedFile
    group_rows: tuple[int, ...]


def _read_footer(source: Storage, info: FileInfo) -> tuple[_Footer, pa.Schema]:
    where = f"{source.uri}/{info.path}"
    with named(where), source.open(info.path) as file:
        footer = _footer_bytes(file, info.num_bytes, FOOTER_GUESS_BYTES, where)
    try:
        # The metadata are at the end: a footer alone, between magic bytes, parses as a file.
        # Its `schema` would make a cycle with the metadata, and so keep megabytes for a while.
        with pq.ParquetFile(pa.BufferReader(PARQUET_MAGIC + footer)) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{where}: damaged Parquet footer ({one_line(error)}); expected a Parquet file."
        ) from None
    pinned = PinnedFile(
        path=info.path,
        num_bytes=info.num_bytes,
        version=info.version,
        footer_sha256=hashlib.sha256(footer).hexdigest(),
        num_rows=metadata.num_rows,
    )
    sizes = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return _Footer(file=pinned, group_rows=sizes), schema


def _footer_bytes(file: Any, num_bytes: int, guess_bytes: int, where: str) -> bytes:
    tail_bytes = min(num_bytes, guess_bytes)
    file.seek(num_bytes - tail_bytes)
    tail: bytes = file.read(tail_bytes)
    if len(tail) < 12 or tail[-4:] != PARQUET_MAGIC:
        raise InputError(
            f"{where}: no Parquet magic bytes at its end; expected a Parquet file. "
            "Remove it from the dataset or write it again."
        )
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if footer_bytes > num_bytes:
        raise InputError(f"{where}: the footer is longer than the file; expected a Parquet file.")
    if footer_bytes > tail_bytes:
        return _footer_bytes(file, num_bytes, footer_bytes, where)
    return tail[-footer_bytes:]


def _feature_columns(job: Job, schema: pa.Schema, where: str) -> tuple[str, ...]:
    if job.input.features is None:
        return ()
    columns: list[str] = []
    for pattern in job.input.features.columns:
        found = [name for name in schema.names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise _missing_column(pattern, schema, where, "input.features.columns")
        columns += [name for name in found if name not in columns]
    return tuple(columns)


def _check_columns(job: Job, features: tuple[str, ...], schema: pa.Schema, where: str) -> None:
    label = job.engine.gate.label
    wanted = [(name, "input.passthrough") for name in job.input.passthrough]
    wanted += [(label, "engine.gate.label")] if label else []
    wanted += [(name, "input.features.columns") for name in features]
    for name, key in wanted:
        if name not in schema.names:
            raise _missing_column(name, schema, where, key)
    if job.input.images:
        name = job.input.images.column
        if name not in schema.names:
            raise _missing_column(name, schema, where, "input.images.column")
        kind = schema.field(name).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected binary with encoded images. "
                "Check `input.images.column`."
            )
    for name in features:
        kind = schema.field(name).type
        if pa.types.is_fixed_size_list(kind) and len(features) == 1:
            kind = kind.value_type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected numbers, or one column of "
                "fixed-size lists. Check `input.features.columns`."
            )


def _missing_column(name: str, schema: pa.Schema, where: str, key: str) -> ConfigError:
    close = difflib.get_close_matches(name, schema.names, n=1)
    hint = f"Did you mean `{close[0]}`?" if close else f"It has: {', '.join(schema.names[:8])}."
    return ConfigError(f"{where}: no column `{name}`; expected it because of `{key}`. {hint}")


def _num_features(schema: pa.Schema, columns: tuple[str, ...]) -> int:
    if len(columns) == 1:
        kind = schema.field(columns[0]).type
        return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 1
    return len(columns)


def _cut(footer: _Footer, target_rows: int, *, first_index: int) -> list[Shard]:
    """Cut a file into shards of about `target_rows`, as equal as its row groups allow."""
    file, sizes = footer.file, footer.group_rows
    num_shards = max(1, round(sum(sizes) / target_rows))
    shards: list[Shard] = []
    groups: list[int] = []
    first_row = seen_rows = 0
    for group, size in enumerate(sizes):
        groups.append(group)
        seen_rows += size
        # The k-th shard ends with the row group that reaches k equal shares of the file.
        is_last = group == len(sizes) - 1
        if seen_rows * num_shards >= (len(shards) + 1) * file.num_rows or is_last:
            if seen_rows > first_row:
                shards.append(
                    Shard(
                        index=first_index + len(shards),
                        file=file,
                        row_groups=tuple(groups),
                        first_row=first_row,
                        num_rows=seen_rows - first_row,
                    )
                )
            groups, first_row = [], seen_rows
    return shards
