"""Verification: whatever was done to a published run, it is noticed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pipeline_cases import DATE, a_job, job_data, publish_night, users, write_input

from pipeline.errors import VerifyError
from pipeline.report import RunReport
from pipeline.verify import verify_published

NUM_ROWS, BAD_ROWS = 60, (25, 33)
UUIDS = pa.array([bytes(16)] * NUM_ROWS, pa.uuid())
TEXTS = pa.array(["more than twelve bytes", "b", None] * 20, pa.string_view())


def night(tmp_path: Path, report: RunReport, passthrough: list[str], **columns: pa.Array) -> Path:
    table = users(NUM_ROWS)
    f1 = [None if row in BAD_ROWS else 1.0 for row in range(NUM_ROWS)]
    table = table.set_column(2, "f1", pa.array(f1, pa.float32()))
    for name, values in columns.items():
        table = table.append_column(name, values)
    write_input(tmp_path / "in", table)
    job = a_job(job_data(tmp_path), input={"passthrough": passthrough})
    return publish_night(job, report)


@pytest.fixture
def folder(tmp_path: Path, a_report: Callable[..., RunReport]) -> Path:
    """A published run of three shards; two rows of the second are in quarantine."""
    return night(tmp_path, a_report(), ["user_id"])


def verify(folder: Path) -> dict[str, Any]:
    return verify_published(str(folder.parent.parent), folder.parent.name, DATE)


def refused(folder: Path) -> str:
    with pytest.raises(VerifyError) as caught:
        verify(folder)
    return str(caught.value)


def test_what_was_published_is_verified(folder: Path) -> None:
    assert verify(folder) == {
        "status": "verified",
        "run_id": "run",
        "rows": NUM_ROWS,
        "scored": NUM_ROWS - 2,
        "quarantined": 2,
        "parts": 3,
        "unreadable_files": 0,
    }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("weight", pa.array([float("nan"), 1.0, None] * 20)),
        ("kind", pa.array(["a", "b", None] * 20).dictionary_encode()),
        ("tags", pa.array([["x"], [], None] * 20)),
        ("vector", pa.array([[1.0, float("nan")]] * NUM_ROWS, pa.list_(pa.float32(), 2))),
        ("wide", pa.array(["a"] * NUM_ROWS, pa.large_string())),
        ("view", pa.array(["a", "b", None] * 20, pa.string_view())),
        ("bytes", pa.array([b"a", b"b", None] * 20, pa.binary_view())),
        ("lists", pa.ListArray.from_arrays(range(NUM_ROWS + 1), TEXTS)),
        ("large", pa.LargeListArray.from_arrays(range(NUM_ROWS + 1), TEXTS)),
        ("pairs", pa.FixedSizeListArray.from_arrays(TEXTS, 1)),
        ("map", pa.MapArray.from_arrays(range(NUM_ROWS + 1), ["k"] * NUM_ROWS, TEXTS)),
        ("listed", pa.ListViewArray.from_arrays(range(NUM_ROWS), [1] * NUM_ROWS, TEXTS)),
        ("uuids", pa.ListArray.from_arrays(range(NUM_ROWS + 1), UUIDS)),
        ("owner", pa.StructArray.from_arrays([UUIDS], ["id"])),
        ("owners", pa.MapArray.from_arrays(range(NUM_ROWS + 1), ["k"] * NUM_ROWS, UUIDS)),
        ("tensor", pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((NUM_ROWS, 2, 2)))),
        ("when", pa.array(range(NUM_ROWS), pa.timestamp("ns", "UTC"))),
        ("nothing", pa.nulls(NUM_ROWS)),
    ],
)
def test_columns_of_all_kinds_are_verified(
    tmp_path: Path, a_report: Callable[..., RunReport], name: str, values: pa.Array
) -> None:
    folder = night(tmp_path, a_report(), ["user_id", name], **{name: values})
    assert verify(folder)["rows"] == NUM_ROWS
    if name in ("weight", "kind", "tags", "when"):
        changed = values.take(pa.array([*range(1, NUM_ROWS), 0]))
        rewrite(
            folder,
            0,
            lambda table: table.set_column(
                table.schema.names.index(name), name, changed.slice(0, len(table))
            ),
        )
        assert f"its user_id, {name} are not those of" in refused(folder)


def test_a_folder_whose_name_looks_like_a_pattern_is_verified(
    tmp_path: Path, a_report: Callable[..., RunReport]
) -> None:
    folder = night(tmp_path / "team[1]*", a_report(), ["user_id"])
    assert verify(folder)["rows"] == NUM_ROWS
    (folder / "more.parquet").write_bytes(b"")
    said = refused(folder)
    assert "['more.parquet'] is only in the folder" in said
    assert "a killed run has left goes with" in said
    (folder / "more.parquet").unlink()
    min(folder.glob("*.parquet")).unlink()
    assert "is only in the manifest; expected all parts" in refused(folder)


@pytest.mark.parametrize("are_listed", [False, True])
def test_views_that_were_changed_are_found(
    tmp_path: Path, a_report: Callable[..., RunReport], are_listed: bool
) -> None:
    values = pa.array(["a", "b", None] * 20, pa.string_view())
    changed = pa.array(["b", "a", None] * 20, pa.large_string())
    if are_listed:
        values, changed = (
            pa.ListArray.from_arrays(range(NUM_ROWS + 1), texts) for texts in (values, changed)
        )
    folder = night(tmp_path, a_report(), ["user_id", "v"], v=values)
    rewrite(folder, 0, lambda table: table.set_column(1, "v", changed.slice(0, len(table))))
    assert "its user_id, v are not those of" in refused(folder)


def test_files_with_narrower_types_give_parts_of_one_table(
    tmp_path: Path, a_report: Callable[..., RunReport]
) -> None:
    narrow = {"name": pa.nulls(30), "size": pa.array([2**31 - 1] * 30, pa.int32())}
    wide = {"name": pa.array(["x"] * 30, pa.large_string()), "size": pa.array([2**62] * 30)}
    for number, columns in enumerate((narrow, wide)):
        table = users(30, first=30 * number)
        for name, values in columns.items():
            table = table.append_column(name, values)
        write_input(tmp_path / "in", table, name=f"{number}.parquet")
    job = a_job(job_data(tmp_path), input={"passthrough": ["user_id", *narrow]})
    folder = publish_night(job, a_report())
    assert verify(folder)["scored"] == 60
    parts = sorted(folder.glob("part-*.parquet"))
    assert len(parts) > 2
    scored = ds.dataset(parts).to_table()
    assert scored["size"].to_pylist() == [2**31 - 1] * 30 + [2**62] * 30
    assert scored["name"].to_pylist() == [None] * 30 + ["x"] * 30
    assert pl.read_parquet(parts).height == 60
    changed = pa.array([1] * 30, pa.int64())
    rewrite(folder, 0, lambda table: table.set_column(2, "size", changed.slice(0, len(table))))
    assert "its user_id, name, size are not those of" in refused(folder)


def test_columns_that_may_not_be_null_are_verified(
    tmp_path: Path, a_report: Callable[..., RunReport]
) -> None:
    table = users(NUM_ROWS)
    schema = table.schema.set(0, pa.field("user_id", pa.int64(), nullable=False))
    write_input(tmp_path / "in", table.cast(schema))
    assert verify(publish_night(a_job(job_data(tmp_path)), a_report()))["rows"] == NUM_ROWS


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "_MANIFEST.json").read_text())
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "_MANIFEST.json").write_text(json.dumps(manifest))


def rewrite(
    folder: Path,
    shard: int,
    change: Callable[[pa.Table], pa.Table],
    kind: str = "part",
    **counts: int,
) -> None:
    """Change a part and the manifest's hash of it too, as a wrong program would have."""
    manifest = manifest_of(folder)
    stored = manifest["parts"][shard][kind]
    path = folder / stored["path"]
    table = change(pq.read_table(io.BytesIO(path.read_bytes())))
    path.unlink()  # it is a hard link to the ledger's
    pq.write_table(table, path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    num_rows = sum(table["num_rows"].to_pylist()) if kind == "quarantine" else len(table)
    stored |= {"num_bytes": len(data), "sha256": digest, "num_rows": num_rows}
    write_manifest(folder, manifest | counts)


def files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("_quarantine/*.parquet")])


