"""A few rows of a night, read again from its input, beside what its committed parts say of them.

Rows are found in the parts by their position, so that decoder, copies, batches and writing are held
to account as well as the engine.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engines.gate import Answers
from pipeline.blocks import Array, Decoder
from pipeline.errors import VerifyError
from pipeline.ledger import CommitRecord, Ledger, StoredFile
from pipeline.plan import Plan, Shard
from pipeline.storage import Storage

MIN_GROUPS, MAX_GROUPS = 2, 8
"""Row groups that are read: a whole group is read for a few of its rows."""
MAX_READ_BYTES = 256 << 20
"""Of the input, about; unless that is fewer than `MIN_GROUPS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Some rows of the night and what was committed for them."""

    inputs: Array
    """As the engine takes them, decoded on the CPU."""
    answers: Answers
    """`class_id` and `probability` [rows]; or `score` [rows, m]."""
    variance: npt.NDArray[np.float64]
    """[m] of all scores of the parts that were looked at; empty for classes."""


class DriftSampler:
    """Takes rows all over a night's input, and what its parts say of them.

    Args:
        plan: The night; all its shards are committed.
        source: Its input.
        ledger: Its ledger.
        output: Where its parts are.
        records: Of its shards.
    """

    def __init__(
        self,
        plan: Plan,
        source: Storage,
        ledger: Ledger,
        output: Storage,
        records: Mapping[int, CommitRecord],
    ) -> None:
        self._plan = plan
        self._source = source
        self._ledger = ledger
        self._output = output
        self._records = records

    def sample(self, decoder: Decoder, num_rows: int) -> Sampled | None:
        """About `num_rows` scored rows of a few row groups; None when there is none to be had.

        The same night gives the same rows; another one gives others.

        Raises:
            VerifyError: A committed part is not what its record says.
        """
        rng = np.random.default_rng(list(self._ledger.run_id.encode()))
        groups = [(shard, group) for shard in self._plan.shards for group in shard.row_groups]
        num_bytes = sum(file.num_bytes for file in self._plan.files) / len(groups)
        affordable = max(MIN_GROUPS, int(MAX_READ_BYTES / num_bytes))
        num_groups = min(len(groups), MAX_GROUPS, affordable, num_rows)
        per_group = -(-num_rows // num_groups)
        # One from each of equal stretches of the night.
        places = (np.arange(num_groups) + rng.random(num_groups)) * len(groups) / num_groups
        with decoder:
            found = [
                self._of_group(*groups[place], decoder, per_group, rng)
                for place in places.astype(int).tolist()
            ]
        return _joined([sampled for sampled in found if sampled is not None])

    def _of_group(
        self,
        shard: Shard,
        group: int,
        decoder: Decoder,
        num_rows: int,
        rng: np.random.Generator,
    ) -> Sampled | None:
        record = self._records[shard.index]
        read = self._read(shard, group, decoder.columns)
        if read is None or not record.num_scored:
            return None
        rows, first_row = read
        chosen = np.sort(rng.permutation(len(rows))[:num_rows])
        bad = self._quarantined(shard, record)
        chosen = chosen[~np.isin(chosen + first_row, bad)]
        if not len(chosen):
            return None
        inputs, cannot = _decoded(rows.take(chosen), decoder)
        part = self._part(record.part, ("score", "class_id", "probability"))
        if part.num_rows != shard.num_rows - len(bad):
            raise VerifyError(
                f"part {record.part.name}: {part.num_rows:,} rows; expected "
                f"{shard.num_rows - len(bad):,}. Look at the store, and delete this run's folder."
            )
        places = np.delete(chosen, cannot) + first_row
        columns = _columns_of(part)
        return Sampled(
            inputs=np.delete(inputs, cannot, axis=0),
            answers={
                name: values[places - np.searchsorted(bad, places)]
                for name, values in columns.items()
            },
            variance=_variance(columns.get("score")),
        )

    def _read(
        self, shard: Shard, group: int, columns: Sequence[str]
    ) -> tuple[pa.Table, int] | None:
        """The rows of a group, and the index within the shard of their first; None: not now."""
        pinned = shard.file
        now = self._source.info(pinned.path)
        if now is None or (now.num_bytes, now.version) != (pinned.num_bytes, pinned.version):
            return None  # other rows than were scored
        try:
            with self._source.open(pinned.path) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                before = shard.row_groups[: shard.row_groups.index(group)]
                first_row = sum(parquet.metadata.row_group(each).num_rows for each in before)
                return parquet.read_row_group(group, columns=list(columns)), first_row
        except (pa.ArrowException, OSError):  # damaged: its rows are in quarantine
            return None

    def _quarantined(self, shard: Shard, record: CommitRecord) -> npt.NDArray[np.int64]:
        """Indices within the shard, ascending."""
        if record.quarantine is None:
            return np.empty(0, np.int64)
        rows = self._part(record.quarantine, ("row",))["row"].to_pylist()
        return np.sort(np.array(rows, np.int64) - shard.first_row)

    def _part(self, file: StoredFile, columns: Sequence[str]) -> pa.Table:
        """Those of the columns that a part has."""
        data = self._output.read(self._ledger.part_path(file))
        if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
            raise VerifyError(
                f"part {file.name}: {'gone' if data is None else 'another sha256'}; expected what "
                "was committed. Look at the store, and delete this run's folder."
            )
        parquet = pq.ParquetFile(io.BytesIO(data))
        return parquet.read([name for name in columns if name in parquet.schema_arrow.names])


def _decoded(rows: pa.Table, decoder: Decoder) -> tuple[Array, list[int]]:
    """The engine's input, and the positions of rows that only the night's decoder could read."""
    inputs: list[Array] = []
    cannot: list[int] = []
    for batch in rows.combine_chunks().to_batches(max_chunksize=decoder.block_rows):
        decoded, bad_rows = decoder.decode(batch)
        cannot += [sum(map(len, inputs)) + slot for slot in bad_rows]
        inputs.append(decoded)
    return np.concatenate(inputs), cannot


def _columns_of(part: pa.Table) -> Answers:
    if "score" not in part.schema.names:
        names = ("class_id", "probability")
        return {name: np.asarray(part[name].combine_chunks()) for name in names}
    scores = part["score"].combine_chunks()
    if pa.types.is_fixed_size_list(scores.type):
        return {"score": np.asarray(scores.flatten()).reshape(len(scores), -1)}
    return {"score": np.asarray(scores)[:, None]}


def _variance(scores: Array | None) -> npt.NDArray[np.float64]:
    if scores is None:
        return np.empty(0)
    finite = scores[np.isfinite(scores).all(axis=1)]
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
