"""Decode, crop and resize encoded images on a CPU's cores, each image on one of them.

Only the window of the crop is decoded, by nvImageCodec (libjpeg-turbo), which is what DALI decodes
with on a CPU, too; cykooz.resizer resizes it with SIMD instructions. Without DALI's pipeline in
between, decoder and engine share a core's cache, and a bad image is simply told by name.
"""

from __future__ import annotations

import threading

import cykooz_resizer as resizer
import numpy as np
import pyarrow as pa
from nvidia import nvimgcodec

from pipeline.block_size import BLOCK_ROWS
from pipeline.blocks import Array, BadRow, Decoder
from pipeline.config import ImagesInput
from pipeline.screen import JPEG_SCAN, segments
from pipeline.screen_images import Bytes, ImageScreen, ScreenedImages, make_codec

FILTERS = {
    "linear": resizer.FilterType.bilinear,
    "cubic": resizer.FilterType.catmull_rom,
    "lanczos3": resizer.FilterType.lanczos3,
}
"""Antialiased convolutions; `cubic` has a = -0.5, as in Pillow and DALI."""
JPEG_EXIF_SEGMENT = 0xE1
EXIF_SIGNATURE = b"Exif\0\0"


class WindowDecoder(Decoder):
    """JPEG and PNG -> uint8 [rows, height, width, 3], RGB, centre-cropped and resized.

    `decode` may be called from many threads at once; each has its own codec and buffers.

    Args:
        images: Column, crop and filter.
        size: Height and width of the engine's input.
        block_rows: Images of a block.
    """

    def __init__(
        self, images: ImagesInput, size: tuple[int, int], block_rows: int = BLOCK_ROWS["window"]
    ) -> None:
        self.columns = (images.column,)
        self.block_rows = block_rows
        self._size = size
        self._filter = FILTERS[images.interpolation]
        self._screen = ImageScreen(images)

    def __enter__(self) -> WindowDecoder:
        self._local = threading.local()
        self._screen.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._screen.__exit__(*error)
        del self._local

    def decode(self, rows: pa.RecordBatch) -> tuple[Array, dict[int, BadRow]]:
        """Decode images one after the other; see `pipeline.blocks.Decoder`."""
        screened = self._screen.screen(rows)
        pixels = np.empty((len(screened.encoded), *self._size, 3), np.uint8)
        for slot in range(len(pixels)):
            pixels[slot] = self._decode_slot(screened, slot)
        return pixels, screened.bad_rows

    def _decode_slot(self, screened: ScreenedImages, slot: int) -> Array:
        if not hasattr(self._local, "tools"):
            self._local.tools = _ThreadTools(self._size, self._filter)
        tools: _ThreadTools = self._local.tools
        pixels = tools.decode(screened.encoded[slot], int(screened.sides[slot]))
        if pixels is None:
            screened.refuse(slot, "decode", "decode_failed", "nvImageCodec cannot decode it")
            return self._decode_slot(screened, slot)  # the placeholder, which does decode
        return pixels


class _ThreadTools:
    """Codec, resizer and buffers of one thread: no memory is taken per image."""

    def __init__(self, size: tuple[int, int], filter_type: resizer.FilterType) -> None:
        height, width = size
        self._shape = (height, width, 3)
        self._codec = make_codec()
        self._decoded: nvimgcodec.Image | None = None
        self._resizer = resizer.Resizer()
        self._resized = resizer.ImageData(width, height, resizer.PixelType.U8x3)
        self._algorithm = resizer.ResizeAlg.convolution(filter_type)

    def decode(self, encoded: Bytes, side: int) -> Array | None:
        """The central square of `side` pixels, resized; None when the image does not decode.

        The array is valid until the next call.
        """
        stream = nvimgcodec.CodeStream(encoded)
        box = _central_box(stream.height, stream.width, side)
        window = None
        # The window is counted in the upright image, whose header may lie on its side.
        if not _may_be_turned(encoded):
            region = nvimgcodec.Region(*box)
            window = self._read(stream.get_sub_code_stream(region=region))
        if window is None:
            whole = self._read(stream)
            if whole is None:
                return None
            height, width, _ = whole.shape
            top, left, bottom, right = _central_box(height, width, side)
            window = np.ascontiguousarray(whole[top:bottom, left:right])
        return self._resize(window)

    def _read(self, stream: nvimgcodec.CodeStream) -> Array | None:
        decoded = self._codec.decode(stream, image=self._decoded)
        if decoded is None:
            return None
        self._decoded = decoded
        return np.asarray(decoded)

    def _resize(self, window: Array) -> Array:
        height, width, _ = window.shape
        source = resizer.ImageData(width, height, resizer.PixelType.U8x3, window.tobytes())
        options = resizer.ResizeOptions(self._algorithm)
        self._resizer.resize(source, self._resized, options)
        return np.frombuffer(self._resized.get_buffer(), np.uint8).reshape(self._shape)


def _may_be_turned(encoded: Bytes) -> bool:
    """Whether EXIF may turn the picture: False only for a JPEG without any before its pixels.

    A PNG is decoded as a whole anyway, whatever window is asked for.
    """
    for marker, start in segments(encoded):
        if marker == JPEG_SCAN:
            return False
        if marker == JPEG_EXIF_SEGMENT and encoded[start : start + 6].tobytes() == EXIF_SIGNATURE:
            return True
    return True


def _central_box(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the central square; halves are rounded up, as by DALI."""
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return top, left, top + side, left + side
