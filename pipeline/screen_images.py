"""Screen encoded images before a decoder sees them; a placeholder takes each bad one's slot."""

from __future__ import annotations

import hashlib
import itertools
import struct
import zlib
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from nvidia import nvimgcodec

from pipeline.blocks import BadRow
from pipeline.config import ImagesInput
from pipeline.image_column import encoded_images
from pipeline.screen import Header, Refusal, screen

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenedImages:
    """What goes to the decoder for some rows. The lists change when more images turn out bad."""

    encoded: list[Bytes]
    """One view for each row, on Arrow's memory or on the placeholder's."""
    sides: list[np.float32]
    """Pixels of the side of the central square that is kept."""
    bad_rows: dict[int, BadRow]
    """Slot that holds the placeholder -> why."""

    def refuse(self, slot: int, stage: str, reason: str, message: str) -> None:
        """Put the placeholder into a slot, and note why."""
        image = self.encoded[slot].tobytes()
        digest = "" if reason == "null" else hashlib.sha256(image).hexdigest()
        self.bad_rows[slot] = BadRow(stage=stage, reason=reason, message=message, sha256=digest)
        self.encoded[slot], self.sides[slot] = PLACEHOLDER, PLACEHOLDER_SIDE


class ImageScreen:
    """Judges blocks of images; a context manager that owns nvImageCodec's decoder on the CPU.

    Several threads may ask at once: suspects are few, so they wait for each other.

    Args:
        images: Column, crop and limits.
    """

    def __init__(self, images: ImagesInput) -> None:
        self._images = images
        self._lock = Lock()

    def __enter__(self) -> ImageScreen:
        self._checker = make_codec()
        return self

    def __exit__(self, *_: object) -> None:
        del self._checker

    def screen(self, rows: pa.RecordBatch) -> ScreenedImages:
        """Look at each image of the block's column; only suspects are decoded."""
        column = encoded_images(rows.column(self._images.column))
        views = views_of(column)
        nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
        screened = ScreenedImages(encoded=views, sides=[PLACEHOLDER_SIDE] * len(views), bad_rows={})
        for slot, encoded in enumerate(views):
            if nulls is not None and nulls[slot]:
                judged: Header | Refusal = Refusal("null", "the image is null")
            else:
                judged = self._judge(encoded)
            if isinstance(judged, Refusal):
                screened.refuse(slot, "screen", judged.reason, judged.message)
            else:
                screened.sides[slot] = self._crop_side(judged)
        return screened

    def undecodable(self, encoded: list[Bytes]) -> list[int]:
        """Positions of the images that nvImageCodec cannot decode on the CPU."""
        with self._lock:  # a codec that two threads use at once crashes the process
            decoded = self._checker.decode([image.tobytes() for image in encoded])
        return [position for position, image in enumerate(decoded) if image is None]

    def _judge(self, encoded: Bytes) -> Header | Refusal:
        judged = screen(encoded, self._images.max_pixels)
        if isinstance(judged, Header) and judged.is_suspect and self.undecodable([encoded]):
            return Refusal("jpeg_truncated", "no end marker, and it does not decode alone")
        return judged

    def _crop_side(self, header: Header) -> np.float32:
        # A centred square is the same whatever way EXIF turns the picture.
        return np.float32(max(1, round(self._images.crop * min(header.height, header.width))))


def make_codec() -> nvimgcodec.Decoder:
    """A decoder of nvImageCodec that works in the calling thread."""
    # Without both arguments it looks for a GPU and decodes nothing.
    return nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
    )


def views_of(column: pa.Array) -> list[Bytes]:
    """One read-only uint8 view for each value of a binary column; no image byte is copied."""
    wide = pa.types.is_large_binary(column.type)
    offset_type = np.dtype(np.int64 if wide else np.int32)
    _, offsets_buffer, data_buffer = column.buffers()
    first_byte = column.offset * offset_type.itemsize  # slices share their parent's buffers
    offsets = np.frombuffer(offsets_buffer, offset_type, len(column) + 1, first_byte)
    data = np.frombuffer(data_buffer or b"", np.uint8)
    data.flags.writeable = False
    return [data[start:stop] for start, stop in itertools.pairwise(offsets.tolist())]


def _grey_png() -> bytes:
    """A grey picture of 8 x 8 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\x80" * 24) * 8)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


PLACEHOLDER = np.frombuffer(_grey_png(), np.uint8)
PLACEHOLDER_SIDE = np.float32(8)
