"""One suite over the decoders of a CPU: Pillow's pixels, and a bad image costs one row."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from pipeline.blocks import Array, Decoder
from pipeline.config import ImagesInput
from pipeline.decode_images import ImageDecoder
from pipeline.decode_windows import WindowDecoder
from tests.pipeline.pipeline_cases import encoded, photo

SIZE = (48, 64)
CROP = 0.875
GOOD = encoded(photo(128, 96, seed=1))
PNG = encoded(photo(128, 96, seed=2), "PNG")
FILTERS = {
    "linear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
    "lanczos3": Image.Resampling.LANCZOS,
}
MakeDecoder = Callable[[ImagesInput], Decoder]


@pytest.fixture(scope="module", params=["window", "dali"])
def make(request: pytest.FixtureRequest) -> MakeDecoder:
    if request.param == "window":
        return lambda images: WindowDecoder(images, SIZE)
    return lambda images: ImageDecoder(images, SIZE, num_threads=2)


@pytest.fixture(scope="module")
def decoder(make: MakeDecoder) -> Iterator[Decoder]:
    with make(ImagesInput(column="image", crop=CROP, max_pixels=1_000_000)) as opened:
        yield opened


def column(*images: bytes | None, kind: pa.DataType | None = None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"image": pa.array(images, kind or pa.binary())})


def reference(data: bytes, *, crop: float = CROP, interpolation: str = "linear") -> Array:
    """Central square of the upright picture and antialiased resize, with Pillow."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    side = max(1, round(crop * min(image.size)))
    left, top = ((length - side + 1) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIZE[1], SIZE[0]), FILTERS[interpolation]))


def check_pixels(decoder: Decoder, data: bytes, expected: Array) -> None:
    pixels, bad_rows = decoder.decode(column(data))
    assert not bad_rows
    assert (pixels.shape, pixels.dtype) == ((1, *SIZE, 3), np.uint8)
    difference = np.abs(pixels[0].astype(int) - expected)
    assert difference.mean() < 0.5
    assert difference.max() <= 16


