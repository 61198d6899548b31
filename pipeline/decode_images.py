"""Decode, crop and resize encoded images with DALI on the CPU; a bad image costs one row.

DALI has no error-tolerant mode: one undecodable image fails its batch and spoils the pipeline
object. So every image is screened first; refused ones leave a placeholder in their slot. When DALI
fails all the same, the pipeline is built anew and the batch searched for the culprits.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
from nvidia.dali import fn, pipeline_def, types

from pipeline.block_size import BLOCK_ROWS
from pipeline.blocks import Array, BadRow, Decoder
from pipeline.config import ImagesInput
from pipeline.screen_images import Bytes, ImageScreen, ScreenedImages

FILTERS = {
    "linear": types.INTERP_LINEAR,
    "cubic": types.INTERP_CUBIC,
    "lanczos3": types.INTERP_LANCZOS3,
}


class ImageDecoder(Decoder):
    """JPEG and PNG -> uint8 [rows, height, width, 3], RGB, centre-cropped and resized.

    Args:
        images: Column, crop and filter.
        size: Height and width of the engine's input.
        num_threads: CPU threads that decode.
        block_rows: Images that DALI decodes at once.
    """

    def __init__(
        self,
        images: ImagesInput,
        size: tuple[int, int],
        num_threads: int,
        block_rows: int = BLOCK_ROWS["dali"],
    ) -> None:
        self.columns = (images.column,)
        self.block_rows = block_rows
        self._filter = FILTERS[images.interpolation]
        self._size = size
        self._num_threads = num_threads
        self._screen = ImageScreen(images)

    def __enter__(self) -> ImageDecoder:
        with ExitStack() as undo:
            undo.enter_context(self._screen)
            self._pipeline = self._build()
            self._opened = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        del self._pipeline
        self._opened.close()

    def _build(self) -> Any:
        pipeline = _window_graph(
            self._size,
            self._filter,
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
        screened = self._screen.screen(rows)
        return self._run_isolated(screened), screened.bad_rows

    def _run(self, encoded: list[Bytes], sides: list[np.float32]) -> Array:
        try:
            (output,) = self._pipeline.run(encoded=encoded, side=sides)
        except RuntimeError:
            self._pipeline = self._build()  # a pipeline that has failed must not be used again
            raise
        return np.asarray(output.as_tensor())

    def _run_isolated(self, screened: ScreenedImages) -> Array:
        """Decode; on failure put placeholders where images are bad and decode again."""
        encoded, sides = screened.encoded, screened.sides
        try:
            return self._run(encoded, sides)
        except RuntimeError:
            suspects = self._screen.undecodable(encoded)
        # nvImageCodec names its failures by slot and agrees with DALI on all files that we know;
        # where it does not, every image is tried alone.
        for slot in suspects or range(len(encoded)):
            try:
                self._run([encoded[slot]], [sides[slot]])
            except RuntimeError as error:
                screened.refuse(slot, "decode", "decode_failed", _reason(error))
        return self._run(encoded, sides)


@pipeline_def  # type: ignore[untyped-decorator]  # DALI has no types
def _window_graph(size: tuple[int, int], interpolation: types.DALIInterpType) -> Any:
    """Only the crop's window is decoded, then resized: 1.3 times as fast as the whole image."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    side = fn.external_source(name="side", dtype=types.FLOAT, ndim=0)
    # ANY_DATA instead of RGB segfaults on a grey JPEG (DALI 2.4).
    window = fn.decoders.image_crop(
        encoded, device="cpu", output_type=types.RGB, crop_h=side, crop_w=side
    )
    return fn.resize(window, size=size, interp_type=interpolation, antialias=True)


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what is wrong with the image."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = re.compile(
        r"^(Critical error|Error in CPU operator|which was used|encountered:|Error when executing|"
        r"Current pipeline object|Failed to decode sample|File |\S+ = fn\.|[\w.]+\(|\[/|Stacktrace)"
    )
    said = [line for line in lines if not noise.match(line)]
    return (said[0] if said else "DALI and nvImageCodec cannot decode it, and say no more")[:300]
