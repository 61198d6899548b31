"""What only the decoder of DALI does; what every decoder does: tests/contracts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pipeline_cases import encoded, photo

from pipeline.config import ImagesInput
from pipeline.decode_images import ImageDecoder

IMAGES = ImagesInput(column="image")
SIZE = (48, 64)
GOOD = [encoded(photo(seed=seed)) for seed in range(6)]


def column(*images: bytes) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"image": pa.array(images, pa.binary())})


def undecodable() -> bytes:
    """A PNG with a wrong byte among its pixels: its headers are whole."""
    data = bytearray(encoded(photo(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def test_its_threads_change_no_pixel() -> None:
    found = []
    for num_threads in (1, 4):
        with ImageDecoder(IMAGES, SIZE, num_threads) as decoder:
            found.append(decoder.decode(column(*GOOD))[0])
    assert np.array_equal(*found)


def test_what_is_said_of_an_undecodable_image_is_one_line() -> None:
    with ImageDecoder(IMAGES, SIZE, num_threads=1) as decoder:
        _, bad_rows = decoder.decode(column(undecodable()))
    assert 0 < len(bad_rows[0].message) <= 300
    assert "\n" not in bad_rows[0].message
    assert not bad_rows[0].message.startswith(("Critical error", "Error in CPU operator"))


def test_where_nvimagecodec_names_nobody_every_image_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ImageDecoder(IMAGES, SIZE, num_threads=1) as decoder:
        expected, _ = decoder.decode(column(*GOOD))
        monkeypatch.setattr(decoder._screen, "undecodable", lambda _: [])
        pixels, bad_rows = decoder.decode(column(*GOOD[:3], undecodable(), *GOOD[3:]))
    assert {slot: row.reason for slot, row in bad_rows.items()} == {3: "decode_failed"}
    assert np.array_equal(np.delete(pixels, 3, axis=0), expected)
