"""The decoder of windows: any number of threads, DALI's pixels, no memory kept."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pipeline_cases import as_bytes, encoded, photo

from flows.demo_data import load_photos
from pipeline.config import ImagesInput
from pipeline.decode_images import ImageDecoder
from pipeline.decode_windows import WindowDecoder, _may_be_turned

SIZE = (224, 224)
THREADS = 8


def blocks_of_pictures(num_blocks: int) -> list[pa.RecordBatch]:
    """Blocks of five: JPEGs of all sizes, one turned by EXIF, a PNG, and two that are looked at
    closer: the end of one has only grown, the other is cut off."""
    exif = Image.Exif()
    exif[0x0112] = 6
    blocks = []
    for seed in range(num_blocks):
        image = photo(100 + 7 * seed, 180 - 3 * seed, seed)
        jpeg, turned = encoded(image), encoded(image, exif=exif)
        images = [jpeg, turned, encoded(image, "PNG"), jpeg + bytes(200), jpeg[: len(jpeg) // 2]]
        blocks.append(pa.RecordBatch.from_pydict({"image": pa.array(images, pa.binary())}))
    return blocks


@pytest.fixture(scope="module")
def decoder() -> Iterator[WindowDecoder]:
    with WindowDecoder(ImagesInput(column="image"), SIZE) as opened:
        yield opened


@pytest.mark.timeout(60)
def test_many_threads_at_once_get_the_pixels_that_one_gets(decoder: WindowDecoder) -> None:
    blocks = blocks_of_pictures(16)
    alone = [decoder.decode(rows) for rows in blocks]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(decoder.decode, blocks * 4))
    for (pixels, bad_rows), (expected, expected_bad) in zip(together, alone * 4, strict=True):
        assert np.array_equal(pixels, expected)
        assert bad_rows == expected_bad
        assert list(bad_rows) == [4]


@pytest.fixture(scope="module")
def photographs() -> pa.RecordBatch:
    """The demo's photographs, about as large as those of ImageNet."""
    images = []
    for number, image in enumerate(load_photos().values()):
        image.thumbnail((500, 500))
        images.append(encoded(image, progressive=number % 2 == 1))
    return pa.RecordBatch.from_pydict({"image": pa.array(images, pa.binary())})


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos3"])
def test_photographs_have_the_pixels_that_dali_gives(
    photographs: pa.RecordBatch, interpolation: str
) -> None:
    images = ImagesInput.model_validate({"column": "image", "interpolation": interpolation})
    with WindowDecoder(images, SIZE) as ours, ImageDecoder(images, SIZE, num_threads=1) as dali:
        found, expected = (each.decode(photographs)[0].astype(int) for each in (ours, dali))
    differences = np.abs(found - expected)
    assert len(differences) == 7
    assert differences.mean(axis=(1, 2, 3)).max() < 0.5
    assert differences.max() <= 10


def segment(kind: bytes, content: bytes) -> bytes:
    return kind + (2 + len(content)).to_bytes(2, "big") + content


JPEG = encoded(photo())
COMMENT = segment(b"\xff\xfe", b"Exif\0\0 is only said here")
LONG = segment(b"\xff\xe2", b"colour profile" * 4_000)
EXIF = segment(b"\xff\xe1", b"Exif\0\0MM")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (JPEG, False),
        (encoded(photo(), progressive=True), False),
        (JPEG[:2] + COMMENT + JPEG[2:], False),
        (JPEG + EXIF, False),
        (JPEG[:2] + LONG + JPEG[2:], False),
        (JPEG[:2] + EXIF + JPEG[2:], True),
        (JPEG[:2] + COMMENT + LONG + LONG + EXIF + JPEG[2:], True),
        (JPEG[:20] + b"\xff" + JPEG[20:], True),  # whoever cannot tell must not promise
        (JPEG[:2], True),
        (encoded(photo(), "PNG"), True),
    ],
)
def test_only_jpegs_without_exif_before_their_pixels_are_decoded_as_windows(
    data: bytes, expected: bool
) -> None:
    assert _may_be_turned(as_bytes(data)) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_memory_does_not_grow_with_what_has_been_decoded(decoder: WindowDecoder, kind: str) -> None:
    images = [encoded(photo(150, 100, seed), kind) for seed in range(20)]
    rows = pa.RecordBatch.from_pydict({"image": pa.array(images, pa.binary())})
    for _ in range(20):
        decoder.decode(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        decoder.decode(rows)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 16 << 10  # the windows of 2,000 pictures have 45 MB


def test_scans_after_a_whole_one_are_neither_counted_nor_decoded() -> None:
    plain = encoded(photo(500, 375))
    scan = plain[plain.index(b"\xff\xda") : -2]
    padded = plain[:-2] + scan * 1_000 + plain[-2:]
    with WindowDecoder(ImagesInput(column="image"), (48, 64)) as decoder:
        started = time.process_time()
        rows = pa.RecordBatch.from_pydict({"image": pa.array([plain, padded], pa.binary())})
        pixels, bad_rows = decoder.decode(rows)
        assert time.process_time() - started < 1  # all of them would take seconds
    assert not bad_rows
    assert np.array_equal(*pixels)
