"""The screen: what must not reach the decoder, and that it costs nothing to say so."""

from __future__ import annotations

import collections
import struct
import time
import zlib

import numpy as np
import pytest
from hostile_inputs import bombs, mutant, strangers
from PIL import Image
from pipeline_cases import as_bytes, encoded, photo

from pipeline.screen import MAX_JPEG_SCANS, Header, Refusal, _count_scans, screen

MAX_PIXELS = 1_000_000
JPEG = encoded(photo())
PNG = encoded(photo(), "PNG")
MANY_SCANS = (
    encoded(photo(), progressive=True)[:-2] + b"\xff\xda\0\x02" * MAX_JPEG_SCANS + JPEG[-2:]
)


def judge(data: bytes, max_pixels: int = MAX_PIXELS) -> Header | Refusal:
    return screen(as_bytes(data), max_pixels)


def png_chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes, width: int = 7, height: int = 7) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


END = png_chunk(b"IEND", b"")


@pytest.mark.parametrize("data", [JPEG, PNG, encoded(photo(), progressive=True)])
def test_good_pictures_pass_with_their_size(data: bytes) -> None:
    assert judge(data) == Header(90, 120, is_suspect=False)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\xff", "format_not_accepted"),
        (b"<!DOCTYPE html>", "format_not_accepted"),
        (b"GIF89a" + b"\0" * 100, "format_not_accepted"),
        (encoded(photo(), "WEBP"), "format_not_accepted"),
        (encoded(photo(), "BMP"), "format_not_accepted"),
        (b"\0" * 20 + JPEG, "format_not_accepted"),
        (PNG[: len(PNG) // 2], "png_chunk_length"),
        (PNG[:-12], "png_chunk_length"),  # IEND is missing
        (PNG[:8], "png_chunk_length"),
        (png_with(png_chunk(b"PLTE", b"abc", 0xF0000000), END), "png_chunk_length"),
        (png_with(png_chunk(b"eXIf", b"MM\0*", 0xF0000000), END), "png_chunk_length"),
        (JPEG[:3], "header_unreadable"),
        (b"\xff\xd8\xff" + b"\0" * 500, "header_unreadable"),
        (png_with(END, width=30_000, height=30_000), "too_many_pixels"),
        (encoded(Image.new("1", (1001, 1000)), "PNG"), "too_many_pixels"),
        (encoded(Image.new("L", (1000, 1001))), "too_many_pixels"),
        (MANY_SCANS, "too_many_jpeg_scans"),
    ],
)
def test_what_must_not_be_decoded_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    began = time.thread_time()  # others may be using the machine
    judged = judge(data)
    assert isinstance(judged, Refusal)
    assert judged.reason == reason
    assert judged.message
    assert time.thread_time() - began < 0.5  # bombs take seconds and gigabytes


def test_as_many_pixels_as_allowed_pass() -> None:
    assert isinstance(judge(encoded(Image.new("L", (1000, 1000)))), Header)


def test_as_many_scans_as_allowed_pass() -> None:
    more = JPEG[:-2] + b"\xff\xda\0\x02" * (MAX_JPEG_SCANS - 1) + JPEG[-2:]
    assert isinstance(judge(more), Header)


@pytest.mark.parametrize("tail", [b"", b"\0" * 40, b"padding" * 5])
def test_a_jpeg_with_its_end_marker_is_no_suspect(tail: bytes) -> None:
    assert judge(JPEG + tail) == Header(90, 120, is_suspect=False)


@pytest.mark.parametrize("data", [JPEG[:-2], JPEG[: len(JPEG) // 2], JPEG + b"\0" * 1000])
def test_a_jpeg_without_an_end_marker_near_its_end_is_a_suspect(data: bytes) -> None:
    assert judge(data) == Header(90, 120, is_suspect=True)


def test_every_cut_of_a_picture_is_judged_without_an_exception() -> None:
    for data in (JPEG, PNG):
        for length in range(0, len(data), 37):
            assert isinstance(judge(data[:length]), Header | Refusal)


def test_scans_are_counted_as_a_search_for_their_marker_counts_them() -> None:
    rng = np.random.default_rng(7)
    for size in range(300):
        # Few values, so that markers are many, begin anywhere and stand side by side.
        longer = rng.choice(np.array([0xFF, 0xDA, 0x00], np.uint8), size + 3)
        for offset in range(3):  # from odd addresses, too
            jpeg = longer[offset : offset + size]
            assert _count_scans(jpeg) == jpeg.tobytes().count(b"\xff\xda")


def test_mutants_are_judged_at_once_and_without_an_exception() -> None:
    """Whatever happened to a picture, and whatever somebody made to do harm."""
    rng = np.random.default_rng(20261121)
    originals = [JPEG, PNG, encoded(photo(), progressive=True), encoded(photo(seed=1))]
    tiny = encoded(photo(8, 8), "PNG")
    odd = [data for data in strangers(photo(20, 20)).values() if data is not None]
    pictures = [*odd, *bombs(JPEG, tiny).values()]
    pictures += [mutant(originals, rng) for _ in range(2_000)]
    slowest_s = 0.0
    reasons: collections.Counter[str] = collections.Counter()
    for picture in pictures:
        began = time.thread_time()  # others may be using the machine
        judged = judge(picture, 40_000_000)
        slowest_s = max(slowest_s, time.thread_time() - began)
        reasons[judged.reason if isinstance(judged, Refusal) else "passed"] += 1
    assert slowest_s < 0.05
    assert reasons["passed"] > 500
    assert reasons.total() - reasons["passed"] > 500