def png(header: tuple[int, ...], rows: bytes) -> bytes:
    """A PNG that Pillow does not write; `header` ends with depth, colour, 0, 0 and interlacing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *header)), (b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*both) for both in (*chunks, (b"IEND", b"")))


def interlaced(image: Image.Image) -> bytes:
    pixels = np.asarray(image)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    parts = [pixels[y::down, x::right] for x, y, right, down in (*passes, (0, 1, 1, 2))]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    return png((image.width, image.height, 8, 2, 0, 0, 1), rows)


def of_16_bits(image: Image.Image) -> bytes:
    pixels = np.asarray(image).astype(">u2") * 257
    colour = 2 if pixels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png((image.width, image.height, 16, colour, 0, 0, 0), rows)


def turned(orientation: int, image: Image.Image, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def behind_other_segments(jpeg: bytes) -> bytes:
    """The JPEG with 5 KB of APP13 before all its other segments, EXIF among them."""
    segment = b"\xff\xed" + struct.pack(">H", 2_502) + b"x" * 2_500
    return jpeg[:2] + 2 * segment + jpeg[2:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GOOD, id="jpeg"),
        pytest.param(encoded(photo(500, 375)), id="larger"),
        pytest.param(encoded(photo(375, 500), progressive=True), id="progressive"),
        pytest.param(encoded(photo(300, 200), subsampling=0), id="full-chroma"),
        pytest.param(encoded(photo(300, 200), restart_marker_blocks=2), id="restart-markers"),
        pytest.param(PNG, id="png"),
        pytest.param(encoded(photo().convert("L")), id="grey-jpeg"),
        pytest.param(encoded(photo().convert("L"), "PNG"), id="grey-png"),
        pytest.param(encoded(photo().convert("1"), "PNG"), id="black-and-white-png"),
        pytest.param(encoded(photo(128, 96).convert("P"), "PNG"), id="palette"),
        pytest.param(interlaced(photo(128, 96)), id="interlaced"),
        pytest.param(encoded(photo(20, 15)), id="smaller-than-the-target"),
        pytest.param(encoded(photo(15, 20), "PNG"), id="png-smaller-than-the-target"),
        pytest.param(encoded(photo(5, 5)), id="5x5"),
        pytest.param(encoded(Image.new("RGB", (1, 1), (200, 10, 90)), "PNG"), id="1x1-png"),
        pytest.param(encoded(Image.new("RGB", (1, 1), (120, 120, 120))), id="1x1-jpeg"),
        pytest.param(encoded(photo(300, 1), "PNG"), id="300x1"),
        pytest.param(encoded(photo(1, 300), "PNG"), id="1x300"),
        pytest.param(encoded(photo(1, 300)), id="1x300-jpeg"),
    ],
)
def test_pixels_are_those_of_pillow(decoder: Decoder, data: bytes) -> None:
    check_pixels(decoder, data, reference(data))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_16_bits_are_the_upper_8(decoder: Decoder, mode: str) -> None:
    image = photo(128, 96).convert(mode)
    check_pixels(decoder, of_16_bits(image), reference(encoded(image, "PNG")))


@pytest.mark.parametrize("size", [(160, 96), (96, 160), (100, 99), (99, 100), (120, 100)], ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_before_they_are_cropped(
    decoder: Decoder, orientation: int, size: tuple[int, int]
) -> None:
    data = turned(orientation, photo(*size))
    check_pixels(decoder, data, reference(data))
    behind = behind_other_segments(data)
    check_pixels(decoder, behind, reference(behind))
    in_png = turned(orientation, photo(*size), "PNG")
    check_pixels(decoder, in_png, reference(in_png))


@pytest.mark.parametrize("size", [(120, 100), (100, 120)], ids=str)
@pytest.mark.parametrize("orientation", range(5, 9))
def test_a_small_crop_of_a_picture_on_its_side_is_the_one_of_the_upright_picture(
    make: MakeDecoder, orientation: int, size: tuple[int, int]
) -> None:
    plain, in_png = (turned(orientation, photo(*size), kind) for kind in ("JPEG", "PNG"))
    with make(ImagesInput(column="image", crop=0.5)) as decoder:
        for data in (plain, behind_other_segments(plain), in_png):
            check_pixels(decoder, data, reference(data, crop=0.5))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_every_filter_of_the_job_file_is_pillows(make: MakeDecoder, interpolation: str) -> None:
    images = ImagesInput.model_validate({"column": "image", "interpolation": interpolation})
    with make(images) as decoder:
        for data in (encoded(photo(500, 375)), encoded(photo(40, 30))):
            expected = reference(data, crop=images.crop, interpolation=interpolation)
            check_pixels(decoder, data, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped(decoder: Decoder, mode: str) -> None:
    opaque = photo().convert(mode.removesuffix("A"))
    clear = opaque.copy()
    if mode == "P":
        clear.info["transparency"] = bytes(range(256))
    else:
        clear.putalpha(90)
    pixels, bad_rows = decoder.decode(column(encoded(clear, "PNG"), encoded(opaque, "PNG")))
    assert not bad_rows
    assert np.array_equal(pixels[0], pixels[1])


def test_a_cmyk_jpeg_is_decoded_as_rgb(decoder: Decoder) -> None:
    data = encoded(photo().convert("CMYK"))
    check_pixels(decoder, data, reference(data))


def test_a_jpeg_cut_in_the_middle_that_says_it_is_whole_is_decoded_as_far_as_it_goes(
    decoder: Decoder,
) -> None:
    whole = encoded(photo(300, 200))
    pixels, bad_rows = decoder.decode(column(whole[: len(whole) // 2] + b"\xff\xd9", whole))
    assert not bad_rows  # as with libjpeg everywhere: only a warning
    upper = slice(0, SIZE[0] // 3)
    assert np.abs(pixels[0, upper].astype(int) - pixels[1, upper]).mean() < 0.5


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0xFF
    return bytes(changed)


def sized(jpeg: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


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
    "jpeg-without-height": (sized(GOOD, 0, 128), "decode_failed"),
    "jpeg-that-lies-about-its-size": (sized(GOOD, 65_535, 65_535), "too_many_pixels"),
    "lossless-jpeg": (GOOD.replace(b"\xff\xc0", b"\xff\xc3", 1), "decode_failed"),
    "half-a-png": (PNG[: len(PNG) // 2], "png_chunk_length"),
    "png-with-a-flipped-byte": (flip(PNG, len(PNG) // 2), "decode_failed"),
    "too-large": (encoded(Image.new("1", (2000, 2000)), "PNG"), "too_many_pixels"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_costs_one_row_and_its_neighbours_nothing(decoder: Decoder, kind: str) -> None:
    bad, reason = BAD_IMAGES[kind]
    good = [encoded(photo(seed=seed)) for seed in range(6)]
    expected, _ = decoder.decode(column(*good))
    for slot in (0, 3, 6):
        pixels, bad_rows = decoder.decode(column(*good[:slot], bad, *good[slot:]))
        assert {row: found.reason for row, found in bad_rows.items()} == {slot: reason}
        assert bad_rows[slot].message
        assert (bad_rows[slot].sha256 == "") == (bad is None)
        assert np.array_equal(np.delete(pixels, slot, axis=0), expected)


def test_all_kinds_of_bad_images_in_one_block_are_told_apart(decoder: Decoder) -> None:
    images = [image for image, _ in BAD_IMAGES.values()]
    expected, _ = decoder.decode(column(GOOD, PNG))
    pixels, bad_rows = decoder.decode(column(GOOD, *images, PNG))
    reasons = [bad_rows[row].reason for row in sorted(bad_rows)]
    assert reasons == [reason for _, reason in BAD_IMAGES.values()]
    assert np.array_equal(pixels[[0, -1]], expected)


@pytest.mark.parametrize("kind", ["null", "empty", "png-with-a-flipped-byte"])
def test_a_block_of_bad_images_only_is_survived(decoder: Decoder, kind: str) -> None:
    bad, reason = BAD_IMAGES[kind]
    pixels, bad_rows = decoder.decode(column(*[bad] * decoder.block_rows))
    assert len(pixels) == len(bad_rows) == decoder.block_rows
    assert {found.reason for found in bad_rows.values()} == {reason}
    assert not decoder.decode(column(GOOD))[1]  # and the decoder goes on


def test_earlier_pixels_stay_when_later_blocks_are_decoded(decoder: Decoder) -> None:
    blocks = [column(*[encoded(photo(seed=seed))] * 8) for seed in range(5)]
    kept = [decoder.decode(rows)[0] for rows in blocks]
    copies = [decoder.decode(rows)[0].copy() for rows in blocks]
    assert all(np.array_equal(*pair) for pair in zip(kept, copies, strict=True))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_slices_and_both_sizes_of_binary_are_read_from_where_they_begin(
    decoder: Decoder, kind: pa.DataType
) -> None:
    rows = column(b"before", GOOD, None, PNG, b"after", kind=kind).slice(1, 3)
    pixels, bad_rows = decoder.decode(rows)
    assert list(bad_rows) == [1]
    expected, _ = decoder.decode(column(GOOD, PNG))
    assert np.array_equal(pixels[[0, 2]], expected)


def test_all_nulls_are_read_too(decoder: Decoder) -> None:
    rows = pa.RecordBatch.from_arrays([pa.nulls(3, pa.binary())], ["image"])
    assert len(decoder.decode(rows)[1]) == 3


def test_equal_bytes_have_equal_fingerprints(decoder: Decoder) -> None:
    _, bad_rows = decoder.decode(column(b"junk", b"junk"))
    assert bad_rows[0].sha256 == bad_rows[1].sha256 == hashlib.sha256(b"junk").hexdigest()


def test_decoders_may_be_left_and_entered_again(make: MakeDecoder) -> None:
    decoder = make(ImagesInput(column="image", crop=CROP))
    found = []
    for _ in range(2):
        with decoder:
            found.append(decoder.decode(column(GOOD, PNG))[0])
    assert np.array_equal(*found)
