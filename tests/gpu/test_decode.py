"""Decoding on a real GPU: the CPU's pixels, its verdict on bad images, and the way to the engine.

`NIGHTSCORE_IMAGES=<folder>` adds every file below that folder, good or bad, to the pictures that
are compared; `-s` prints how far the pixels are apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engines.cuda import CudaStreams, device_problem
from engines.runner import TensorSpec
from engines.slots import Addresses, Compute, Slots
from flows.demo_data import write_pictures
from pipeline.blocks import Array, DecodedBlock
from pipeline.config import ImagesInput
from pipeline.decode_images import ImageDecoder
from pipeline.decode_images_gpu import GpuImageDecoder
from pipeline.infer import infer_blocks
from tests.pipeline.pipeline_cases import encoded, photo

PROBLEM = device_problem()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or ""),
    pytest.mark.timeout(300),
]

SIZE = (224, 224)
BLOCK_ROWS = 64
IMAGES = ImagesInput(column="image")
LOADS = (0.0, 0.65, 1.0)
MOST_MEAN = 1.0
"""Levels of 255 that a picture's pixels may be off on average. Both decoders round in their own
way, so a level here and there differs; another crop, filter or chroma upsampling is far above."""
DATE = "2026-11-20"


@pytest.fixture(scope="module")
def cpu() -> Iterator[ImageDecoder]:
    with ImageDecoder(IMAGES, SIZE, num_threads=4) as opened:
        yield opened


@pytest.fixture(scope="module", params=LOADS, ids="hardware-{}".format)
def gpu(request: pytest.FixtureRequest) -> Iterator[GpuImageDecoder]:
    with GpuImageDecoder(
        IMAGES, SIZE, num_threads=4, block_rows=BLOCK_ROWS, hardware_decoder_load=request.param
    ) as opened:
        yield opened


@pytest.fixture
def streams() -> Iterator[CudaStreams]:
    with CudaStreams() as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[bytes | None]:
    """Variations of real photographs, eight of them damaged, and the folder that was named."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, DATE, num_rows=512, num_files=1)
    images = pq.read_table(folder / f"dt={DATE}")["image"].to_pylist()
    if more := os.environ.get("NIGHTSCORE_IMAGES"):
        files = sorted(path for path in Path(more).rglob("*") if path.is_file())
        assert files, f"{more} has no files"
        images += [path.read_bytes() for path in files]
    return images


def column(*images: bytes | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"image": pa.array(images, pa.binary())})


def blocks_of(images: list[bytes | None], sizes: tuple[int, ...] = (BLOCK_ROWS,)) -> list[Any]:
    """Blocks of the sizes given, in turn."""
    blocks, first = [], 0
    while first < len(images):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(column(*images[first : first + size]))
        first += size
    return blocks


def on_host(inputs: Any, streams: CudaStreams) -> Array:
    """The rows, by way of device memory of our own, as a runner gets them."""
    if isinstance(inputs, np.ndarray):
        return inputs
    host = np.zeros(inputs.shape, inputs.dtype)
    pointer, stream = streams.device(host.nbytes), streams.new_stream()
    inputs.copy_to(pointer, stream)
    streams.copy_out(host, pointer, stream)
    streams.synchronize_stream(stream)
    return host


def check_pixels(found: Array, expected: Array, what: str) -> float:
    """Mean difference of the worst picture."""
    assert found.shape == expected.shape
    difference = np.abs(found.astype(np.int16) - expected)
    means = difference.mean(axis=(1, 2, 3))
    print(
        f"{what}: mean {means.mean():.3f}, worst picture {means.max():.3f} (number "
        f"{means.argmax()}), largest {difference.max()} of 255, "
        f"equal pictures {np.mean(means == 0):.1%}"
    )
    assert means.max() < MOST_MEAN
    return float(means.max())


def check_blocks(
    gpu: GpuImageDecoder, cpu: ImageDecoder, streams: CudaStreams, blocks: list[Any]
) -> list[str]:
    """All blocks are as on the CPU; where each one's pixels were."""
    places, found, expected = [], [], []
    for rows, decoded in zip(blocks, gpu.decode_blocks(blocks), strict=True):
        assert decoded is not None
        inputs, bad_rows = decoded
        pixels, expected_bad = cpu.decode(rows)
        assert bad_rows == expected_bad
        places.append("host" if isinstance(inputs, np.ndarray) else "device")
        found.append(on_host(inputs, streams))
        expected.append(pixels)
    check_pixels(np.concatenate(found), np.concatenate(expected), f"{len(blocks)} blocks")
    return places


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(500, 375), exif=exif)


