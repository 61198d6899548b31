"""Decode, crop and resize encoded images with DALI; a bad image costs one row.

DALI has no error-tolerant mode: one undecodable image fails its batch and spoils the pipeline
object. So every image is screened first; refused ones leave a placeholder in their slot. When DALI
fails all the same, the pipeline is built anew and the batch searched for the culprits.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from nvidia import nvimgcodec
from nvidia.dali import fn, pipeline_def, types

from pipeline.blocks import Array, BadRow
from pipeline.config import ImagesInput
from pipeline.screen import Header, Refusal, screen

Bytes = npt.NDArray[np.uint8]
BLOCK_ROWS = 64
"""Images that DALI decodes at once on a CPU: enough to keep its threads busy, small enough that
blocks move soon. 16 to 256 measured alike."""
FILTERS = {
    "linear": types.INTERP_LINEAR,
    "cubic": types.INTERP_CUBIC,
    "lanczos3": types.INTERP_LANCZOS3,
}


class ImageDecoder:
    """JPEG and PNG -> uint8 [rows, height, width, 3], RGB, centre-cropped and resized.

    Args:
        images: Column, crop and filter.
        size: Height and width of the engine's input.
        num_threads: CPU threads that decode.
    """

    block_rows = BLOCK_ROWS

    def __init__(self, images: ImagesInput, size: tuple[int, int], num_threads: int) -> None:
        self.columns: tuple[str, ...] = (images.column,)
        self._images = images
        self._size = size
        self._num_threads = num_threads

    def __enter__(self) -> ImageDecoder:
        # Without both arguments nvImageCodec looks for a GPU and decodes nothing.
        self._checker = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,  # it sees one image in thousands
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        )
        self._pipeline = self._build()
        return self

    def __exit__(self, *_: object) -> None:
        del self._pipeline, self._checker

    def _build(self) -> Any:
        pipeline = _decode_graph(
            self._size,
            FILTERS[self._images.interpolation],
            batch_size=self.block_rows,
            num_threads=self._num_threads,
            device_id=None,
            # Depth 1: `run(name=batch)` decodes exactly this batch, so that slots can be named.
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline

    def decode(self, rows: pa.RecordBatch) -> tuple[Array, dict[int, BadRow]]:
        """Decode at most `block_rows` images.

        Returns:
            The pixels, uint8 [rows, height, width, 3]; and why, for each position that holds a
            placeholder.
        """
        column = rows.column(self.columns[0])
        views = views_of(column)
        bad_rows: dict[int, BadRow] = {}
        batch: list[Bytes] = []
        sides: list[np.float32] = []
        nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
        for slot, encoded in enumerate(views):
            if nulls is not None and nulls[slot]:
                judged: Header | Refusal = Refusal("null", "the image is null")
            else:
                judged = self._judge(encoded)
            if isinstance(judged, Refusal):
                bad_rows[slot] = _bad_row("screen", judged.reason, judged.message, encoded)
                batch.append(PLACEHOLDER)
                sides.append(PLACEHOLDER_CROP)
            else:
                batch.append(encoded)
                sides.append(self._crop_side(judged))
        return self._run_isolated(batch, sides, bad_rows), bad_rows

    def _judge(self, encoded: Bytes) -> Header | Refusal:
        judged = screen(encoded, self._images.max_pixels)
        if isinstance(judged, Header) and judged.is_suspect and not self._is_decodable(encoded):
            return Refusal("jpeg_truncated", "no end marker, and it does not decode alone")
        return judged

    def _is_decodable(self, encoded: Bytes) -> bool:
        return self._checker.decode([encoded.tobytes()])[0] is not None

    def _crop_side(self, header: Header) -> np.float32:
        # A centred square is the same whatever way EXIF turns the picture.
        return np.float32(max(1, round(self._images.crop * min(header.height, header.width))))

    def _run(self, batch: list[Bytes], sides: list[np.float32]) -> Array:
        try:
            (output,) = self._pipeline.run(encoded=batch, side=sides)
        except RuntimeError:
            self._pipeline = self._build()  # a pipeline that has failed must not be used again
            raise
        return np.asarray(output.as_tensor())

    def _run_isolated(
        self, batch: list[Bytes], sides: list[np.float32], bad_rows: dict[int, BadRow]
    ) -> Array:
        """Decode; on failure put placeholders where images are bad and decode again."""
        try:
            return self._run(batch, sides)
        except RuntimeError:
            suspects = self._undecodable(batch)
        # nvImageCodec names its failures by slot and agrees with DALI on all files that we know;
        # where it does not, every image is tried alone.
        for slot in suspects or range(len(batch)):
            try:
                self._run([batch[slot]], [sides[slot]])
            except RuntimeError as error:
                bad_rows[slot] = _bad_row("decode", "decode_failed", _reason(error), batch[slot])
                batch[slot], sides[slot] = PLACEHOLDER, PLACEHOLDER_CROP
        return self._run(batch, sides)

    def _undecodable(self, batch: list[Bytes]) -> list[int]:
        decoded = self._checker.decode([encoded.tobytes() for encoded in batch])
        return [slot for slot, image in enumerate(decoded) if image is None]


@pipeline_def  # type: ignore[untyped-decorator]  # DALI has no types
def _decode_graph(size: tuple[int, int], interpolation: types.DALIInterpType) -> Any:
    """Only the crop's window is decoded, then resized: 1.3 times as fast as the whole image."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    side = fn.external_source(name="side", dtype=types.FLOAT, ndim=0)
    # ANY_DATA instead of RGB segfaults on a grey JPEG (DALI 2.4).
    window = fn.decoders.image_crop(
        encoded, device="cpu", output_type=types.RGB, crop_h=side, crop_w=side
    )
    return fn.resize(window, size=size, interp_type=interpolation, antialias=True)


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


def _bad_row(stage: str, reason: str, message: str, encoded: Bytes) -> BadRow:
    digest = "" if reason == "null" else hashlib.sha256(encoded.tobytes()).hexdigest()
    return BadRow(stage=stage, reason=reason, message=message, sha256=digest)


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what is wrong with the image."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = re.compile(
        r"^(Critical error|Error in CPU operator|which was used|encountered:|Error when executing|"
        r"Current pipeline object|Failed to decode sample|File |\S+ = fn\.|[\w.]+\(|\[/|Stacktrace)"
    )
    said = [line for line in lines if not noise.match(line)]
    return (said[0] if said else "DALI and nvImageCodec cannot decode it, and say no more")[:300]


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
PLACEHOLDER_CROP = np.float32(8)
