"""Encoded images are read in each form in which writers keep them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from pipeline_cases import encoded, photo

from pipeline.config import ImagesInput
from pipeline.image_column import encoded_images, holds_images
from pipeline.screen_images import ImageScreen

JPEG, PNG = encoded(photo()), encoded(photo(), "PNG")


def hugging_face(values: list[bytes | None]) -> pa.Array:
    fields = [pa.field("bytes", pa.binary()), pa.field("path", pa.string())]
    rows: list[Any] = [value and {"bytes": value, "path": "a.jpg"} for value in values]
    return pa.array([*rows, {"bytes": None, "path": "b.jpg"}], pa.struct(fields))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([PNG, JPEG, None, PNG, None], pa.binary()),
        pa.array([PNG, JPEG, None, PNG, None], pa.large_binary()),
        pa.array([PNG, JPEG, None, PNG, None], pa.binary_view()),
        hugging_face([PNG, JPEG, None, PNG]),
    ],
    ids=lambda column: str(column.type),
)
def test_images_are_the_same_bytes_in_each_form(column: pa.Array) -> None:
    assert holds_images(column.type)
    rows = pa.RecordBatch.from_pydict({"image": column}).slice(1)
    assert encoded_images(rows["image"]).to_pylist() == [JPEG, None, PNG, None]
    with ImageScreen(ImagesInput(column="image")) as images:
        screened = images.screen(rows)
    assert [screened.encoded[slot].tobytes() for slot in (0, 2)] == [JPEG, PNG]
    assert {slot: bad.reason for slot, bad in screened.bad_rows.items()} == {1: "null", 3: "null"}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.struct([("path", pa.binary())]), pa.struct([("bytes", pa.string())])]
)
def test_other_columns_hold_no_images(kind: pa.DataType) -> None:
    assert not holds_images(kind)