KINDS: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encoded(photo(500, 375)),
    "progressive": lambda: encoded(photo(500, 375), progressive=True),
    "no-subsampling": lambda: encoded(photo(500, 375), subsampling=0),
    "restart-markers": lambda: encoded(photo(500, 375), restart_marker_blocks=8),
    "odd-size": lambda: encoded(photo(333, 517)),
    "large": lambda: encoded(photo(3000, 2000)),
    "grey": lambda: encoded(photo(500, 375).convert("L")),
    "rotated-by-exif": rotated_by_exif,
    "png": lambda: encoded(photo(500, 375), "PNG"),
    "grey-png": lambda: encoded(photo(500, 375).convert("L"), "PNG"),
    "palette-png": lambda: encoded(photo(500, 375).convert("P"), "PNG"),
    "1x1-png": lambda: encoded(Image.new("RGB", (1, 1), (200, 10, 90)), "PNG"),
    "1x1-jpeg": lambda: encoded(Image.new("RGB", (1, 1), (120, 120, 120))),
    "300x1": lambda: encoded(Image.new("RGB", (300, 1), (9, 9, 9))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_has_the_cpus_pixels(
    gpu: GpuImageDecoder, cpu: ImageDecoder, streams: CudaStreams, kind: str
) -> None:
    assert check_blocks(gpu, cpu, streams, [column(KINDS[kind]())]) == ["device"]


def test_a_cmyk_jpeg_is_decoded_as_rgb(
    gpu: GpuImageDecoder, cpu: ImageDecoder, streams: CudaStreams
) -> None:
    rows = column(encoded(photo(500, 375).convert("CMYK")))
    (decoded,) = gpu.decode_blocks([rows])
    assert decoded is not None
    assert not decoded[1]
    difference = on_host(decoded[0], streams).astype(int) - cpu.decode(rows)[0]
    assert np.abs(difference).mean() < 6  # CMYK is turned into RGB with other rounding


def test_photographs_have_the_cpus_pixels_and_bad_ones_its_verdict(
    gpu: GpuImageDecoder, cpu: ImageDecoder, streams: CudaStreams, pictures: list[bytes | None]
) -> None:
    places = check_blocks(gpu, cpu, streams, blocks_of(pictures))
    assert places.count("device") > len(places) / 2


def test_blocks_of_any_size_come_out_in_order(
    gpu: GpuImageDecoder, cpu: ImageDecoder, streams: CudaStreams
) -> None:
    images: list[bytes | None] = [encoded(photo(160, 120, seed=seed)) for seed in range(600)]
    blocks = blocks_of(images, (64, 1, 63, 7, 32))
    assert set(check_blocks(gpu, cpu, streams, blocks)) == {"device"}


def flip(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0xFF
    return bytes(changed)


GOOD, PNG = encoded(photo(128, 96, seed=1)), encoded(photo(128, 96, seed=2), "PNG")
BAD_IMAGES: dict[str, tuple[bytes | None, str]] = {
    "null": (None, "null"),
    "empty": (b"", "empty"),
    "html": (b"<html>not found</html>", "format_not_accepted"),
    "half-a-jpeg": (GOOD[: len(GOOD) // 2], "jpeg_truncated"),
    "jpeg-without-end": (GOOD[:-2], "jpeg_truncated"),
    "jpeg-without-pixels": (GOOD[: GOOD.index(b"\xff\xda")] + b"\xff\xd9", "header_unreadable"),
    "half-a-png": (PNG[: len(PNG) // 2], "png_chunk_length"),
    "png-with-a-flipped-byte": (flip(PNG), "decode_failed"),
    "too-large": (encoded(Image.new("1", (9000, 9000)), "PNG"), "too_many_pixels"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_costs_one_row(
    gpu: GpuImageDecoder, cpu: ImageDecoder, streams: CudaStreams, kind: str
) -> None:
    bad, reason = BAD_IMAGES[kind]
    good = [encoded(photo(seed=seed)) for seed in range(5)]
    blocks = [column(*good), column(*good[:2], bad, *good[2:]), column(bad), column(*good[1:])]
    places = check_blocks(gpu, cpu, streams, blocks)
    in_dali = reason == "decode_failed"
    assert places == ["device", *(["host"] * 2 if in_dali else ["device"] * 2), "device"]
    assert cpu.decode(blocks[1])[1][2].reason == reason


def test_many_failures_leave_the_decoder_sound(
    gpu: GpuImageDecoder, cpu: ImageDecoder, streams: CudaStreams
) -> None:
    good = [encoded(photo(seed=seed)) for seed in range(8)]
    bad = column(*good[:4], flip(PNG), *good[4:])
    blocks = [bad if number % 3 == 0 else column(*good) for number in range(30)]
    places = check_blocks(gpu, cpu, streams, blocks)
    assert places == ["host" if number % 3 == 0 else "device" for number in range(30)]


def test_pixels_reach_the_engines_slots_without_the_host(
    gpu: GpuImageDecoder, streams: CudaStreams, pictures: list[bytes | None]
) -> None:
    """The engine answers with its input: what comes out is what reached each slot."""
    from cuda.bindings import runtime

    shape = (BLOCK_ROWS, *SIZE, 3)
    num_bytes = int(np.prod(shape))
    spec = TensorSpec(name="pixels", dtype="uint8", shape=shape)

    def bind(addresses: Addresses) -> Compute:
        def copy(stream: int) -> None:
            kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            (error,) = runtime.cudaMemcpyAsync(
                addresses.outputs[0], addresses.input, num_bytes, kind, stream
            )
            assert error == runtime.cudaError_t.cudaSuccess

        return copy

    class Echo(Slots):
        batch_size, input, outputs = BLOCK_ROWS, spec, (spec,)

        def __enter__(self) -> Echo:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    blocks = blocks_of(pictures[:500], (64, 11, 64))
    expected = []

    def decoded() -> Iterator[DecodedBlock]:
        for rows, done in zip(blocks, gpu.decode_blocks(blocks), strict=True):
            assert done is not None
            expected.append(on_host(done[0], streams))
            yield DecodedBlock(
                shard=None,  # type: ignore[arg-type]
                first_row=0,
                passthrough=rows,
                inputs=done[0],
                bad_rows=done[1],
            )

    scored = list(infer_blocks(decoded(), Echo(streams, spec, (spec,), bind)))
    assert len(scored) == len(blocks)
    for result, pixels in zip(scored, expected, strict=True):
        assert np.array_equal(result.outputs[0], pixels)
