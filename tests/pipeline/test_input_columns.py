"""Columns: which of them a job reads, and in what all files of a date must agree."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pipeline_cases import a_job, a_plan, images_data, job_data, users, write_input

from pipeline.config import Job
from pipeline.errors import ConfigError


def planning_fails(job: Job) -> str:
    with pytest.raises(ConfigError) as caught:
        a_plan(job)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_feature_globs_expand_in_the_order_of_the_schema(tmp_path: Path) -> None:
    table = pa.table({"f2": [1.0], "user_id": [1], "f1": [2], "g": [1.0]})
    write_input(tmp_path / "in", table)
    plan = a_plan(a_job(job_data(tmp_path), input={"features": {"columns": ["g", "f*", "f2"]}}))
    assert plan.feature_columns == ("g", "f2", "f1")
    assert plan.num_features == 3


def test_a_column_that_is_named_is_no_glob_whatever_its_name(tmp_path: Path) -> None:
    table = pa.table({"user_id": [1], "f0": [0.0], "f1": [0.0], "f[0]": [1.0], "f[1]": [1.0]})
    write_input(tmp_path / "in", table)
    job = a_job(job_data(tmp_path), input={"features": {"columns": ["f[1]", "f[0]", "f[01]"]}})
    assert a_plan(job).feature_columns == ("f[1]", "f[0]", "f0", "f1")


def test_a_fixed_size_list_counts_its_values(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3))
    write_input(tmp_path / "in", pa.table({"user_id": [1], "f": lists}))
    assert a_plan(a_job(job_data(tmp_path))).num_features == 3


def test_a_wrong_column_name_comes_with_the_likely_one(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5))
    said = planning_fails(a_job(job_data(tmp_path), input={"passthrough": ["userid"]}))
    assert "no column `userid`; expected it because of `input.passthrough`" in said
    assert said.endswith("Did you mean `user_id`?")
    wrong = a_job(job_data(tmp_path), input={"features": {"columns": ["zz*"]}})
    assert planning_fails(wrong).endswith("It has: user_id, f0, f1.")
    wrong = a_job(images_data(tmp_path))
    assert "no column `image`" in planning_fails(wrong)


def test_a_column_that_only_some_files_have_is_named_with_the_file(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), name="a.parquet")
    path = write_input(tmp_path / "in", users(5).drop(["f1"]), name="b.parquet")
    said = planning_fails(a_job(job_data(tmp_path)))
    assert said.startswith(f"{path}: no column `f1`; expected it, as in other files of the date.")
    assert said.endswith("1 of 2 files is like this, the others fit the job: write the file again.")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = users(5)
    twice = pa.table([*table.columns, table["f0"]], [*table.schema.names, "f0"])
    write_input(tmp_path / "in", twice)
    assert "column `f0` twice" in planning_fails(a_job(job_data(tmp_path)))


@pytest.mark.parametrize("odd", ["a.parquet", "b.parquet"])
def test_which_of_the_files_is_wrong_is_told_wherever_it_comes(tmp_path: Path, odd: str) -> None:
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        table = users(5)
        table = table.set_column(1, "f0", pa.array(["x"] * 5)) if name == odd else table
        write_input(tmp_path / "in", table, name=name)
    said = planning_fails(a_job(job_data(tmp_path)))
    assert f"{odd}: column `f0` is string" in said
    assert "1 of 3 files is like this" in said


def job_with_ids(root: Path, one: pa.DataType, other: pa.DataType) -> Job:
    """Copies a column `id`, which has another type in the second of three files."""
    for name, kind in (("a.parquet", one), ("b.parquet", other), ("c.parquet", one)):
        table = users(5)
        write_input(root / "in", table.append_column("id", pa.nulls(5, kind)), name=name)
    return a_job(job_data(root), input={"passthrough": ["user_id", "id"]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.int64(), pa.string()),
        (pa.int64(), pa.float64()),
        (pa.list_(pa.int64()), pa.list_(pa.string())),
        (pa.struct([("a", pa.int64())]), pa.struct([("b", pa.int64())])),
    ],
)
def test_columns_of_a_part_have_one_type_in_all_files(
    tmp_path: Path, one: pa.DataType, other: pa.DataType
) -> None:
    said = planning_fails(job_with_ids(tmp_path, one, other))
    assert "b.parquet: column `id` is " in said
    assert "as in other files of the date, because of `input.passthrough`. 1 of 3 files" in said
    assert a_plan(a_job(job_data(tmp_path))).num_rows == 15, "nobody reads it"


NOT_NULL = pa.field("item", pa.string_view(), nullable=False)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.string(), pa.large_string()),
        (pa.string_view(), pa.large_string()),
        (pa.binary(), pa.large_binary()),
        (pa.list_(pa.string()), pa.large_list(NOT_NULL)),
        (pa.struct([("a", pa.string())]), pa.struct([("a", pa.large_string())])),
    ],
)
def test_types_that_parquet_keeps_alike_are_one(
    tmp_path: Path, one: pa.DataType, other: pa.DataType
) -> None:
    assert a_plan(job_with_ids(tmp_path, one, other)).num_rows == 15


@pytest.mark.parametrize(
    ("one", "other"), [(pa.null(), pa.string()), (pa.int32(), pa.int64()), (pa.int64(), pa.int32())]
)
def test_a_column_that_some_files_have_narrower_gets_the_wider_type_in_all_parts(
    tmp_path: Path, one: pa.DataType, other: pa.DataType
) -> None:
    job = job_with_ids(tmp_path, one, other)
    (wider,) = {one, other} - {pa.null(), pa.int32()}
    assert a_plan(job).wider_types == {"id": wider}


def test_a_column_that_is_never_null_is_like_one_that_may_be(tmp_path: Path) -> None:
    table = users(5)
    not_null = pa.schema([pa.field(each.name, each.type, nullable=False) for each in table.schema])
    write_input(tmp_path / "in", table, name="a.parquet")
    write_input(tmp_path / "in", table.cast(not_null), name="b.parquet")
    assert a_plan(a_job(job_data(tmp_path))).num_rows == 10


def test_when_no_file_fits_it_is_the_job_that_is_wrong(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        write_input(tmp_path / "in", users(5), name=name)
    wrong = a_job(job_data(tmp_path), input={"passthrough": ["id"]})
    assert "files" not in planning_fails(wrong)


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["text"]),
        pa.array([True]),
        pa.array([[1.0, 2.0]]),
        pa.array([["x"]], pa.list_(pa.string(), 1)),
        pa.array([b"bytes"]),
    ],
)
def test_features_must_be_numbers(tmp_path: Path, values: pa.Array) -> None:
    write_input(tmp_path / "in", pa.table({"user_id": [1], "f0": values}))
    said = planning_fails(a_job(job_data(tmp_path)))
    assert "column `f0` is " in said
    assert "expected integers or floats, or one column of fixed-size lists of them" in said


def test_lists_cannot_be_mixed_with_columns(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))
    write_input(tmp_path / "in", pa.table({"user_id": [1], "f0": lists, "f1": [1.0]}))
    assert "column `f0`" in planning_fails(a_job(job_data(tmp_path)))


def test_lists_of_another_length_in_a_later_file_are_refused(tmp_path: Path) -> None:
    for size in (2, 4):
        lists = pa.array([[1.0] * size] * 2, pa.list_(pa.float32(), size))
        table = pa.table({"user_id": [1, 2], "f": lists})
        path = write_input(tmp_path / "in", table, name=f"{size}.parquet")
    said = planning_fails(a_job(job_data(tmp_path)))
    assert said.startswith(str(path))


def test_images_must_be_binary(tmp_path: Path) -> None:
    write_input(tmp_path / "in", pa.table({"user_id": [1], "image": ["text"]}))
    said = planning_fails(a_job(images_data(tmp_path)))
    assert "column `image` is string; expected binary with encoded images" in said


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_images_may_be_binary_of_any_kind(tmp_path: Path, kind: pa.DataType) -> None:
    write_input(tmp_path / "in", pa.table({"user_id": [1], "image": pa.array([b"x"], kind)}))
    assert a_plan(a_job(images_data(tmp_path))).num_features == 0


def test_images_may_be_in_the_struct_that_hugging_face_writes(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"x", "path": None}])
    write_input(tmp_path / "in", pa.table({"user_id": [1], "image": images}))
    assert a_plan(a_job(images_data(tmp_path))).num_features == 0
    write_input(tmp_path / "in", pa.table({"user_id": [1], "image": images.field("path")}))
    said = planning_fails(a_job(images_data(tmp_path)))
    assert "or a struct with them in a field `bytes`. Check `input.images.column`." in said


def test_globs_must_give_one_order_of_features_in_all_files(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), name="a.parquet")
    path = write_input(tmp_path / "in", users(5).select(["f1", "f0", "user_id"]), name="b.parquet")
    said = planning_fails(a_job(job_data(tmp_path)))
    assert said.startswith(
        f"{path}: feature 1 is column `f1`; expected `f0`, as in other files of the date. In "
        "`input.features.columns` name the columns without globs, in the model's order."
    )
    named = a_job(job_data(tmp_path), input={"features": {"columns": ["f0", "f1"]}})
    assert a_plan(named).feature_columns == ("f0", "f1")


def test_a_feature_more_in_some_files_is_told_with_its_name(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), name="a.parquet")
    table = users(5)
    path = write_input(tmp_path / "in", table.append_column("f2", table["f1"]), name="b.parquet")
    said = planning_fails(a_job(job_data(tmp_path)))
    assert said.startswith(f"{path}: column `f2` is a feature; expected none more, as in other")


def test_a_file_without_rows_may_have_any_columns(tmp_path: Path) -> None:
    nothing = pa.table({"f0": pa.nulls(0), "x": pa.nulls(0)})
    write_input(tmp_path / "in", nothing, name="a.parquet")
    write_input(tmp_path / "in", users(5), name="b.parquet")
    plan = a_plan(a_job(job_data(tmp_path)))
    assert (plan.num_rows, plan.feature_columns) == (5, ("f0", "f1"))


def test_a_feature_may_have_no_value_in_a_file(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), name="a.parquet")
    unknown = users(5).set_column(2, "f1", pa.nulls(5))
    write_input(tmp_path / "in", unknown, name="b.parquet")
    assert a_plan(a_job(job_data(tmp_path))).num_rows == 10