@pytest.mark.parametrize("number", range(4))
def test_any_flipped_byte_of_any_part_is_noticed(folder: Path, number: int) -> None:
    path = files(folder)[number]
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 25)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert path.name in refused(folder)
    path.write_bytes(whole)
    assert verify(folder)["status"] == "verified"


@pytest.mark.parametrize("number", range(4))
def test_a_missing_part_is_noticed(folder: Path, number: int) -> None:
    path = files(folder)[number]
    path.unlink()
    assert path.name in refused(folder)


def test_a_cut_off_part_is_noticed(folder: Path) -> None:
    path = files(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert "with another sha256" in refused(folder)


def test_an_extra_part_is_noticed(folder: Path) -> None:
    (folder / "part-99999-extra.parquet").write_bytes(files(folder)[0].read_bytes())
    assert "part-99999-extra.parquet" in refused(folder)


def test_a_dropped_row_is_noticed(folder: Path) -> None:
    rewrite(folder, 0, lambda table: table.slice(1))
    assert "are not those of" in refused(folder)


def test_a_row_twice_is_noticed(folder: Path) -> None:
    rewrite(folder, 0, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    assert "are not those of" in refused(folder)


def test_a_row_in_another_ones_place_is_noticed(folder: Path) -> None:
    rewrite(folder, 0, lambda t: pa.concat_tables([t.slice(0, 3), t.slice(2, 1), t.slice(4)]))
    assert "are not those of" in refused(folder)


def test_rows_in_another_order_are_noticed(folder: Path) -> None:
    rewrite(folder, 0, lambda table: table.take([1, 0, *range(2, len(table))]))
    assert "are not those of" in refused(folder)


def test_a_scored_row_that_is_in_quarantine_too_is_noticed(folder: Path) -> None:
    def add(table: pa.Table) -> pa.Table:
        return pa.concat_tables(
            [
                table,
                table.slice(0, 1).set_column(2, table.schema.field(2), pa.array([30], pa.int64())),
            ]
        )

    rewrite(folder, 1, add, "quarantine")
    assert "are not those of" in refused(folder)


def test_a_row_that_is_in_quarantine_twice_is_noticed(folder: Path) -> None:
    rewrite(folder, 1, lambda t: pa.concat_tables([t, t.slice(0, 1)]), "quarantine")
    assert "a row twice, or of another shard" in refused(folder)


def set_ranges(table: pa.Table, rows: list[int], num_rows: list[int]) -> pa.Table:
    for name, values in (("row", rows), ("num_rows", num_rows)):
        place = table.schema.names.index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, pa.int64()))
    return table


