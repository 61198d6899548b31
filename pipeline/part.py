"""Build the Parquet bytes of one shard: its scored rows, and its quarantined ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.blocks import Array, ScoredBlock
from pipeline.column_types import as_stored, without_views
from pipeline.distribution import count_scores, stride_for
from pipeline.plan import Shard
from pipeline.unanswered import without_numbers

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)
"""Fixed, so that a night without messages reads like any other. `row` counts within `file`.

One row of it is one of the input, or the first of `num_rows` that cannot be read."""

ENGINE_KEY = "engine_key"
"""Names the engine that scored a part in its `OutputLayout.metadata`."""
DELTAS = "DELTA_BINARY_PACKED"
"""Parquet's encoding of integers by their differences; all readers know it (Spark since 3.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputLayout:
    """How engine outputs become columns."""

    head: str
    """`classes` or `scores`, as in the job."""
    class_names: tuple[str, ...]
    """Name of each class index; empty when the job names none."""
    compression: str
    metadata: Mapping[str, str]
    """Provenance for the file's footer: run id, engine key, model hash, input fingerprint."""
    wider_types: Mapping[str, pa.DataType] = field(default_factory=dict)
    """See `Plan.wider_types`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardParts:
    """The bytes of a shard's output, before they are stored."""

    part: bytes
    quarantine: bytes | None
    """None when every row was scored."""
    num_scored: int
    num_quarantined: int
    reasons: Mapping[str, int]
    scores: str = ""
    """How its scores are distributed; see pipeline/distribution.py."""
    engine: str = ""
    """Key of the engine that scored it."""


def build_parts(shard: Shard, blocks: Sequence[ScoredBlock], layout: OutputLayout) -> ShardParts:
    """Turn all blocks of a shard into its part and its quarantine part, in memory.

    `shard` is that of the blocks: it knows which of its rows are lost.
    """
    blocks = [without_numbers(block) for block in blocks]
    scored = pa.Table.from_batches([_scored_rows(block, layout) for block in blocks])
    entries = _quarantine_entries(shard, blocks)
    reasons: Counter[str] = Counter()
    for entry in entries:
        reasons[entry["reason"]] += entry["num_rows"]
    quarantine = pa.Table.from_pylist(entries, schema=QUARANTINE_SCHEMA)
    return ShardParts(
        part=_to_parquet(scored, layout),
        quarantine=_to_parquet(quarantine, layout) if entries else None,
        num_scored=scored.num_rows,
        num_quarantined=reasons.total(),
        reasons=dict(reasons),
        scores=_count_scores(blocks),
        engine=layout.metadata.get(ENGINE_KEY, ""),
    )


def _count_scores(blocks: Sequence[ScoredBlock]) -> str:
    """The distribution of the scored rows, by their first column: the best class."""
    stride = stride_for(sum(block.num_rows for block in blocks))
    counted = [_counted_rows(block, stride) for block in blocks]
    *class_ids, values = (
        np.concatenate([output[rows, 0] for output, rows in zip(outputs, counted, strict=True)])
        for outputs in zip(*(block.outputs for block in blocks), strict=True)
    )
    return count_scores(values, *class_ids)


def _counted_rows(block: ScoredBlock, stride: int) -> Array:
    """Every `stride`-th row of the shard, if it was scored."""
    rows = np.arange(-block.first_row % stride, block.num_rows, stride)
    return rows[_is_scored(block)[rows]]


def _is_scored(block: ScoredBlock) -> Array:
    scored = np.ones(block.num_rows, bool)
    scored[list(block.bad_rows)] = False
    return scored


def _scored_rows(block: ScoredBlock, layout: OutputLayout) -> pa.RecordBatch:
    copied = block.passthrough
    columns = {
        name: _as_in_all_files(without_views(column), layout.wider_types.get(name))
        for name, column in zip(copied.schema.names, copied.columns, strict=True)
    }
    columns |= _output_columns(block.outputs, layout)
    rows = pa.RecordBatch.from_pydict(columns)
    if not block.bad_rows:
        return rows
    return rows.filter(pa.array(_is_scored(block).tolist()))


def _as_in_all_files(column: pa.Array, kind: pa.DataType | None) -> pa.Array:
    return column if kind in (None, as_stored(column.type)) else column.cast(kind)


def _output_columns(outputs: tuple[Array, ...], layout: OutputLayout) -> dict[str, pa.Array]:
    if layout.head == "scores":
        (scores,) = outputs
        return {"score": _column(scores)}
    class_ids, probabilities = outputs
    best = pa.array(class_ids[:, 0])
    columns = {"class_id": best}
    if layout.class_names:
        columns["class_name"] = pa.array(layout.class_names).take(best)
    columns["probability"] = pa.array(probabilities[:, 0])
    if class_ids.shape[1] > 1:
        columns["top_class_ids"] = _column(class_ids)
        columns["top_probabilities"] = _column(probabilities)
    return columns


def _column(values: Array) -> pa.Array:
    """[rows, 1] as a plain column, [rows, k] as lists: Delta Lake knows none of fixed size."""
    num_rows, width = values.shape
    if width == 1:
        return pa.array(values[:, 0])
    offsets = pa.array(np.arange(0, (num_rows + 1) * width, width, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def _quarantine_entries(shard: Shard, blocks: Sequence[ScoredBlock]) -> list[dict[str, Any]]:
    """By row; a range of lost rows is one entry, however many rows its footer promises."""
    entries: list[dict[str, Any]] = [
        {
            "row": lost.first_row,
            "num_rows": lost.num_rows,
            "stage": "read",
            "reason": lost.reason,
            "message": lost.message,
            "sha256": "",
        }
        for lost in shard.lost
    ]
    if shard.end_row > 0:  # else the only row of the only block is none of the shard
        entries += [
            {
                "row": block.first_row + slot,
                "num_rows": 1,
                "stage": bad.stage,
                "reason": bad.reason,
                "message": bad.message,
                "sha256": bad.sha256,
            }
            for block in blocks
            for slot, bad in block.bad_rows.items()
        ]
    for entry in entries:
        entry |= {"file": shard.file.path, "shard": shard.index}
        entry["row"] += shard.first_row
    return sorted(entries, key=lambda entry: entry["row"])


def _to_parquet(table: pa.Table, layout: OutputLayout) -> bytes:
    metadata = {f"nightscore.{name}": value for name, value in layout.metadata.items()}
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression=layout.compression,
        use_dictionary=[field.name for field in table.schema if not _is_diverse(field.type)],
        column_encoding={
            field.name: DELTAS
            for field in table.schema
            # With a dot it may also be the path of text within a struct, which knows no deltas.
            if pa.types.is_int64(field.type) and "." not in field.name
        },
        write_page_checksum=True,
        write_statistics=True,
    )
    return bytes(sink.getvalue())


def _is_diverse(kind: pa.DataType) -> bool:
    """Ids and scores are nearly all different: a dictionary of them takes time and saves nothing.

    1,048,576 rows of an int64 id and a float32 score took 93 ns a row with dictionaries, and 23 ns
    and a third less space without (zstd, Xeon 2.5 GHz).
    """
    diverse = (pa.types.is_int64, pa.types.is_floating, pa.types.is_nested)
    return any(is_kind(kind) for is_kind in diverse)
