"""The ledger of a run: create-only records that say which parts count.

    <job>/_runs/<run_id>/run.json                     what the run is: input pins, engine, job
                         attempts/<attempt>.json      one for each start of the command
                         parts/part-00017-<token>.parquet
                         parts/quarantine-00017-<token>.parquet
                         commits/00017.json           makes shard 17's parts count
                         poison/00017-00000230.json   a row that killed its process: not tried again

A part without a commit record is an orphan that nobody reads.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.lane_messages import PoisonRow
from pipeline.part import ShardParts
from pipeline.plan import Shard
from pipeline.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
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
    part: StoredFile
    quarantine: StoredFile | None
    owner: str
    """The attempt that scored the shard."""
    committed_at: str
    """ISO 8601, UTC."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of the command for a run."""

    id: str
    started_at: str
    """ISO 8601, UTC."""
    host: str
    pid: int

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def utc_now() -> str:
    """ISO 8601 with microseconds, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat()


class Ledger:
    """Reads and writes the records of one run; any number of processes may do so at once."""

    def __init__(self, output: Storage, job: str, run_id: str) -> None:
        self.run_id = run_id
        self.folder = f"{job}/_runs/{run_id}"
        self._output = output

    def open(self, description: Mapping[str, Any], attempt: Attempt) -> None:
        """Write down what the run is (once) and that this attempt has begun."""
        pinned = json.dumps(description, indent=1, sort_keys=True).encode()
        self._output.create(f"{self.folder}/run.json", pinned)
        self._output.create(f"{self.folder}/attempts/{attempt.id}.json", attempt.to_json())

    def records(self) -> dict[int, CommitRecord]:
        """All commit records, by shard."""
        infos = self._output.list_files(f"{self.folder}/commits")
        paths = [info.path for info in infos if info.path.endswith(".json")]
        records = map(_record_from_json, self._output.read_many(paths))
        return {record.shard: record for record in records}

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        infos = self._output.list_files(f"{self.folder}/attempts")
        paths = [info.path for info in infos if info.path.endswith(".json")]
        attempts = [Attempt(**json.loads(data)) for data in self._output.read_many(paths)]
        return sorted(attempts, key=lambda attempt: attempt.started_at)

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
        )
        path = f"{self.folder}/commits/{shard.name}.json"
        if self._output.create(path, record.to_json()):
            return record
        for orphan in (part, quarantine):  # somebody was first: ours are named by no record
            if orphan is not None:
                self._output.delete(self.part_path(orphan))
        return _record_from_json(self._output.read_many([path])[0])

    def note_poison(self, row: PoisonRow) -> None:
        """Write down that a row must not be tried again, in this attempt and in all others."""
        kind = "" if row.group_rows is None else "-group"
        path = f"{self.folder}/poison/{row.shard:05d}-{row.row:08d}{kind}.json"
        self._output.create(path, json.dumps(asdict(row), indent=1).encode())

    def poison(self) -> tuple[PoisonRow, ...]:
        """All rows that killed a process, by shard and row."""
        infos = self._output.list_files(f"{self.folder}/poison")
        paths = sorted(info.path for info in infos if info.path.endswith(".json"))
        return tuple(PoisonRow(**json.loads(data)) for data in self._output.read_many(paths))

    def part_path(self, file: StoredFile) -> str:
        """Path of an uploaded part, below the output's root."""
        return f"{self.folder}/parts/{file.name}"

    def _store(self, name: str, data: bytes, num_rows: int) -> StoredFile:
        digest = hashlib.sha256(data).hexdigest()
        file = StoredFile(name=name, num_bytes=len(data), sha256=digest, num_rows=num_rows)
        if not self._output.create(self.part_path(file), data):
            raise AssertionError(f"{name}: exists; part names are unique")
        return file


def _record_from_json(data: bytes) -> CommitRecord:
    fields = json.loads(data)
    quarantine = fields["quarantine"]
    return CommitRecord(
        **{
            **fields,
            "row_groups": tuple(fields["row_groups"]),
            "part": StoredFile(**fields["part"]),
            "quarantine": StoredFile(**quarantine) if quarantine else None,
        }
    )