@pytest.mark.parametrize(
    ("rows", "num_rows", "said"),
    [
        ([25, 33], [1, 2], "are not those of"),  # a scored row that is in a range, too
        ([25, 26], [2, 1], "a row twice, or of another shard"),
        ([25, 39], [1, 2], "a row twice, or of another shard"),
        ([19, 33], [2, 1], "a row twice, or of another shard"),
        ([25, 33], [1, 0], "a row twice, or of another shard"),
        ([25, 33], [1, 10**12], "a row twice, or of another shard"),
    ],
)
def test_ranges_that_do_not_fit_are_noticed(
    folder: Path, rows: list[int], num_rows: list[int], said: str
) -> None:
    rewrite(folder, 1, lambda table: set_ranges(table, rows, num_rows), "quarantine")
    assert said in refused(folder)


def test_a_quarantined_row_that_is_gone_is_noticed(folder: Path) -> None:
    rewrite(folder, 1, lambda table: table.slice(1), "quarantine")
    assert "are not those of" in refused(folder)


def test_a_quarantined_row_without_a_reason_is_noticed(folder: Path) -> None:
    def blank(table: pa.Table) -> pa.Table:
        place = table.schema.names.index("reason")
        return table.set_column(place, table.schema.field(place), pa.array(["", "x"]))

    rewrite(folder, 1, blank, "quarantine")
    assert "a row without a reason" in refused(folder)


