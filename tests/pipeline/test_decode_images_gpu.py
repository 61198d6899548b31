"""Decoding on a GPU, without one: the same graph and logic over DALI's CPU operators.

What stands in for the GPU are the operators' device and the outputs' memory; DALI's executor, its
errors and everything of ours are real. tests/gpu/test_decode.py does the same on a device.
"""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from device_cases import STREAM, SlotRunner
from PIL import Image
from pipeline_cases import LAYOUT, LIMITS, a_job, encoded, images_data, photo

from engines.errors import CudaError
from pipeline.block_size import BLOCKS_IN_DALI, whole_batches
from pipeline.blocks import Array, DecodedBlock
from pipeline.config import ImagesInput
from pipeline.decode_images import FILTERS, ImageDecoder
from pipeline.decode_images_gpu import GpuImageDecoder, whole_image_graph
from pipeline.decode_windows import WindowDecoder
from pipeline.infer import infer_blocks
from pipeline.lane_child import make_lane_decoder
from pipeline.lane_messages import LaneSetup
from pipeline.screen_images import ImageScreen

pytestmark = pytest.mark.timeout(60)

SIZE = (24, 32)
BLOCK_ROWS = 5
IMAGES = ImagesInput(column="image", max_pixels=1_000_000)
GOOD = [encoded(photo(128, 96, seed=seed), "JPEG" if seed % 3 else "PNG") for seed in range(40)]


def damaged(seed: int) -> bytes:
    """A PNG that passes the screen, and no decoder."""
    data = bytearray(encoded(photo(128, 96, seed=seed), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def column(*images: bytes | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"image": pa.array(images, pa.binary())})


class DeviceOutput:
    """DALI's output in host memory, with what is used of an output on a GPU."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def shape(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = self._output.shape()
        return shapes

    def copy_to_external(
        self, pointer: ctypes.c_void_p, *, cuda_stream: ctypes.c_void_p, non_blocking: bool
    ) -> None:
        assert cuda_stream.value == STREAM
        assert non_blocking
        rows = np.asarray(self._output.as_tensor())
        ctypes.memmove(pointer, rows.ctypes.data, rows.nbytes)


class OnCpu:
    """A pipeline whose outputs look as if they lay on a GPU."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.build = pipeline.build
        self.schedule_run = pipeline.schedule_run

    def feed_input(self, name: str, data: list[Any]) -> None:
        self._pipeline.feed_input(name, data)

    def outputs(self) -> tuple[DeviceOutput]:
        (output,) = self._pipeline.outputs()
        return (DeviceOutput(output),)


class Decoder(GpuImageDecoder):
    """Counts pipelines; `wrap` may make them worse."""

    num_built = 0
    wrap: Callable[[Any], Any] = OnCpu

    def _make_pipeline(self) -> Any:
        self.num_built += 1
        graph = whole_image_graph(
            "cpu",
            SIZE,
            FILTERS["linear"],
            0.65,
            batch_size=self.block_rows,
            num_threads=2,
            device_id=None,
            prefetch_queue_depth=BLOCKS_IN_DALI,
        )
        return type(self).wrap(graph)


def open_decoder(kind: type[Decoder] = Decoder) -> Decoder:
    return kind(IMAGES, SIZE, num_threads=2, block_rows=BLOCK_ROWS, hardware_decoder_load=0.65)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with open_decoder() as opened:
        yield opened


@pytest.fixture(scope="module")
def cpu() -> Iterator[ImageDecoder]:
    with ImageDecoder(IMAGES, SIZE, num_threads=2) as opened:
        yield opened


def pixels_of(inputs: Any) -> Array:
    if isinstance(inputs, np.ndarray):
        return inputs
    memory = np.zeros(inputs.shape, inputs.dtype)
    inputs.copy_to(memory.ctypes.data, STREAM)
    return memory


def check(decoder: Decoder, cpu: ImageDecoder, blocks: list[pa.RecordBatch]) -> list[str]:
    """Decode; all is as on the CPU. Where each block's pixels were."""
    places = []
    for rows, decoded in zip(blocks, decoder.decode_blocks(blocks), strict=True):
        assert decoded is not None
        inputs, bad_rows = decoded
        expected, expected_bad = cpu.decode(rows)
        assert bad_rows == expected_bad
        assert np.array_equal(pixels_of(inputs), expected)
        places.append("host" if isinstance(inputs, np.ndarray) else "device")
    return places


@pytest.mark.parametrize("interpolation", FILTERS)
def test_whole_images_give_the_very_pixels_of_windows(interpolation: str) -> None:
    """Measured: no difference at all on 211 pictures, 120 of them photographs, at two sizes."""
    data = []
    for width, height in [(161, 128), (127, 160), (33, 77), (500, 375), (1, 1), (300, 1), (7, 7)]:
        picture = photo(width, height)
        data += [encoded(picture), encoded(picture, "PNG"), encoded(picture.convert("L"))]
        data += [encoded(picture, progressive=True), encoded(picture, subsampling=0)]
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data.append(encoded(picture, exif=exif))
    images = ImagesInput.model_validate({"column": "image", "interpolation": interpolation})
    with ImageScreen(images) as screen, ImageDecoder(images, SIZE, 2, len(data)) as windows:
        screened = screen.screen(column(*data))
        expected, bad_rows = windows.decode(column(*data))
    assert not bad_rows
    graph = whole_image_graph(
        "cpu",
        SIZE,
        FILTERS[interpolation],
        0.65,
        batch_size=len(data),
        num_threads=2,
        device_id=None,
        prefetch_queue_depth=1,
    )
    (output,) = graph.run(encoded=screened.encoded, side=screened.sides)
    assert np.array_equal(np.asarray(output.as_tensor()), expected)


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 8])
def test_blocks_come_out_on_the_device_in_order(
    decoder: Decoder, cpu: ImageDecoder, num_blocks: int
) -> None:
    blocks = [column(*GOOD[first : first + BLOCK_ROWS]) for first in range(num_blocks)]
    assert check(decoder, cpu, blocks) == ["device"] * num_blocks
    assert decoder.num_built == 1


