"""A few rows of a night, read again from its input, beside what its committed parts say of them.

Rows are found in the parts by their position, so that decoder, copies, batches and writing are held
to account as well as the engine.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engines.gate import Answers
from pipeline.blocks import Array, Decoder
from pipeline.errors import InputChangedError, VerifyError
from pipeline.footers import check_pin
from pipeline.ledger import CommitRecord, Ledger, PartFile
from pipeline.plan import Plan, Shard
from pipeline.row_groups import PARQUET_ERRORS, open_parquet, rows_at
from pipeline.storage import Storage

MIN_GROUPS, MAX_GROUPS = 2, 8
"""Row groups that are read: a whole group is read for a few of its rows."""
MAX_READ_BYTES = 256 << 20
"""Of the input, about; unless that is fewer than `MIN_GROUPS`."""
MAX_GROUPS_AT_ONCE = 4
"""Nor more than there are cores: memory that each thread is the first to touch costs more than it
saves. The night is over for them: all they do now is wait for this."""
VARIANCE_ROWS = 1 << 16
"""Of a part, about, evenly spread: the variance of all of a million scores took 18 ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Some rows of the night and what was committed for them."""

    inputs: Array
    """As the engine takes them, decoded on the CPU."""
    answers: Answers
    """`class_id` and `probability` [rows]; or `score` [rows, m]."""
    variance: npt.NDArray[np.float64]
    """[m] of the scores of the parts that were looked at, about; empty for classes."""


class CommittedParts:
    """What the committed parts of a run say.

    Args:
        ledger: Of the run.
        output: Where its parts are.
        records: Of its shards.
        head: Of the model.
    """

    def __init__(
        self, ledger: Ledger, output: Storage, records: Mapping[int, CommitRecord], head: str
    ) -> None:
        self._ledger = ledger
        self._output = output
        self._records = records
        self._columns = ("class_id", "probability") if head == "classes" else ("score",)

    def quarantined(self, shard: Shard) -> npt.NDArray[np.int64] | None:
        """Indices within a shard, ascending; None when the quarantine does not name each row."""
        record = self._records[shard.index]
        if record.quarantine is None:
            return np.empty(0, np.int64)
        rows = as_numpy(self._read(record.quarantine, ("row",))["row"])
        return np.sort(rows - shard.first_row) if len(rows) == record.num_quarantined else None

    def answers(self, shard: Shard) -> Answers:
        """Of a shard's scored rows, in their order; `score` is [rows, m].

        Raises:
            VerifyError: The part is not what was committed.
        """
        record = self._records[shard.index]
        part = self._read(record.part, self._columns)
        if part.num_rows != record.num_scored:
            raise VerifyError(
                f"part {record.part.name}: {part.num_rows:,} rows; expected {record.num_scored:,}. "
                "Report this: it is a defect."
            )
        answers = {name: as_numpy(part[name]) for name in self._columns}
        return {
            n: each[:, None] if n == "score" and each.ndim == 1 else each
            for n, each in answers.items()
        }

    def _read(self, file: PartFile, columns: Sequence[str]) -> pa.Table:
        data = self._output.read(self._ledger.part_path(file))
        if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
            raise VerifyError(
                f"part {file.name}: {'gone' if data is None else 'another sha256'}; expected what "
                "was committed. Look at the store, and delete this run's folder."
            )
        return pq.ParquetFile(io.BytesIO(data)).read(list(columns))


def as_numpy(column: pa.ChunkedArray) -> Array:
    """Numbers without nulls as [rows], lists of one length as [rows, m]; no list at all as [0, 1].

    Arrow's own conversions would import pandas, where it is installed: 0.3 s.
    """
    kind, is_list = column.type, pa.types.is_list(column.type)
    if is_list:
        kind = kind.value_type
    dtype = np.dtype(kind.to_pandas_dtype())
    found = []
    for chunk in (chunk for chunk in column.chunks if len(chunk)):
        values = chunk.flatten() if is_list else chunk
        data = np.frombuffer(
            values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize
        )
        found.append(data.reshape(len(chunk), -1))
    rows = np.concatenate(found) if found else np.empty((0, 1), dtype)
    return rows if is_list else rows[:, 0]


class DriftSampler:
    """Takes rows all over a night's input, and what its parts say of them.

    Args:
        plan: The night; all its shards are committed.
        source: Its input.
        parts: What was committed.
        decoder: Of the CPU; its `decode` may be called from several threads.
        seed: The same one gives the same rows.
    """

    def __init__(
        self, plan: Plan, source: Storage, parts: CommittedParts, decoder: Decoder, seed: str
    ) -> None:
        self._plan = plan
        self._source = source
        self._parts = parts
        self._decoder = decoder
        self._seed = list(seed.encode())

    def sample(self, num_rows: int) -> Sampled | None:
        """About `num_rows` scored rows of a few row groups; None when there is none to be had.

        Raises:
            VerifyError: A committed part is not what its record says.
        """
        groups = [(shard, group) for shard in self._plan.shards for group in shard.row_groups]
        num_bytes = sum(file.num_bytes for file in self._plan.files) / len(groups)
        affordable = max(MIN_GROUPS, int(MAX_READ_BYTES / num_bytes))
        num_groups = min(len(groups), MAX_GROUPS, affordable, num_rows)
        per_group = -(-num_rows // num_groups)
        rng = np.random.default_rng(self._seed)
        # One from each of equal stretches of the night.
        places = (np.arange(num_groups) + rng.random(num_groups)) * len(groups) / num_groups
        chosen = [groups[place] for place in places.astype(int)]

        def look(shard: Shard, group: int, rng: np.random.Generator) -> Sampled | None:
            return self._of_group(shard, group, per_group, rng)

        num_threads = min(MAX_GROUPS_AT_ONCE, len(os.sched_getaffinity(0)))
        with self._decoder, ThreadPoolExecutor(num_threads, "drift") as pool:
            found = list(pool.map(look, *zip(*chosen, strict=True), rng.spawn(num_groups)))
        return _joined([sampled for sampled in found if sampled is not None])

    def _of_group(
        self, shard: Shard, group: int, num_rows: int, rng: np.random.Generator
    ) -> Sampled | None:
        bad = self._parts.quarantined(shard)
        if bad is None:
            return None
        read = self._read(shard, group, num_rows, bad, rng)
        if read is None:
            return None
        rows, chosen = read
        inputs, cannot = self._decode(rows)
        places = np.delete(chosen, cannot)
        answers = self._parts.answers(shard)
        return Sampled(
            inputs=np.delete(inputs, cannot, axis=0),
            # A part has no slots for rows in quarantine.
            answers={n: each[places - np.searchsorted(bad, places)] for n, each in answers.items()},
            variance=_variance(answers.get("score")),
        )

    def _read(
        self,
        shard: Shard,
        group: int,
        num_rows: int,
        bad: npt.NDArray[np.int64],
        rng: np.random.Generator,
    ) -> tuple[pa.Table, npt.NDArray[np.int64]] | None:
        """Rows of a group that are not bad, and their indices within the shard; None: not now."""
        try:
            check_pin(shard.file, self._source)
            with self._source.open(shard.file.path, shard.file) as file:
                parquet = open_parquet(file)
                before = shard.row_groups[: shard.row_groups.index(group)]
                first_row = sum(parquet.metadata.row_group(each).num_rows for each in before)
                promised = parquet.metadata.row_group(group).num_rows
                places = rng.choice(promised, min(num_rows, promised), replace=False, shuffle=False)
                places = np.sort(places[~np.isin(places + first_row, bad)])
                if not len(places):
                    return None
                rows = rows_at(file, parquet, group, self._decoder.columns, places)
                return rows, places + first_row
        except InputChangedError:  # other rows than were scored
            return None
        except PARQUET_ERRORS:  # damaged: its rows are in quarantine
            return None

    def _decode(self, rows: pa.Table) -> tuple[Array, list[int]]:
        """The engine's input, and the positions of rows that only the night could read."""
        inputs: list[Array] = []
        cannot: list[int] = []
        for batch in rows.combine_chunks().to_batches(max_chunksize=self._decoder.block_rows):
            decoded, bad_rows = self._decoder.decode(batch)
            cannot += [sum(map(len, inputs)) + slot for slot in bad_rows]
            inputs.append(decoded)
        return np.concatenate(inputs), cannot


def _variance(scores: Array | None) -> npt.NDArray[np.float64]:
    if scores is None:
        return np.empty(0)
    some = scores[:: max(1, len(scores) // VARIANCE_ROWS)]
    finite = some[np.isfinite(some).all(axis=1)]
    if not len(finite):
        return np.zeros(scores.shape[1])
    return np.asarray(finite.var(axis=0, dtype=np.float64))


def _joined(several: Sequence[Sampled]) -> Sampled | None:
    if not several:
        return None
    return Sampled(
        inputs=np.concatenate([each.inputs for each in several]),
        answers={
            name: np.concatenate([each.answers[name] for each in several])
            for name in several[0].answers
        },
        variance=np.max([each.variance for each in several], axis=0),
    )
