"""The plan of a run: pinned input files and balanced shards, from Parquet footers alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from engines.keys import digest
from pipeline.config import Job
from pipeline.errors import InputError
from pipeline.footers import Footer, PinnedFile, read_footers
from pipeline.input_columns import columns_of
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
    num_features: int
    wider_types: Mapping[str, pa.DataType] = field(default_factory=dict)
    """For this and the two before, see `Columns`."""
    columns_sha256: str = ""
    """`Columns.sha256`: two plans read and copy rows alike only where it is equal."""
    unreadable: tuple[UnreadableFile, ...] = ()
    """Files of the date that are no Parquet; their rows are in no shard and in no sum."""

    @property
    def input_fingerprint(self) -> str:
        """sha256 over the pinned files: equal only for equal input."""
        unreadable = [[file.path, file.num_bytes, file.version] for file in self.unreadable]
        return digest([*(asdict(file) for file in self.files), *unreadable])

    @property
    def num_unreadable_rows(self) -> int:
        """How many rows unreadable files may have had: each as many as its bytes make likely.

        Most have lost bytes, so that none has fewer than a file that can be read has on average.
        """
        num_bytes = sum(file.num_bytes for file in self.files)
        mean_bytes = num_bytes / len(self.files)
        counted = sum(max(file.num_bytes, mean_bytes) for file in self.unreadable)
        return round(counted * self.num_rows / num_bytes)


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
    columns = columns_of(job, footers, source.uri)
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
        feature_columns=columns.features,
        num_features=columns.num_features,
        wider_types=columns.wider_types,
        columns_sha256=columns.sha256,
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
    return f"{plan.date}-{digest(pins)[:12]}"


def shuffled(shards: Sequence[Shard], seed: str) -> tuple[Shard, ...]:
    """The shards in an order of one's own, for one of several attempts at a run.

    Attempts that work at once then rarely meet at a shard, and pass over what others committed:
    two scored 414 of 400 shards, and sixteen 576, with three in work at a time each. In the same
    order, or from different points of a circle, they meet and go on side by side to the end.
    """
    return tuple(random.Random(seed).sample(shards, len(shards)))


def is_data(path: str) -> bool:
    """A Parquet file by its name, and not hidden."""
    return path.endswith((".parquet", ".parq", ".pq")) and not is_hidden(path)


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
