"""Parts: scored rows and quarantined rows of a shard, as Parquet in memory."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_cases import LAYOUT

from pipeline.blocks import BadRow, ScoredBlock
from pipeline.distribution import MAX_VALUES, from_text
from pipeline.footers import PinnedFile
from pipeline.part import QUARANTINE_SCHEMA, ShardParts, build_parts
from pipeline.plan import LostRows, Shard

FILE = PinnedFile(path="dt=1/a.parquet", num_bytes=1, version="v", footer_sha256="f", num_rows=99)
SHARD = Shard(index=3, file=FILE, row_groups=(2, 3), first_row=40, num_rows=5)
BAD = BadRow(stage="screen", reason="empty", message="0 bytes", sha256="e3b0")
CLASSES = dataclasses.replace(LAYOUT, head="classes")


def scored_block(first: int, num_rows: int, outputs: tuple[Any, ...], *bad: int) -> ScoredBlock:
    ids = pa.array([f"u{first + row}" for row in range(num_rows)])
    return ScoredBlock(
        shard=SHARD,
        first_row=first,
        passthrough=pa.RecordBatch.from_pydict({"user_id": ids}),
        outputs=outputs,
        bad_rows=dict.fromkeys(bad, BAD),
    )


def scores(*values: float) -> tuple[Any, ...]:
    return (np.array(values, np.float32)[:, None],)


def best(*classes: list[int]) -> tuple[Any, ...]:
    ids = np.array(classes, np.int32)
    return ids, 1 / (1 + ids.astype(np.float32))


def read(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data), page_checksum_verification=True)


def build(*blocks: ScoredBlock, layout: Any = LAYOUT) -> ShardParts:
    return build_parts(SHARD, blocks, layout)


def test_good_rows_go_to_the_part_and_bad_ones_to_quarantine() -> None:
    parts = build(scored_block(0, 3, scores(0, 1, 2), 1), scored_block(3, 2, scores(3, 4), 0))
    assert read(parts.part).to_pydict() == {
        "user_id": ["u0", "u2", "u4"],
        "score": [0.0, 2.0, 4.0],
    }
    assert parts.quarantine is not None
    quarantine = read(parts.quarantine)
    assert quarantine.schema.equals(QUARANTINE_SCHEMA)
    assert quarantine["row"].to_pylist() == [41, 43]  # counted within the file
    assert quarantine["shard"].to_pylist() == [3, 3]
    assert set(quarantine["file"].to_pylist()) == {"dt=1/a.parquet"}
    assert (parts.num_scored, parts.num_quarantined, parts.reasons) == (3, 2, {"empty": 2})


def lost(first: int, num_rows: int) -> LostRows:
    return LostRows(first_row=first, num_rows=num_rows, reason="gone", message="row group 3: CRC")


def test_rows_that_cannot_be_read_are_one_entry_however_many_they_are() -> None:
    many = 10**12
    shard = dataclasses.replace(SHARD, num_rows=5 + many, lost=(lost(2, many),))
    blocks = (scored_block(0, 2, scores(0, 1), 1), scored_block(2 + many, 3, scores(3, 4, 5)))
    parts = build_parts(shard, blocks, LAYOUT)
    assert read(parts.part)["score"].to_pylist() == [0.0, 3.0, 4.0, 5.0]
    assert (parts.num_scored, parts.num_quarantined) == (4, 1 + many)
    assert parts.reasons == {"empty": 1, "gone": many}
    assert parts.quarantine is not None
    entries = read(parts.quarantine).to_pylist()
    assert [(entry["row"], entry["num_rows"]) for entry in entries] == [(41, 1), (42, many)]
    assert entries[1] == {
        "file": "dt=1/a.parquet",
        "shard": 3,
        "row": 42,
        "num_rows": many,
        "stage": "read",
        "reason": "gone",
        "message": "row group 3: CRC",
        "sha256": "",
    }


def test_a_shard_without_a_row_that_can_be_read_has_a_part_with_the_columns() -> None:
    shard = dataclasses.replace(SHARD, lost=(lost(0, 2), lost(2, 3)))
    parts = build_parts(shard, [scored_block(0, 1, scores(1), 0)], LAYOUT)
    table = read(parts.part)
    assert (len(table), table.schema.names) == (0, ["user_id", "score"])
    assert (parts.num_scored, parts.num_quarantined, parts.reasons) == (0, 5, {"gone": 5})
    assert parts.quarantine is not None
    assert read(parts.quarantine)["row"].to_pylist() == [40, 42]


def test_without_bad_rows_there_is_no_quarantine_part() -> None:
    parts = build(scored_block(0, 2, scores(1, 2)))
    assert parts.quarantine is None
    assert parts.reasons == {}


def test_a_shard_of_bad_rows_only_still_has_a_part_with_the_columns() -> None:
    parts = build(scored_block(0, 2, scores(1, 2), 0, 1))
    table = read(parts.part)
    assert (len(table), table.schema.names) == (0, ["user_id", "score"])
    assert (parts.num_scored, parts.num_quarantined) == (0, 2)


def test_the_best_class_has_a_name() -> None:
    layout = dataclasses.replace(CLASSES, class_names=("cat", "dog", "bird"))
    table = read(build(scored_block(0, 2, best([2], [0])), layout=layout).part)
    assert table.to_pydict() == {
        "user_id": ["u0", "u1"],
        "class_id": [2, 0],
        "class_name": ["bird", "cat"],
        "probability": [pytest.approx(1 / 3), 1.0],
    }


def test_several_classes_are_lists_beside_the_best_one() -> None:
    table = read(build(scored_block(0, 2, best([2, 1], [0, 1]), 0), layout=CLASSES).part)
    assert table["class_id"].to_pylist() == [0]
    assert table["top_class_ids"].to_pylist() == [[0, 1]]
    assert table["top_probabilities"].to_pylist() == [[1.0, 0.5]]
    assert "class_name" not in table.schema.names


def test_a_score_of_several_values_is_a_list() -> None:
    outputs = (np.arange(6, dtype=np.float32).reshape(2, 3),)
    table = read(build(scored_block(0, 2, outputs)).part)
    assert table["score"].to_pylist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_the_footer_says_where_it_comes_from() -> None:
    metadata = read(build(scored_block(0, 1, scores(1))).part).schema.metadata
    assert metadata == {b"nightscore.run_id": b"r"}


def test_a_flipped_byte_is_noticed() -> None:
    parts = build(scored_block(0, 5, scores(1, 2, 3, 4, 5)))
    data = bytearray(parts.part)
    data[data.index(b"u0")] ^= 1
    with pytest.raises(OSError, match="CRC"):
        read(bytes(data))


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_the_compression_is_the_jobs(compression: str) -> None:
    layout = dataclasses.replace(LAYOUT, compression=compression)
    data = build(scored_block(0, 1, scores(1)), layout=layout).part
    found = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0).compression
    assert found == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())


def test_passthrough_columns_keep_their_types() -> None:
    columns = {
        "day": pa.array([1, 2], pa.date32()),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "wide": pa.array(["x", None], pa.large_string()),
        "when": pa.array([1, 2], pa.timestamp("us", "UTC")),
        "some": pa.array([[1], []], pa.list_(pa.int8())),
    }
    block = ScoredBlock(
        shard=SHARD,
        first_row=0,
        passthrough=pa.RecordBatch.from_pydict(columns),
        outputs=scores(1, 2),
        bad_rows={},
    )
    table = read(build(block).part)
    assert [table.schema.field(name).type for name in columns] == [c.type for c in columns.values()]
    assert all(table[name].to_pylist() == column.to_pylist() for name, column in columns.items())


TEXTS = pa.array(["more than twelve bytes", "b", None], pa.string_view())


@pytest.mark.parametrize(
    "column",
    [
        pa.StructArray.from_arrays([TEXTS], ["a"]),
        pa.StructArray.from_arrays([TEXTS.cast(pa.binary_view())], ["a"]),
        pa.ListArray.from_arrays([0, 1, 3, 3], TEXTS),
        pa.ListArray.from_arrays([0, 1, 3, 3], pa.StructArray.from_arrays([TEXTS], ["a"])),
        pa.FixedSizeListArray.from_arrays(TEXTS, 1),
        pa.MapArray.from_arrays([0, 1, 1, 3], pa.array(["x", "y", "z"], pa.string_view()), TEXTS),
    ],
    ids=lambda column: str(column.type),
)
def test_views_within_lists_and_structs_may_have_bad_rows(column: pa.Array) -> None:
    rows = pa.RecordBatch.from_pydict({"tags": column})
    block = dataclasses.replace(scored_block(0, 3, scores(0, 1, 2), 1), passthrough=rows)
    first, _, last = column.to_pylist()
    assert read(build(block).part)["tags"].to_pylist() == [first, last]


def test_only_values_that_repeat_get_a_dictionary() -> None:
    rows = pa.RecordBatch.from_pydict(
        {"user_id": pa.array(range(5)), "country": ["ch", "de", "ch", "de", "ch"]}
    )
    block = dataclasses.replace(scored_block(0, 5, scores(0, 1, 2, 3, 4)), passthrough=rows)
    part = build(block).part
    group = pq.ParquetFile(io.BytesIO(part)).metadata.row_group(0)
    columns = [group.column(position) for position in range(group.num_columns)]
    has_dictionary = {column.path_in_schema: column.has_dictionary_page for column in columns}
    assert has_dictionary == {"user_id": False, "country": True, "score": False}
    assert read(part)["user_id"].to_pylist() == list(range(5))


def test_a_column_may_be_named_like_the_path_of_another() -> None:
    rows = pa.RecordBatch.from_pydict({"a": [{"b": "x"}, {"b": "y"}], "a.b": [1, 2]})
    block = dataclasses.replace(scored_block(0, 2, scores(0, 1)), passthrough=rows)
    assert read(build(block).part).drop_columns("score").to_pylist() == rows.to_pylist()


@pytest.mark.parametrize("bad", [(), range(0, 9_000, 3)], ids=["good", "a-third-bad"])
def test_the_scores_of_a_large_shard_are_counted_all_over_its_rows(bad: Any) -> None:
    """Values rise with the rows, so that each part of the shard has bins of its own."""
    rows_per_block, num_blocks = 9_000, 50
    num_rows = rows_per_block * num_blocks
    shard = dataclasses.replace(SHARD, num_rows=num_rows)
    values = np.linspace(0, 1, num_rows, dtype=np.float32).reshape(num_blocks, -1)
    blocks = [
        dataclasses.replace(
            scored_block(
                0, rows_per_block, (np.int32([[7]] * rows_per_block), each[:, None]), *bad
            ),
            shard=shard,
            first_row=index * rows_per_block,
        )
        for index, each in enumerate(values)
    ]
    parts = build_parts(shard, blocks, CLASSES)
    counted = from_text(parts.scores, parts.num_scored)
    share = parts.num_scored / num_rows
    assert 0.95 * MAX_VALUES * share < counted.num_values <= MAX_VALUES * share * 1.01
    assert counted.classes == {7: pytest.approx(parts.num_scored)}
    assert list(counted.bins.values()) == pytest.approx([parts.num_scored / 20] * 20, rel=0.02)


def test_bad_rows_are_not_counted_among_the_scores() -> None:
    parts = build(scored_block(0, 3, scores(1, 9, 1), 1), scored_block(3, 2, scores(1, 9), 1))
    assert list(from_text(parts.scores).bins.values()) == [3]
    assert build(scored_block(0, 2, scores(1, 2), 0, 1)).scores == ""
