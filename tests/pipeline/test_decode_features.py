"""Feature columns become the engine's input; an incomplete row costs one row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.blocks import Array, BadRow
from pipeline.config import FeaturesInput
from pipeline.decode_features import FeatureDecoder

NAN, INF = float("nan"), float("inf")


def decode(fill: float | None = None, **columns: pa.Array) -> tuple[Array, dict[int, BadRow]]:
    features = FeaturesInput(columns=tuple(columns), fill_missing=fill)
    first = next(iter(columns.values()))
    is_list = pa.types.is_fixed_size_list(first.type)
    width = first.type.list_size if is_list else len(columns)
    with FeatureDecoder(features, tuple(columns), width) as decoder:
        matrix, bad_rows = decoder.decode(pa.RecordBatch.from_pydict(columns))
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous
    return matrix, bad_rows


def floats(*values: float | None) -> pa.Array:
    return pa.array(values, pa.float32())


def test_columns_stand_side_by_side() -> None:
    matrix, bad_rows = decode(a=floats(1, 2), b=floats(3, 4))
    assert matrix.tolist() == [[1, 3], [2, 4]]
    assert not bad_rows


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int64(), pa.uint16(), pa.float16(), pa.float64(), pa.float32()]
)
def test_all_kinds_of_numbers_are_taken(kind: pa.DataType) -> None:
    values = pa.array(np.array([1, 2]).astype(kind.to_pandas_dtype()))
    with_null = pa.array([1, None], pa.int64()).cast(kind) if kind != pa.float16() else values
    assert decode(a=values)[0].tolist() == [[1], [2]]
    matrix, bad_rows = decode(a=with_null)
    assert matrix[0] == 1
    assert list(bad_rows) == ([] if kind == pa.float16() else [1])


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (None, "feature_missing", "b is null or NaN"),
        (NAN, "feature_missing", "b is null or NaN"),
        (INF, "feature_infinite", "b is infinite"),
        (-INF, "feature_infinite", "b is infinite"),
    ],
)
def test_a_value_that_is_no_number_costs_its_row(
    value: float | None, reason: str, message: str
) -> None:
    matrix, bad_rows = decode(a=floats(1, 2, 3), b=floats(4, value, 6))
    assert matrix.tolist() == [[1, 4], [0, 0], [3, 6]]
    assert list(bad_rows) == [1]
    assert (bad_rows[1].stage, bad_rows[1].reason) == ("decode", reason)
    assert bad_rows[1].message == message
    assert len(bad_rows[1].sha256) == 64


def test_opposite_infinities_do_not_hide_each_other() -> None:
    assert sorted(decode(a=floats(INF, 1, -INF))[1]) == [0, 2]


@pytest.mark.parametrize("column", [pa.array([1.0, 1e39]), pa.array([[1.0], [1e39]])])
def test_a_double_too_large_for_a_float_is_said_to_be_so(column: pa.Array) -> None:
    is_list = pa.types.is_list(column.type)
    _, bad_rows = decode(a=column.cast(pa.list_(pa.float64(), 1)) if is_list else column)
    assert bad_rows[1].reason == "feature_infinite"
    assert bad_rows[1].message == "a[0] is infinite, or beyond float32"


def test_large_values_whose_sum_overflows_are_good() -> None:
    matrix, bad_rows = decode(a=floats(*[3e38] * 100))
    assert not bad_rows
    assert (matrix == np.float32(3e38)).all()


def test_missing_values_are_filled_when_the_job_says_so() -> None:
    matrix, bad_rows = decode(fill=-1.0, a=floats(1, None, NAN), b=floats(INF, 2, 3))
    assert matrix.tolist() == [[0, 0], [-1, 2], [-1, 3]]
    assert bad_rows[0].reason == "feature_infinite"


def test_a_column_without_any_value_is_missing_in_each_row() -> None:
    matrix, bad_rows = decode(a=floats(1, 2), b=pa.nulls(2))
    assert [bad.message for bad in bad_rows.values()] == ["b is null or NaN"] * 2
    matrix, bad_rows = decode(fill=-1.0, a=floats(1, 2), b=pa.nulls(2))
    assert matrix.tolist() == [[1, -1], [2, -1]]
    assert not bad_rows


def test_a_list_of_fixed_size_is_a_row() -> None:
    lists = pa.array([[1, 2], None, [3, None], [5, 6]], pa.list_(pa.float32(), 2))
    matrix, bad_rows = decode(f=lists)
    assert matrix.tolist() == [[1, 2], [0, 0], [0, 0], [5, 6]]
    assert {row: bad.message for row, bad in bad_rows.items()} == {
        1: "f[0] is null or NaN",
        2: "f[1] is null or NaN",
    }
    filled, bad_rows = decode(fill=9.0, f=lists)
    assert filled.tolist() == [[1, 2], [9, 9], [3, 9], [5, 6]]
    assert not bad_rows


def test_sliced_columns_and_lists_are_read_from_where_they_begin() -> None:
    lists = pa.array([[0, 0], [1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)).slice(1)
    matrix, bad_rows = decode(f=lists)
    assert matrix.tolist() == [[1, 2], [0, 0], [3, 4]]
    assert list(bad_rows) == [1]
    matrix, bad_rows = decode(a=floats(9, 1, None, 2).slice(1))
    assert matrix.tolist() == [[1], [0], [2]]
    assert list(bad_rows) == [1]


def test_all_rows_may_be_bad() -> None:
    matrix, bad_rows = decode(a=floats(None, None))
    assert matrix.tolist() == [[0], [0]]
    assert len(bad_rows) == 2


def test_equal_values_have_equal_fingerprints() -> None:
    _, bad_rows = decode(a=floats(1, 1, 2), b=floats(INF, INF, INF))
    assert bad_rows[0].sha256 == bad_rows[1].sha256 != bad_rows[2].sha256


def test_files_of_other_types_are_read_one_after_the_other() -> None:
    features = FeaturesInput(columns=("a", "b"))
    with FeatureDecoder(features, ("a", "b"), 2) as decoder:
        for kind in (pa.float32(), pa.float64(), pa.int16(), pa.float32()):
            columns = {"b": pa.array([3, None], kind), "a": pa.array([1, 2], kind)}
            for slot in range(2):
                row = pa.RecordBatch.from_pydict(columns).slice(slot)
                matrix, bad_rows = decoder.decode(row)
                assert matrix[0].tolist() == ([1, 3] if slot == 0 else [0, 0])
                assert list(bad_rows) == [1 - slot]
