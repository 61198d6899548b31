"""The plan of a run: pinned input files and balanced shards, from Parquet footers alone."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import Job
from pipeline.delta_columns import check_delta_columns
from pipeline.errors import ConfigError, InputError
from pipeline.footers import Footer, PinnedFile, read_footers
from pipeline.paths import is_hidden
from pipeline.report import UnreadableFile
from pipeline.storage import FileInfo, Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class LostRows:
    """Consecutive rows that are not read: their row group is damaged, or too large."""

    first_row: int
    """Within the shard."""
    num_rows: int
    """As the footer promises: nobody has counted them."""
    reason: str
    """Short code, for counting."""
    message: str


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
    lost: tuple[LostRows, ...] = ()
    """In row order; found when the shard is read, or before. A plan knows of none."""

    @property
    def name(self) -> str:
        """`00017`: sorts like the index."""
        return f"{self.index:05d}"

    @property
    def end_row(self) -> int:
        """Within the shard: where the rows end that are not lost."""
        end = self.num_rows
        for lost in reversed(self.lost):
            if lost.first_row + lost.num_rows < end:
                break
            end = lost.first_row
        return end


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
    unreadable: tuple[UnreadableFile, ...] = ()
    """Files of the date that are no Parquet; their rows are in no shard and in no sum."""

    @property
    def input_fingerprint(self) -> str:
        """sha256 over the pinned files: equal only for equal input."""
        unreadable = [[file.path, file.num_bytes, file.version] for file in self.unreadable]
        return _digest([*(asdict(file) for file in self.files), *unreadable])

    @property
    def num_unreadable_rows(self) -> int:
        """How many rows unreadable files would have if theirs took as many bytes as all others."""
        num_bytes = sum(file.num_bytes for file in self.files)
        return round(sum(file.num_bytes for file in self.unreadable) * self.num_rows / num_bytes)


def partition_of(job: Job, date: str) -> str:
    """Sub-folder of the input that holds one date."""
    return (job.input.partition or "").replace("{date}", date)


def input_files(job: Job, date: str, source: Storage) -> list[FileInfo]:
    """The Parquet files of one date; none of them is opened.

    Raises:
        InputError: A name that is no text: Arrow opens none, and no record could tell of it.
    """
    infos = [info for info in source.list_files(partition_of(job, date)) if is_data(info.path)]
    for path in (info.path for info in infos):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{source.uri}: a file named {path!a}; expected names in UTF-8. Rename it."
            ) from None
    return infos


def make_plan(job: Job, date: str, source: Storage) -> Plan:
    """Find the date's files, pin them, check their columns and cut them into shards.

    Raises:
        InputError: No rows for the date, or no file that is Parquet.
        ConfigError: A column of the job that the files do not have, or of the wrong type.
    """
    where = f"{source.uri}/{partition_of(job, date)}".rstrip("/")
    infos = input_files(job, date, source)
    if not infos:
        raise InputError(
            f"{where}: no *.parquet files for {date}; expected the rows of that date. "
            "Check the date, `input.uri` and `input.partition`."
        )
    found = read_footers(source, infos)
    footers = [file for file in found if isinstance(file, Footer)]
    unreadable = tuple(file for file in found if isinstance(file, UnreadableFile))
    if not footers:
        raise InputError(
            f"{source.uri}/{unreadable[0].path}: {unreadable[0].message}; expected a Parquet file, "
            f"and none of {len(unreadable)} can be read. Write them again."
        )
    columns, num_features = _columns_of(job, footers, source.uri)
    num_rows = sum(footer.file.num_rows for footer in footers)
    if num_rows == 0:
        raise InputError(f"{where}: 0 rows in {len(footers)} files; expected rows to score.")
    shards: list[Shard] = []
    for footer in footers:
        shards += _cut(footer, job.shard_rows, first_index=len(shards))
    return Plan(
        job=job.name,
        date=date,
        files=tuple(footer.file for footer in footers),
        shards=tuple(shards),
        num_rows=num_rows,
        feature_columns=columns,
        num_features=num_features,
        unreadable=unreadable,
    )


def run_id_of(
    plan: Plan, job: Job, engines: str, class_names: Sequence[str] = (), version: int = 1
) -> str:
    """The id of a run: a function of job, date and all that decides what its output says.

    A run that was interrupted finds its ledger under this id; another input, other engines or
    another output layout give another id, so that they are never mixed. `engines` says which may
    score it: see `EnginePin.key`. A forced run of a published date has the `version` that it will
    be: it must not find the ledger of what it replaces.
    """
    pins = {
        "job": plan.job,
        "date": plan.date,
        "input": plan.input_fingerprint,
        "shards": [[shard.file.path, shard.row_groups] for shard in plan.shards],
        "reading": job.input.model_dump(exclude={"uri"}),
        "model": job.model.model_dump(),
        "compression": job.output.compression,
        "engine": engines,
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


def is_data(path: str) -> bool:
    """A Parquet file by its name, and not hidden."""
    return path.endswith((".parquet", ".parq", ".pq")) and not is_hidden(path)


def _columns_of(job: Job, footers: Sequence[Footer], root: str) -> tuple[tuple[str, ...], int]:
    """Feature columns and the width of the engine's input, in which all files must agree.

    Raises:
        ConfigError: No file fits the job, or some files do not: the message says which it is.
    """
    alike: dict[int, list[Footer]] = {}
    for footer in footers:
        alike.setdefault(id(footer.schema), []).append(footer)
    fitting: tuple[tuple[str, ...], int] | None = None
    copied: pa.Schema | None = None
    wrong: list[Footer] = []
    error: ConfigError | None = None
    for files in alike.values():
        schema, where = files[0].schema, f"{root}/{files[0].file.path}"
        try:
            columns = fitting[0] if fitting else _feature_columns(job, schema, where)
            _check_columns(job, columns, schema, where)
            check_delta_columns(job, schema, where)
            width = _num_features(schema, columns)
            if fitting and width != fitting[1]:
                raise ConfigError(f"{where}: {width} features; expected {fitting[1]}.")
            copied = copied or schema
            _check_alike(job, schema, copied, where)
        except ConfigError as found:
            wrong, error = wrong + files, error or found
        else:
            fitting = columns, width
    if error is None and fitting is not None:
        return fitting
    if fitting is None:
        raise error or AssertionError("a plan without files")
    num_wrong = len(wrong)
    raise ConfigError(
        f"{error} {num_wrong} of {len(footers)} files {'is' if num_wrong == 1 else 'are'} like "
        "this, the others fit the job: write the file again."
    )


def _feature_columns(job: Job, schema: pa.Schema, where: str) -> tuple[str, ...]:
    if job.input.features is None:
        return ()
    columns: list[str] = []
    for pattern in job.input.features.columns:
        found = [name for name in schema.names if fnmatch.fnmatchcase(name, pattern)]
        if pattern in schema.names:  # `f[0]` is a name, and as a glob it is f0
            found = [pattern]
        if not found:
            raise _missing_column(pattern, schema, where, "input.features.columns")
        columns += [name for name in found if name not in columns]
    return tuple(columns)


def _check_columns(job: Job, features: tuple[str, ...], schema: pa.Schema, where: str) -> None:
    label = job.engine.gate.label
    wanted = [(name, "input.passthrough") for name in job.input.passthrough]
    wanted += [(label, "engine.gate.label")] if label else []
    wanted += [(name, "input.features.columns") for name in features]
    wanted += [(job.input.images.column, "input.images.column")] if job.input.images else []
    names = schema.names
    for name, key in wanted:
        if name not in names:
            raise _missing_column(name, schema, where, key)
        if names.count(name) > 1:
            raise ConfigError(f"{where}: column `{name}` twice; expected each name once.")
    if job.input.images:
        name = job.input.images.column
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


def _check_alike(job: Job, schema: pa.Schema, first: pa.Schema, where: str) -> None:
    """Parts have the columns of their files, and readers take all parts of a date for one table."""
    for name in job.input.passthrough:
        kind, expected = schema.field(name).type, first.field(name).type
        if _as_stored(kind) != _as_stored(expected):
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected {expected}, as in other files of "
                "the date, because of `input.passthrough`."
            )


def _as_stored(kind: pa.DataType) -> pa.DataType:
    """One type for those that Parquet keeps alike."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_as_stored(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_stored(field.type)) for field in kind])
    return kind


def _missing_column(name: str, schema: pa.Schema, where: str, key: str) -> ConfigError:
    close = difflib.get_close_matches(name, schema.names, n=1)
    hint = f"Did you mean `{close[0]}`?" if close else f"It has: {', '.join(schema.names[:8])}."
    return ConfigError(f"{where}: no column `{name}`; expected it because of `{key}`. {hint}")


def _num_features(schema: pa.Schema, columns: tuple[str, ...]) -> int:
    if len(columns) == 1:
        kind = schema.field(columns[0]).type
        return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 1
    return len(columns)


def _cut(footer: Footer, target_rows: int, *, first_index: int) -> list[Shard]:
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