def test_partial_blocks_keep_their_number_of_rows(decoder: Decoder, cpu: ImageDecoder) -> None:
    blocks = [column(*GOOD[:count]) for count in (5, 1, 3, 2, 5, 4)]
    assert check(decoder, cpu, blocks) == ["device"] * 6


def test_images_that_the_screen_refuses_stay_on_the_device(
    decoder: Decoder, cpu: ImageDecoder
) -> None:
    bad = [None, b"", b"<html>", GOOD[1][: len(GOOD[1]) // 2], GOOD[0][:100]]
    blocks = [column(GOOD[2], *bad[:3], GOOD[3]), column(*bad), column(*GOOD[:5])]
    assert check(decoder, cpu, blocks) == ["device"] * 3
    assert decoder.num_built == 1


@pytest.mark.parametrize("where", [{0}, {1}, {5}, {0, 1}, {2, 3, 4}, set(range(6))])
def test_a_bad_image_costs_one_row_whatever_else_is_in_flight(
    decoder: Decoder, cpu: ImageDecoder, where: set[int]
) -> None:
    blocks = []
    for number in range(6):
        images = GOOD[number : number + BLOCK_ROWS]
        if number in where:
            images[number % BLOCK_ROWS] = damaged(number)
        blocks.append(column(*images))
    places = check(decoder, cpu, blocks)
    assert places == ["host" if number in where else "device" for number in range(6)]
    assert decoder.num_built == 1 + len(where) - (5 in where)  # after the last none is needed


class EarlyErrors(OnCpu):
    """Blames the oldest block for an error of any that is in flight."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._are_bad: list[bool] = []
        self._bad = {damaged(seed) for seed in range(6)}

    def feed_input(self, name: str, data: list[Any]) -> None:
        super().feed_input(name, data)
        if name == "encoded":
            self._are_bad.append(any(image.tobytes() in self._bad for image in data))

    def outputs(self) -> tuple[DeviceOutput]:
        if any(self._are_bad):
            raise RuntimeError("one of them is bad")
        self._are_bad.pop(0)
        return super().outputs()


def test_an_error_that_comes_a_block_too_early_loses_nothing(
    cpu: ImageDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    class Early(Decoder):
        wrap = EarlyErrors

    blocks = [column(*GOOD[:4], damaged(n)) if n in (2, 5) else column(*GOOD[:5]) for n in range(7)]
    with open_decoder(Early) as decoder:
        places = check(decoder, cpu, blocks)
    assert places == ["device", "host", "host", "device", "host", "host", "device"]
    assert [record.message for record in caplog.records] == [
        "decoding on the GPU failed for 5 images that the CPU decodes: one of them is bad"
    ] * 2


@pytest.mark.parametrize("error", [RuntimeError("schedule"), MemoryError("too large")])
@pytest.mark.parametrize("method", ["schedule_run", "outputs"])
@pytest.mark.parametrize("calls", [{2}, {3}, {2, 3}])
def test_whatever_fails_in_dali_every_block_comes_out(
    cpu: ImageDecoder, error: Exception, method: str, calls: set[int]
) -> None:
    """`calls`: which calls fail, counted over all pipelines without their placeholders."""
    counts: Counter[str] = Counter()

    class Failing(OnCpu):
        def __init__(self, pipeline: Any) -> None:
            super().__init__(pipeline)
            self.warm_up = {"schedule_run": 1, "outputs": BLOCKS_IN_DALI}
            self._schedule = pipeline.schedule_run
            self.schedule_run = lambda: self._call("schedule_run", self._schedule)

        def outputs(self) -> tuple[DeviceOutput]:
            return self._call("outputs", super().outputs)  # type: ignore[no-any-return]

        def _call(self, name: str, function: Callable[[], Any]) -> Any:
            if self.warm_up[name]:
                self.warm_up[name] -= 1
                return function()
            counts[name] += 1
            if name == method and counts[name] in calls:
                raise error
            return function()

    class Unlucky(Decoder):
        wrap = Failing

    blocks = [column(*GOOD[first : first + BLOCK_ROWS]) for first in range(7)]
    with open_decoder(Unlucky) as decoder:
        places = check(decoder, cpu, blocks)
    assert 1 <= places.count("host") <= len(calls)
    assert places[-1] == "device"


def test_a_gpu_that_cannot_decode_a_placeholder_ends_it() -> None:
    class Dead(OnCpu):
        def outputs(self) -> tuple[DeviceOutput]:
            raise RuntimeError("CUDA error 700")

    class OnDead(Decoder):
        wrap = Dead

    with pytest.raises(RuntimeError, match="CUDA error 700"), open_decoder(OnDead):
        pass


def test_a_gpu_that_is_lost_in_mid_run_is_told_as_what_it_is() -> None:
    made: list[OnCpu] = []

    class Lost(OnCpu):
        def outputs(self) -> tuple[DeviceOutput]:
            if self is not made[0]:
                raise RuntimeError("CUDA error 700")
            return super().outputs()

        def __init__(self, pipeline: Any) -> None:
            super().__init__(pipeline)
            made.append(self)

    class OnLost(Decoder):
        wrap = Lost

    blocks = [column(*GOOD[:4], damaged(1)), column(*GOOD[:5])]
    with (
        pytest.raises(CudaError, match=r"DALI: .*CUDA error 700.*new process"),
        open_decoder(OnLost) as decoder,
    ):
        list(decoder.decode_blocks(blocks))


def test_more_images_than_a_batch_are_our_own_defect(decoder: Decoder) -> None:
    with pytest.raises(RuntimeError, match="batch size"):
        list(decoder.decode_blocks([column(*GOOD[: BLOCK_ROWS + 1])]))


def test_none_brings_out_what_is_in_flight_before_more_is_asked_for(decoder: Decoder) -> None:
    seen: list[Any] = []
    asked: list[int] = []

    def blocks() -> Iterator[pa.RecordBatch | None]:
        for count in (1, 2, 3):
            yield column(*GOOD[:count])
        yield None
        asked.append(len(seen))
        yield column(GOOD[0])
        yield None
        asked.append(len(seen))

    for decoded in decoder.decode_blocks(blocks()):
        seen.append(decoded and decoded[0].shape[0])
    assert seen == [1, 2, 3, None, 1, None]
    assert asked == [4, 6]


def test_the_next_block_is_started_before_one_is_waited_for(decoder: Decoder) -> None:
    drawn: list[int] = []

    def blocks() -> Iterator[pa.RecordBatch]:
        for number in range(4):
            drawn.append(number)
            yield column(*GOOD[:BLOCK_ROWS])

    stream = decoder.decode_blocks(blocks())
    next(stream)
    assert drawn == [0, 1]


def test_whoever_leaves_early_leaves_nothing_behind(decoder: Decoder, cpu: ImageDecoder) -> None:
    large = encoded(photo(900, 900))
    for _ in range(3):
        stream = decoder.decode_blocks([column(*[large] * BLOCK_ROWS) for _ in range(4)])
        next(stream)
        stream.close()  # type: ignore[attr-defined]  # DALI reads the second block's memory now
        gc.collect()
    assert check(decoder, cpu, [column(*GOOD[:BLOCK_ROWS])]) == ["device"]


def test_pixels_stay_as_long_as_somebody_holds_them(decoder: Decoder, cpu: ImageDecoder) -> None:
    blocks = [column(*GOOD[first : first + BLOCK_ROWS]) for first in range(12)]
    kept = [decoded[0] for decoded in decoder.decode_blocks(blocks) if decoded is not None]
    gc.collect()
    for rows, inputs in zip(blocks, kept, strict=True):
        assert np.array_equal(pixels_of(inputs), cpu.decode(rows)[0])


def test_one_block_is_decoded_in_host_memory_whatever_its_length(
    decoder: Decoder, cpu: ImageDecoder
) -> None:
    decoder._on_cpu.block_rows = 4  # the fall-back works in blocks of its own size
    rows = column(*GOOD[:4], damaged(1), GOOD[5], None)
    pixels, bad_rows = decoder.decode(rows)
    expected, expected_bad = cpu.decode(rows)
    assert sorted(bad_rows) == [4, 6]
    assert bad_rows == expected_bad
    assert np.array_equal(pixels, expected)


def test_device_blocks_go_through_the_engine_untouched(decoder: Decoder, cpu: ImageDecoder) -> None:
    blocks = [column(*GOOD[first : first + count]) for first, count in enumerate([5, 3, 5, 1, 5])]
    blocks[2] = column(*GOOD[:4], damaged(2))

    def decoded() -> Iterator[DecodedBlock | None]:
        for number, done in enumerate(decoder.decode_blocks([*blocks, None])):
            if done is None:
                yield None
                continue
            inputs, bad_rows = done
            yield DecodedBlock(
                shard=None,  # type: ignore[arg-type]
                first_row=number,
                passthrough=blocks[number],
                inputs=inputs,
                bad_rows=bad_rows,
            )

    runner = SlotRunner((BLOCK_ROWS, *SIZE, 3))
    scored = list(infer_blocks(decoded(), runner))
    assert runner.kinds == ["device", "device", "host", "device", "device"]
    for rows, result in zip(blocks, scored, strict=True):
        pixels, bad_rows = cpu.decode(rows)
        sums = pixels.reshape(len(pixels), -1).sum(axis=1, dtype=np.float32)
        assert result.outputs[0][:, 0].tolist() == sums.tolist()
        assert result.bad_rows == bad_rows


@pytest.mark.parametrize(
    ("device", "enabled", "cpu_decoder", "kind"),
    [
        ("gpu", True, "window", GpuImageDecoder),
        ("gpu", False, "window", ImageDecoder),  # in all threads, beside the GPU
        ("cpu", True, "window", WindowDecoder),
        ("cpu", True, "dali", ImageDecoder),
    ],
)
def test_a_lane_decodes_where_its_engine_computes(
    tmp_path: Path, device: str, enabled: bool, cpu_decoder: str, kind: type
) -> None:
    decode = {"enabled": enabled, "hardware_decoder_load": 0.3}
    lanes = {"gpu_decode": decode, "cpu_decoder": cpu_decoder}
    job = a_job(images_data(tmp_path), lanes=lanes)
    manifest = SimpleNamespace(device=SimpleNamespace(kind=device), batch_size=96)
    setup = LaneSetup(
        job=job,
        engine=SimpleNamespace(manifest=manifest),  # type: ignore[arg-type]
        feature_columns=(),
        num_features=0,
        layout=LAYOUT,
        run_id="run",
        attempt="attempt",
        num_threads=3,
        limits=LIMITS,
    )
    decoder = make_lane_decoder(setup)
    assert type(decoder) is kind
    assert decoder.columns == ("image",)
    assert decoder.block_rows == 96


def test_blocks_hold_whole_batches() -> None:
    assert [whole_batches(64, size) for size in (1, 4, 48, 64, 256)] == [64, 64, 96, 64, 256]


@pytest.mark.parametrize("load", [-0.1, 1.1])
def test_the_hardware_decoders_load_is_a_share(tmp_path: Path, load: float) -> None:
    with pytest.raises(ValueError, match="hardware_decoder_load"):
        a_job(images_data(tmp_path), lanes={"gpu_decode": {"hardware_decoder_load": load}})
