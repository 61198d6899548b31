"""Look at an encoded image before the decoder does: microseconds, nothing is decoded.

DALI fails a whole batch for one bad image, and some files of a hundred bytes make decoders take
gigabytes. The order of the tests matters: the header parser itself takes 4 GB on a PNG whose
chunk length lies, so formats are told by magic bytes and PNG chunks walked before it sees a file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nvidia import nvimgcodec

JPEG_SIGNATURE = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_JPEG_SCANS = 100
"""A progressive JPEG of 156 kB with 2,000 scans took 28 s to decode."""
MAX_SEGMENTS = 1_000
"""Of a JPEG, before its pixels; cameras write some dozens. Others are empty, and millions."""
MAX_PNG_CHUNKS = 20_000
"""Enough for 40 megapixels in chunks of 8 KiB, which is how libpng writes them."""
JPEG_MARKER, JPEG_SCAN, JPEG_SEQUENTIAL = 0xFF, 0xDA, (0xC0, 0xC1)
START_OF_SCAN = 0xDAFF
"""Bytes FF DA as a little-endian word."""
JPEG_END_WINDOW_BYTES = 64
"""Cameras pad their files a little; longer tails are rare enough to be decoded alone."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says of an image that may go to the decoder."""

    height: int
    width: int
    is_suspect: bool
    """A JPEG without an end marker near its end: mostly cut off, so it is decoded alone first."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an image must not reach the decoder."""

    reason: str
    message: str


def screen(encoded: npt.NDArray[np.uint8], max_pixels: int) -> Header | Refusal:
    """Judge one encoded image, uint8 [bytes]; decodes nothing."""
    if encoded.size == 0:
        return Refusal("empty", "0 bytes")
    head = encoded[:8].tobytes()
    is_png = head == PNG_SIGNATURE
    if not is_png and not head.startswith(JPEG_SIGNATURE):
        return Refusal("format_not_accepted", f"begins with {head!r}; expected JPEG or PNG")
    wrong = _wrong_chunks(encoded.tobytes()) if is_png else _wrong_segments(encoded)
    if wrong:
        return wrong
    try:
        header = nvimgcodec.CodeStream(encoded)
        height, width = int(header.height), int(header.width)
    except RuntimeError as error:
        return Refusal("header_unreadable", str(error).splitlines()[0])
    if height * width > max_pixels:
        return Refusal("too_many_pixels", f"{width} x {height}; at most {max_pixels} are decoded")
    if is_png:
        return Header(height, width, is_suspect=False)
    num_scans = 1 if _has_one_scan(encoded) else _count_scans(encoded)
    if num_scans > MAX_JPEG_SCANS:
        return Refusal("too_many_jpeg_scans", f"{num_scans}; at most {MAX_JPEG_SCANS} are decoded")
    is_suspect = JPEG_END not in encoded[-JPEG_END_WINDOW_BYTES:].tobytes()
    return Header(height, width, is_suspect=is_suspect)


def segments(jpeg: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Marker and first byte of the payload of each segment, up to the first scan.

    Ends early where the file does not go on as JPEG's syntax wants, and after `MAX_SEGMENTS`.
    """
    data = jpeg.data
    position = 2
    for _ in range(MAX_SEGMENTS):
        if position + 10 > len(data) or data[position] != JPEG_MARKER:
            return
        marker = data[position + 1]
        yield marker, position + 4
        if marker == JPEG_SCAN:
            return
        position += 2 + (data[position + 2] << 8 | data[position + 3])


def _wrong_segments(jpeg: npt.NDArray[np.uint8]) -> Refusal | None:
    """None: they are not too many. All else is for the decoder to judge."""
    if sum(1 for _ in segments(jpeg)) < MAX_SEGMENTS:
        return None
    return Refusal("too_many_jpeg_segments", f"at least {MAX_SEGMENTS} before the pixels")


def _has_one_scan(jpeg: npt.NDArray[np.uint8]) -> bool:
    """A JPEG that is not progressive, and whose first scan has all components.

    libjpeg does not read on after such a scan, whatever follows; looking through the file for
    more would cost as much as all other tests.
    """
    num_components = 0
    for marker, start in segments(jpeg):
        if marker in JPEG_SEQUENTIAL:
            num_components = jpeg[start + 5]
        elif marker == JPEG_SCAN:
            return bool(0 < num_components == jpeg[start])
    return False


def _count_scans(jpeg: npt.NDArray[np.uint8]) -> int:
    """Bytes FF DA, counted as 16-bit words from even and from odd positions: two short passes."""
    even, odd = jpeg[: jpeg.size & ~1], jpeg[1 : 1 + ((jpeg.size - 1) & ~1)]
    return sum(int(np.count_nonzero(words.view("<u2") == START_OF_SCAN)) for words in (even, odd))


def _wrong_chunks(png: bytes) -> Refusal | None:
    """None: every chunk lies inside the file, IEND is there, and they are not too many."""
    position = len(PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if position + 12 > len(png):
            break
        length, kind = struct.unpack_from(">I4s", png, position)
        if length > len(png) - position - 12:
            break
        if kind == b"IEND":
            return None
        position += 12 + length
    else:
        return Refusal("too_many_png_chunks", f"more than {MAX_PNG_CHUNKS}")
    return Refusal("png_chunk_length", "a chunk reaches beyond the file, or IEND is missing")
