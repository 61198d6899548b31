"""The one type of a column that the files of a date have in several."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from pipeline.column_types import common_type

WORDS = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (pa.int8(), pa.int64(), pa.int64()),
        (pa.uint32(), pa.int32(), pa.int64()),
        (pa.uint8(), pa.uint64(), pa.uint64()),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.decimal128(5, 2), pa.decimal128(12, 4), pa.decimal128(12, 4)),
        (pa.decimal128(5, 0), pa.decimal128(5, 3), pa.decimal128(8, 3)),
        (pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("s", "UTC"), pa.timestamp("us", "UTC"), pa.timestamp("us", "UTC")),
        (pa.null(), pa.large_string(), pa.string()),
        (pa.null(), pa.list_(pa.float32(), 2), pa.list_(pa.float32(), 2)),
        (WORDS, pa.large_string(), pa.string()),
        (WORDS, pa.dictionary(pa.int32(), pa.string(), ordered=True), pa.string()),
        (pa.list_(pa.null()), pa.large_list(pa.string()), pa.list_(pa.string())),
        (
            pa.struct([("a", pa.int32()), ("b", pa.null())]),
            pa.struct([("a", pa.int64()), ("b", pa.string())]),
            pa.struct([("a", pa.int64()), ("b", pa.string())]),
        ),
    ],
)
def test_the_wider_type_holds_both(one: pa.DataType, other: pa.DataType, common: Any) -> None:
    assert common_type(one, other) == common
    assert common_type(other, one) == common
    for kind in (one, other):
        assert pa.nulls(2, kind).cast(common).type == common


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.int64(), pa.float64()),
        (pa.uint64(), pa.int8()),
        (pa.int64(), pa.string()),
        (pa.string(), pa.binary()),
        (pa.bool_(), pa.int8()),
        (pa.date32(), pa.timestamp("us")),
        (pa.timestamp("us"), pa.timestamp("ns")),
        (pa.timestamp("us"), pa.timestamp("us", "UTC")),
        (pa.decimal128(38, 0), pa.decimal128(38, 10)),
        (pa.list_(pa.int64()), pa.int64()),
        (pa.list_(pa.int64()), pa.list_(pa.string())),
        (pa.struct([("a", pa.int64())]), pa.struct([("b", pa.int64())])),
        (pa.struct([("a", pa.int64())]), pa.struct([("a", pa.string())])),
        (pa.dictionary(pa.int32(), pa.int64()), WORDS),
    ],
)
def test_there_is_none_where_a_value_would_change(one: pa.DataType, other: pa.DataType) -> None:
    assert common_type(one, other) is None
    assert common_type(other, one) is None


@pytest.mark.parametrize(
    ("one", "other", "largest"),
    [
        (pa.uint32(), pa.int32(), 2**32 - 1),
        (pa.int32(), pa.int64(), -(2**31)),
        (pa.timestamp("s"), pa.timestamp("us"), datetime.datetime(9999, 12, 31)),
        (pa.decimal128(5, 0), pa.decimal128(5, 3), Decimal(99999)),
        (pa.float32(), pa.float64(), 3.4028234663852886e38),
    ],
)
def test_the_largest_value_of_the_narrower_type_stays(
    one: pa.DataType, other: pa.DataType, largest: Any
) -> None:
    column = pa.array([largest], one)
    assert column.cast(common_type(one, other)).to_pylist() == [largest]
