"""Decoding with DALI: the same pixels as Pillow, and a bad image costs one row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from pipeline_cases import encoded, photo

from pipeline.blocks import Array
from pipeline.config import ImagesInput
from pipeline.decode_windows import WindowDecoder as ImageDecoder

SIZE = (48, 64)
CROP = 0.875
GOOD = encoded(photo(128, 96, seed=1))
PNG = encoded(photo(128, 96, seed=2), "PNG")


@pytest.fixture(scope="module")
def decoder() -> Iterator[ImageDecoder]:
    images = ImagesInput(column="image", crop=CROP, max_pixels=1_000_000)
    with ImageDecoder(images, SIZE) as opened:
        yield opened


def column(*images: bytes | None, kind: pa.DataType | None = None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"image": pa.array(images, kind or pa.binary())})


def reference(data: bytes) -> Array:
    """Central square and antialiased resize with Pillow."""
    import io

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    side = max(1, round(CROP * min(image.size)))
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (round(left), round(top), round(left) + side, round(top) + side)
    resized = image.crop(box).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(160, 128), exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GOOD, id="jpeg"),
        pytest.param(encoded(photo(500, 375)), id="larger"),
        pytest.param(encoded(photo(375, 500), progressive=True), id="progressive"),
        pytest.param(PNG, id="png"),
        pytest.param(encoded(photo().convert("L")), id="grey-jpeg"),
        pytest.param(encoded(photo().convert("L"), "PNG"), id="grey-png"),
        pytest.param(encoded(photo(128, 96).convert("P"), "PNG"), id="palette"),
        pytest.param(rotated_by_exif(), id="rotated-by-exif"),
        pytest.param(encoded(Image.new("RGB", (1, 1), (200, 10, 90)), "PNG"), id="1x1-png"),
        pytest.param(encoded(Image.new("RGB", (1, 1), (120, 120, 120))), id="1x1-jpeg"),
        pytest.param(encoded(Image.new("RGB", (300, 1), (9, 9, 9)), "PNG"), id="300x1"),
    ],
)
def test_pixels_are_those_of_pillow(decoder: ImageDecoder, data: bytes) -> None:
    pixels, bad_rows = decoder.decode(column(data))
    assert not bad_rows
    assert pixels.shape == (1, *SIZE, 3)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels[0].astype(int) - reference(data))
    assert difference.mean() < 1.5
    assert difference.max() < 32


def test_transparency_is_dropped(decoder: ImageDecoder) -> None:
    opaque = photo()
    clear = opaque.copy()
    clear.putalpha(90)
    pixels, bad_rows = decoder.decode(column(encoded(clear, "PNG"), encoded(opaque, "PNG")))
    assert not bad_rows
    assert np.array_equal(pixels[0], pixels[1])


def test_a_cmyk_jpeg_is_decoded_as_rgb(decoder: ImageDecoder) -> None:
    data = encoded(photo().convert("CMYK"))
    pixels, bad_rows = decoder.decode(column(data))
    assert not bad_rows
    # Pillow and DALI turn CMYK into RGB with other rounding; the picture must be the same.
    difference = np.abs(pixels[0].astype(int) - reference(data))
    assert difference.mean() < 6


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0xFF
    return bytes(changed)


BAD_IMAGES = {
    "null": (None, "null"),
    "empty": (b"", "empty"),
    "html": (b"<html>not found</html>", "format_not_accepted"),
    "one-byte": (b"\xff", "format_not_accepted"),
    "noise": (bytes(range(1, 255)) * 20, "format_not_accepted"),
    "half-a-jpeg": (GOOD[: len(GOOD) // 2], "jpeg_truncated"),
    "jpeg-without-end": (GOOD[:-2], "jpeg_truncated"),
    "jpeg-without-pixels": (GOOD[: GOOD.index(b"\xff\xda")] + b"\xff\xd9", "header_unreadable"),
    "jpeg-header-zeroed": (GOOD[:3] + bytes(len(GOOD) - 5) + b"\xff\xd9", "header_unreadable"),
    "half-a-png": (PNG[: len(PNG) // 2], "png_chunk_length"),
    "png-with-a-flipped-byte": (flip(PNG, len(PNG) // 2), "decode_failed"),
    "too-large": (encoded(Image.new("1", (2000, 2000)), "PNG"), "too_many_pixels"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_costs_one_row_and_its_neighbours_nothing(
    decoder: ImageDecoder, kind: str
) -> None:
    bad, reason = BAD_IMAGES[kind]
    good = [encoded(photo(seed=seed)) for seed in range(6)]
    expected, _ = decoder.decode(column(*good))
    for slot in (0, 3, 6):
        pixels, bad_rows = decoder.decode(column(*good[:slot], bad, *good[slot:]))
        assert {row: found.reason for row, found in bad_rows.items()} == {slot: reason}
        assert bad_rows[slot].message
        assert (bad_rows[slot].sha256 == "") == (bad is None)
        assert np.array_equal(np.delete(pixels, slot, axis=0), expected)


def test_all_kinds_of_bad_images_in_one_block_are_told_apart(decoder: ImageDecoder) -> None:
    images = [image for image, _ in BAD_IMAGES.values()]
    expected, _ = decoder.decode(column(GOOD, PNG))
    pixels, bad_rows = decoder.decode(column(GOOD, *images, PNG))
    reasons = [bad_rows[row].reason for row in sorted(bad_rows)]
    assert reasons == [reason for _, reason in BAD_IMAGES.values()]
    assert np.array_equal(pixels[[0, -1]], expected)


@pytest.mark.parametrize("kind", ["null", "empty", "png-with-a-flipped-byte"])
def test_a_block_of_bad_images_only_is_survived(decoder: ImageDecoder, kind: str) -> None:
    bad, reason = BAD_IMAGES[kind]
    pixels, bad_rows = decoder.decode(column(*[bad] * decoder.block_rows))
    assert len(pixels) == len(bad_rows) == decoder.block_rows
    assert {found.reason for found in bad_rows.values()} == {reason}
    assert not decoder.decode(column(GOOD))[1]  # and the decoder goes on


def test_earlier_pixels_stay_when_later_blocks_are_decoded(decoder: ImageDecoder) -> None:
    blocks = [column(*[encoded(photo(seed=seed))] * 8) for seed in range(5)]
    kept = [decoder.decode(rows)[0] for rows in blocks]
    copies = [decoder.decode(rows)[0].copy() for rows in blocks]
    assert all(np.array_equal(*pair) for pair in zip(kept, copies, strict=True))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_slices_and_both_sizes_of_binary_are_read_from_where_they_begin(
    decoder: ImageDecoder, kind: pa.DataType
) -> None:
    rows = column(b"before", GOOD, None, PNG, b"after", kind=kind).slice(1, 3)
    pixels, bad_rows = decoder.decode(rows)
    assert list(bad_rows) == [1]
    expected, _ = decoder.decode(column(GOOD, PNG))
    assert np.array_equal(pixels[[0, 2]], expected)


def test_all_nulls_are_read_too(decoder: ImageDecoder) -> None:
    rows = pa.RecordBatch.from_arrays([pa.nulls(3, pa.binary())], ["image"])
    assert len(decoder.decode(rows)[1]) == 3


def test_equal_bytes_have_equal_fingerprints(decoder: ImageDecoder) -> None:
    import hashlib

    _, bad_rows = decoder.decode(column(b"junk", b"junk"))
    assert bad_rows[0].sha256 == bad_rows[1].sha256 == hashlib.sha256(b"junk").hexdigest()


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos3"])
def test_every_filter_of_the_job_file_exists(interpolation: str) -> None:
    images = ImagesInput.model_validate({"column": "image", "interpolation": interpolation})
    with ImageDecoder(images, SIZE) as decoder:
        pixels, bad_rows = decoder.decode(column(GOOD))
    assert not bad_rows
    assert pixels.shape == (1, *SIZE, 3)