def test_a_quarantined_row_of_another_file_is_noticed(folder: Path) -> None:
    def move(table: pa.Table) -> pa.Table:
        return table.set_column(0, table.schema.field(0), pa.array(["other", "other"]))

    rewrite(folder, 1, move, "quarantine")
    assert "rows of another file" in refused(folder)


def test_a_shard_that_is_not_in_the_manifest_is_noticed(folder: Path) -> None:
    manifest = manifest_of(folder)
    dropped = manifest["parts"].pop()
    (folder / dropped["part"]["path"]).unlink()
    write_manifest(folder, manifest)
    assert "parts end at row 40; expected 60" in refused(folder)


def test_a_shard_that_is_in_the_manifest_twice_is_noticed(folder: Path) -> None:
    manifest = manifest_of(folder)
    manifest["parts"].append(manifest["parts"][0])
    write_manifest(folder, manifest)
    assert "begins at row 0" in refused(folder)


@pytest.mark.parametrize("name", ["rows", "scored", "quarantined"])
def test_wrong_sums_are_noticed(folder: Path, name: str) -> None:
    manifest = manifest_of(folder)
    write_manifest(folder, manifest | {name: manifest[name] + 1})
    assert f"{name}; counted" in refused(folder)


def test_a_part_of_another_engine_than_the_manifest_says_is_noticed(folder: Path) -> None:
    rewrite(
        folder, 1, lambda table: table.replace_schema_metadata({"nightscore.engine_key": "fedcba"})
    )
    manifest = manifest_of(folder)
    manifest["parts"][1]["engine"] = "0123456789abcdef"
    write_manifest(folder, manifest)
    found = refused(folder)
    assert "scored by engine fedcba by its footer; the manifest says 0123456789ab." in found


def test_rows_of_engines_that_do_not_add_up_are_noticed(folder: Path) -> None:
    manifest = manifest_of(folder)
    manifest["report"]["engines"] = [{"key": "a", "device": None, "rows": NUM_ROWS}]
    write_manifest(folder, manifest)
    assert verify(folder)["rows"] == NUM_ROWS, "parts of earlier versions name none"
    for part in manifest["parts"]:
        rewrite(
            folder,
            part["shard"],
            lambda table: table.replace_schema_metadata({"nightscore.engine_key": "a"}),
        )
    manifest = manifest_of(folder)
    for part in manifest["parts"]:
        part["engine"] = "a"
    write_manifest(folder, manifest)
    assert verify(folder)["rows"] == NUM_ROWS
    manifest["report"]["engines"][0]["rows"] -= 1
    write_manifest(folder, manifest)
    assert "rows of engines; the parts name {'a': 60}" in refused(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"parts": [{}]}', '{"parts": 3, "input": null}', "null"]
)
def test_a_damaged_manifest_is_noticed(folder: Path, text: str) -> None:
    (folder / "_MANIFEST.json").write_text(text)
    assert "_MANIFEST.json: damaged" in refused(folder)


def test_input_that_has_gone_or_has_other_rows_is_noticed(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / f"dt={DATE}" / "part-0.parquet"
    write_input(tmp_path / "in", users(NUM_ROWS + 1))
    assert "61 rows now; 60 when it was scored" in refused(folder)
    write_input(tmp_path / "in", users(NUM_ROWS, first=1))
    assert "are not those of" in refused(folder)
    source.unlink()
    assert "cannot be read any more" in refused(folder)


def test_what_was_never_published_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"not published; expected a _MANIFEST\.json"):
        verify_published(str(tmp_path), "users", DATE)
