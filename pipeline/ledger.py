"""The ledger of a run: create-only records that say which parts count.

    <job>/_runs/<run_id>/run.json                     what the run is: input pins, engine, job
                         attempts/<attempt>.json      one for each start of the command
                         attempts/<attempt>.end.json  how it ended, if it could still say so
                         parts/part-00017-<token>.parquet
                         parts/quarantine-00017-<token>.parquet
                         commits/00017.json           makes shard 17's parts count
                         commits/00017_01.json        does so instead, where that one is damaged
                         poison/00017-00000230.json   a row that killed its process: not tried again

A part without a commit record is an orphan that nobody reads. A record that is damaged, or whose
parts are gone or cut off, makes nothing count: its shard is scored again, and has another record.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from pipeline.lane_messages import PoisonRow
from pipeline.part import ShardParts
from pipeline.plan import Shard
from pipeline.storage import FileInfo, Storage

END = ".end.json"
log = logging.getLogger(__name__)

Note = TypeVar("Note")

SELF_CHECK = "check"
"""Key of a record's own sha256 in its JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFile:
    """A part as it was uploaded."""

    name: str
    """Below `parts/`."""
    num_bytes: int
    sha256: str
    num_rows: int
    """Of the input that it accounts for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord:
    """Makes the parts of one shard count."""

    shard: int
    file: str
    row_groups: tuple[int, ...]
    first_row: int
    num_rows: int
    num_scored: int
    num_quarantined: int
    reasons: dict[str, int]
    part: PartFile
    quarantine: PartFile | None
    owner: str
    """The attempt that scored the shard."""
    committed_at: str
    """ISO 8601, UTC."""
    scores: str = ""
    """How the part's scores are distributed, as text; see pipeline/distribution.py."""
    engine: str = ""
    """Key of the engine that scored the shard; empty: the run has only one."""

    @property
    def files(self) -> tuple[PartFile, ...]:
        """The part, and the quarantine part if there is one."""
        return (self.part,) if self.quarantine is None else (self.part, self.quarantine)

    def to_json(self) -> bytes:
        """With a checksum of itself."""
        fields = asdict(self)
        return json.dumps({**fields, SELF_CHECK: _digest(fields)}, indent=1).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of the command for a run."""

    id: str
    started_at: str
    """ISO 8601, UTC."""
    host: str
    pid: int
    prepared_s: float = 0.0
    """Seconds from its start until it was ready to score."""
    build_s: float = 0.0
    """Of these, spent building the engine."""
    rows_at_risk: int | None = None
    """Rows that its lanes may have begun beyond their last commits, at most; None: unknown."""
    lanes: str = ""
    """Names of its lanes, such as `gpu0 gpu1`; empty: unknown."""
    process: str = ""
    """Of `pipeline.process_start.process_name`; empty: unknown."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnd:
    """How an attempt ended that did not publish; one that was killed leaves none."""

    ended_at: str
    """ISO 8601, UTC."""
    why: str
    rows_begun: int
    """Rows that it began to score, committed or not."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def utc_now() -> str:
    """ISO 8601 with microseconds, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def run_folder(job: str, run_id: str) -> str:
    """Where a run's ledger is, below the output's root."""
    return f"{job}/_runs/{run_id}"


def list_notes(output: Storage, folder: str) -> list[FileInfo]:
    """The small files of a folder by path; not those that a killed process was just writing."""
    return [info for info in output.list_files(folder) if info.path.endswith(".json")]


def read_notes(output: Storage, paths: Sequence[str], kind: type[Note]) -> dict[str, Note]:
    """What small files say, by path. No rows depend on them: damaged ones are left out.

    Args:
        output: Where they are.
        paths: Of the files; those that somebody has removed since they were listed are left out.
        kind: A dataclass, whose fields are a file's JSON.
    """
    notes = {}
    for path, data in zip(paths, output.read_many(paths), strict=True):
        if data is None:
            continue
        try:
            notes[path] = kind(**json.loads(data))
        except (ValueError, TypeError) as error:
            log.warning("%s: damaged; it is left out (%s).", path, error)
    return notes


