"""Decode, crop and resize encoded images with DALI on a GPU; the pixels stay there.

A block is one batch of the engine. While the engine computes one block, the GPU decodes the next
and the CPU screens the one after: two blocks are in flight in DALI. An error is never traced to an
image here, since decoders on a GPU report late. The pipeline is given up, the oldest block goes to
the CPU's decoder, which finds out what is bad, and the next is started again: should the error have
been the next block's, it fails again in its own turn, and nothing is lost but time.

Written for DALI 2.4: https://docs.nvidia.com/deeplearning/dali/user-guide/docs/
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from nvidia.dali import fn, pipeline_def, types

from engines.errors import CudaError
from pipeline.block_size import BLOCKS_IN_DALI
from pipeline.blocks import Array, BadRow, Decoder, Inputs
from pipeline.config import ImagesInput
from pipeline.decode_images import FILTERS, ImageDecoder
from pipeline.errors import one_line
from pipeline.screen_images import PLACEHOLDER, PLACEHOLDER_SIDE, ImageScreen, ScreenedImages

log = logging.getLogger(__name__)

DALI_ERRORS = (RuntimeError, MemoryError)
"""MemoryError: whole images of a block can take more than the device has; the CPU's decoder reads
windows only, and a few images at a time."""
Device = Literal["cpu", "mixed"]


class DaliRows:
    """Decoded rows that DALI holds on the device for as long as this object lives.

    Args:
        output: DALI's TensorListGPU, complete: its samples have one shape.
    """

    def __init__(self, output: Any) -> None:
        shapes = output.shape()
        self.shape: tuple[int, ...] = (len(shapes), *shapes[0])
        self.dtype = np.dtype(np.uint8)
        self._output = output

    def copy_to(self, pointer: int, stream: int) -> None:
        """See `engines.runner.DeviceRows`; `outputs` had no stream: the host waits for the copy."""
        self._output.copy_to_external(
            ctypes.c_void_p(pointer), cuda_stream=ctypes.c_void_p(stream), non_blocking=True
        )


class GpuImageDecoder(Decoder):
    """JPEG and PNG -> uint8 [rows, height, width, 3] on the GPU, RGB, cropped and resized.

    Args:
        images: Column, crop and filter.
        size: Height and width of the engine's input.
        num_threads: CPU threads that parse, and decode what the GPU cannot.
        block_rows: Images that are decoded at once: the engine's batch size.
        hardware_decoder_load: Share of JPEGs that go to the GPU's own decoder, 0 to 1; the CUDA
            cores take the others.
    """

    def __init__(
        self,
        images: ImagesInput,
        size: tuple[int, int],
        num_threads: int,
        block_rows: int,
        hardware_decoder_load: float,
    ) -> None:
        self.columns = (images.column,)
        self.block_rows = block_rows
        self._filter = FILTERS[images.interpolation]
        self._size = size
        self._num_threads = num_threads
        self._hardware_decoder_load = hardware_decoder_load
        self._screen = ImageScreen(images)
        self._on_cpu = ImageDecoder(images, size, num_threads)
        self._pipeline: Any = None
        self._failure = ""
        self._generation = 0
        """Counts pipelines: no reference to one that was given up must keep it alive."""

    def __enter__(self) -> GpuImageDecoder:
        with ExitStack() as undo:
            undo.enter_context(self._screen)
            undo.enter_context(self._on_cpu)
            self._pipeline = self._build()
            self._opened = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipeline = None
        self._opened.close()

    def _build(self) -> Any:
        """A pipeline that runs once for each `schedule_run`, and that has proved to work.

        DALI's first `schedule_run` starts as many runs as it has room for, and wants input for all
        of them: placeholders, so that later every run is one block of ours.
        """
        pipeline = self._make_pipeline()
        pipeline.build()
        for _ in range(BLOCKS_IN_DALI):
            pipeline.feed_input("encoded", [PLACEHOLDER])
            pipeline.feed_input("side", [PLACEHOLDER_SIDE])
        pipeline.schedule_run()
        for _ in range(BLOCKS_IN_DALI):
            pipeline.outputs()
        return pipeline

    def _rebuild(self) -> Any:
        try:
            return self._build()
        except DALI_ERRORS as error:
            raise CudaError(
                f"DALI: {one_line(error)}, in a new pipeline after {self._failure}; expected one "
                "that decodes. The device may need a new process; see the driver's log."
            ) from error

    def _make_pipeline(self) -> Any:
        return whole_image_graph(
            "mixed",
            self._size,
            self._filter,
            self._hardware_decoder_load,
            batch_size=self.block_rows,
            num_threads=self._num_threads,
            device_id=0,  # a lane's process sees one device
            prefetch_queue_depth=BLOCKS_IN_DALI,
        )

    def decode(self, rows: pa.RecordBatch) -> tuple[Array, dict[int, BadRow]]:
        """Decode any number of images on the CPU; see `pipeline.blocks.Decoder`."""
        decoded: list[Array] = []
        bad_rows: dict[int, BadRow] = {}
        for start in range(0, rows.num_rows, self._on_cpu.block_rows):
            pixels, bad = self._on_cpu.decode(rows.slice(start, self._on_cpu.block_rows))
            decoded.append(pixels)
            bad_rows |= {start + row: why for row, why in bad.items()}
        return np.concatenate(decoded), bad_rows

    def decode_blocks(
        self, blocks: Iterable[pa.RecordBatch | None]
    ) -> Iterator[tuple[Inputs, dict[int, BadRow]] | None]:
        """Decode blocks of at most `block_rows` images; see `pipeline.blocks.Decoder`.

        Raises:
            CudaError: After an error the GPU cannot decode even a placeholder.
        """
        in_flight: deque[_Block] = deque()
        try:
            for rows in blocks:
                if rows is not None:
                    in_flight.append(_Block(rows=rows, screened=self._screen.screen(rows)))
                    self._start(in_flight[-1])
                while len(in_flight) >= (1 if rows is None else BLOCKS_IN_DALI):
                    yield self._finish(in_flight)
                if rows is None:
                    yield None
            while in_flight:
                yield self._finish(in_flight)
        finally:
            if in_flight:  # left early: DALI still reads the blocks' memory, until it is gone
                self._pipeline = None

    def _start(self, block: _Block) -> None:
        if self._pipeline is None:
            self._pipeline = self._rebuild()
            self._generation += 1
        block.generation = self._generation
        self._pipeline.feed_input("encoded", block.screened.encoded)
        self._pipeline.feed_input("side", block.screened.sides)
        try:
            self._pipeline.schedule_run()
        except DALI_ERRORS as error:
            self._give_up(error)

    def _finish(self, in_flight: deque[_Block]) -> tuple[Inputs, dict[int, BadRow]]:
        """Take the oldest block out; when DALI has failed, start the others again."""
        block = in_flight.popleft()
        if self._pipeline is not None and block.generation == self._generation:
            try:
                (output,) = self._pipeline.outputs()
            except DALI_ERRORS as error:
                self._give_up(error)
            else:
                return DaliRows(output), block.screened.bad_rows
        self._pipeline = None
        for waiting in in_flight:
            self._start(waiting)
        pixels, bad_rows = self.decode(block.rows)
        if len(bad_rows) == len(block.screened.bad_rows):
            log.warning(
                "decoding on the GPU failed for %d images that the CPU decodes: %s",
                len(pixels),
                self._failure,
            )
        return pixels, bad_rows

    def _give_up(self, error: Exception) -> None:
        self._failure = one_line(error)
        self._pipeline = None


@dataclass(kw_only=True, slots=True)
class _Block:
    """A block that DALI works on; its memory is read in place."""

    rows: pa.RecordBatch
    screened: ScreenedImages
    generation: int = 0
    """The pipeline that it was started on."""


@pipeline_def  # type: ignore[untyped-decorator]  # DALI has no types
def whole_image_graph(
    device: Device,
    size: tuple[int, int],
    interpolation: types.DALIInterpType,
    hardware_decoder_load: float,
) -> Any:
    """Decode whole images on `device` (`mixed` is the GPU), crop them there, then resize.

    Reading only a window on the GPU fails or crashes with nvImageCodec 0.9.0, which comes with
    DALI 2.4: https://github.com/NVIDIA/nvImageCodec/issues/55
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    side = fn.external_source(name="side", dtype=types.FLOAT, ndim=0)
    image = fn.decoders.image(
        encoded,
        device=device,
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # as on the CPU: engines are calibrated with its pixels
        hw_decoder_load=hardware_decoder_load,
    )
    window = fn.crop(image, crop_h=side, crop_w=side)
    return fn.resize(window, size=size, interp_type=interpolation, antialias=True)