class Ledger:
    """Reads and writes the records of one run; any number of processes may do so at once."""

    def __init__(self, output: Storage, job: str, run_id: str) -> None:
        self.run_id = run_id
        self.folder = run_folder(job, run_id)
        self._output = output
        self.is_far = output.is_far
        """See `Storage`."""

    def open(self, description: Mapping[str, Any], attempt: Attempt) -> None:
        """Write down what the run is (once) and that this attempt has begun."""
        pinned = json.dumps(description, indent=1, sort_keys=True).encode()
        self._output.create(f"{self.folder}/run.json", pinned)
        self._output.create(f"{self.folder}/attempts/{attempt.id}.json", attempt.to_json())

    def records(self) -> dict[int, CommitRecord]:
        """The last readable commit record of each shard; see `sound_records`."""
        paths = self._record_paths()
        found = {}
        for path, data in zip(paths, self._output.read_many(paths), strict=True):
            # Another process may have made it count no longer, see `forget_quarantine`.
            record = None if data is None else self._parsed(path, data)
            if record is not None:
                found[record.shard] = record
        return found

    def sound_records(self) -> dict[int, CommitRecord]:
        """The records that count, by shard: their parts are there, and as long as committed.

        Flipped bytes are not looked for: that would be to read the whole output once more. Readers
        and `score verify` find them.
        """
        records = self.records()
        infos = self._output.list_files(f"{self.folder}/parts") if records else []
        sizes = {info.path: info.num_bytes for info in infos}
        return {
            shard: record for shard, record in records.items() if self._is_sound(record, sizes.get)
        }

    def record_of(self, shard: Shard) -> CommitRecord | None:
        """The record that makes the shard's parts count, if it has one now."""
        generation = 0
        while (data := self._output.read(path := self._record_path(shard, generation))) is not None:
            record = self._parsed(path, data)
            if record is not None and self._is_sound(record, self._size_of):
                return record
            generation += 1
        return None

    def _parsed(self, path: str, data: bytes) -> CommitRecord | None:
        record = _record_from_json(data)
        if record is None:
            log.warning("%s: damaged; its shard is scored again.", path)
        return record

    def _is_sound(self, record: CommitRecord, size_of: Callable[[str], int | None]) -> bool:
        for file in record.files:
            path = self.part_path(file)
            found = size_of(path) or 0
            if found != file.num_bytes:
                what = "%s: %d of %d bytes; its shard is scored again."
                log.warning(what, path, found, file.num_bytes)
                return False
        return True

    def _size_of(self, path: str) -> int | None:
        info = self._output.info(path)
        return None if info is None else info.num_bytes

    def commit_times(self) -> dict[int, float]:
        """When each shard was last committed, Unix time by the store's clock; reads a listing only.

        A record that is damaged counts here: this is to watch a run, and not to publish it.
        """
        infos = list_notes(self._output, f"{self.folder}/commits")
        return {_shard_of(info.path): info.modified_at for info in infos}

    def _record_paths(self) -> list[str]:
        """Of each shard the last one comes last."""
        return [info.path for info in list_notes(self._output, f"{self.folder}/commits")]

    def _record_path(self, shard: Shard, generation: int) -> str:
        suffix = f"_{generation:02d}" if generation else ""
        return f"{self.folder}/commits/{shard.name}{suffix}.json"

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        paths = [path for path in self._attempt_files() if not path.endswith(END)]
        attempts = read_notes(self._output, paths, Attempt).values()
        return sorted(attempts, key=lambda attempt: attempt.started_at)

    def num_attempts(self) -> int:
        """How many there are; reads none of them."""
        return sum(not path.endswith(END) for path in self._attempt_files())

    def end(self, attempt: Attempt, end: AttemptEnd) -> None:
        """Write down how an attempt ended that did not publish."""
        self._output.create(f"{self.folder}/attempts/{attempt.id}{END}", end.to_json())

    def ends(self) -> dict[str, AttemptEnd]:
        """How attempts ended, by their ids; not those that published, work, or were killed."""
        paths = [path for path in self._attempt_files() if path.endswith(END)]
        ends = read_notes(self._output, paths, AttemptEnd)
        return {path.rpartition("/")[2].removesuffix(END): end for path, end in ends.items()}

    def _attempt_files(self) -> list[str]:
        return [info.path for info in list_notes(self._output, f"{self.folder}/attempts")]

    def commit(self, shard: Shard, parts: ShardParts, owner: str) -> CommitRecord:
        """Upload a shard's parts under new names, then make them count.

        Returns:
            The record that counts: ours, or that of another process that was first.
        """
        token = uuid.uuid4().hex[:12]
        part = self._store(f"part-{shard.name}-{token}.parquet", parts.part, parts.num_scored)
        quarantine = None
        if parts.quarantine is not None:
            name = f"quarantine-{shard.name}-{token}.parquet"
            quarantine = self._store(name, parts.quarantine, parts.num_quarantined)
        record = CommitRecord(
            shard=shard.index,
            file=shard.file.path,
            row_groups=shard.row_groups,
            first_row=shard.first_row,
            num_rows=shard.num_rows,
            num_scored=parts.num_scored,
            num_quarantined=parts.num_quarantined,
            reasons=dict(parts.reasons),
            part=part,
            quarantine=quarantine,
            owner=owner,
            committed_at=utc_now(),
            scores=parts.scores,
            engine=parts.engine,
        )
        generation = 0
        while not self._output.create(self._record_path(shard, generation), record.to_json()):
            winner = self.record_of(shard)
            if winner is not None:  # somebody was first: ours are named by no record
                for orphan in record.files:
                    self._output.delete(self.part_path(orphan))
                return winner
            generation += 1  # a damaged record is in our way
        return record

    def adopt(self, record: CommitRecord, files: Mapping[str, str]) -> None:
        """Take over a shard that another run has scored.

        Args:
            record: What that run's ledger said of it.
            files: Where its parts are: name -> path below the output's root.
        """
        parts = {f"{self.folder}/parts/{name}": path for name, path in files.items()}
        self._output.copy(parts)
        path = f"{self.folder}/commits/{record.shard:05d}.json"
        self._output.create(path, record.to_json())

    def forget_quarantine(self) -> None:
        """Let rows in quarantine be tried again: their shards are no longer committed.

        Parts stay behind as orphans. Whoever publishes meanwhile finds that shards are missing.
        """
        shards = {record.shard for record in self.records().values() if record.num_quarantined}
        for path in self._record_paths():
            if _shard_of(path) in shards:
                self._output.delete(path)
        for info in self._output.list_files(f"{self.folder}/poison"):
            self._output.delete(info.path)

    def note_poison(self, row: PoisonRow) -> None:
        """Write down that a row must not be tried again, in this attempt and in all others."""
        kind = "" if row.group_rows is None else "-group"
        path = f"{self.folder}/poison/{row.shard:05d}-{row.row:08d}{kind}.json"
        self._output.create(path, json.dumps(asdict(row), indent=1).encode())

    def poison(self) -> tuple[PoisonRow, ...]:
        """All rows that killed a process, by shard and row."""
        paths = [info.path for info in list_notes(self._output, f"{self.folder}/poison")]
        return tuple(read_notes(self._output, paths, PoisonRow).values())

    def part_path(self, file: PartFile) -> str:
        """Path of an uploaded part, below the output's root."""
        return f"{self.folder}/parts/{file.name}"

    def _store(self, name: str, data: bytes, num_rows: int) -> PartFile:
        digest = hashlib.sha256(data).hexdigest()
        file = PartFile(name=name, num_bytes=len(data), sha256=digest, num_rows=num_rows)
        if not self._output.create(self.part_path(file), data):
            raise AssertionError(f"{name}: exists; part names are unique")
        return file


def _shard_of(path: str) -> int:
    """The shard that a commit record is of."""
    return int(PurePosixPath(path).stem.partition("_")[0])


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _record_from_json(data: bytes) -> CommitRecord | None:
    """What `CommitRecord.to_json` wrote; None when a byte of it has changed."""
    try:
        fields = json.loads(data)
        if fields.pop(SELF_CHECK) != _digest(fields):
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record_from_dict(fields)


def record_from_dict(fields: Mapping[str, Any]) -> CommitRecord:
    """The inverse of `dataclasses.asdict`."""
    quarantine = fields["quarantine"]
    return CommitRecord(
        **{
            **fields,
            "row_groups": tuple(fields["row_groups"]),
            "part": PartFile(**fields["part"]),
            "quarantine": PartFile(**quarantine) if quarantine else None,
        }
    )
