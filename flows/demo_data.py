"""The demo's input: pictures and users, made on the spot from what the demo's packages ship."""

from __future__ import annotations

import datetime
import importlib.util
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from PIL.Image import Image

# Natural colour photographs, which a classifier knows, out of the wheels of these packages;
# others in the same folders are textures, diagrams, or not in the wheel at all.
PHOTO_FILES = {
    "skimage": (
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/motorcycle_right.png",
        "data/rocket.jpg",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
PICTURES_SCHEMA = pa.schema(
    [("picture_id", pa.string()), ("image", pa.binary()), ("photo", pa.string())]
)
PNG_EVERY = 25
NUM_THREADS = 2
NUM_USERS_WITH_NULLS = 8
USERS_ROW_GROUP_ROWS = 65_536
MAX_USERS_OF_A_FILE = 5_000_000


class DemoError(PipelineError):
    """The demo's input cannot be made here."""

    exit_code = 2


def write_pictures(
    root: Path,
    date: str,
    *,
    num_rows: int = 4_000,
    num_files: int = 4,
    rows_per_group: int = 128,
    seed: int = 0,
) -> None:
    """Write `<root>/dt=<date>/pictures-*.parquet`; a partition that exists is left alone.

    The picture of row k depends on seed, date and k only. One row in the middle of each eighth
    of the table is then damaged, in eight different ways, as real tables are.

    Raises:
        DemoError: A package of the demo is missing.
    """
    photos = load_photos()
    damages = dict(zip(_spread(len(DAMAGES), num_rows), DAMAGES, strict=True))
    day = datetime.date.fromisoformat(date).toordinal()

    def make_row(row: int) -> tuple[str, bytes | None, str]:
        rng = np.random.default_rng([seed, day, row])
        name = sorted(photos)[rng.integers(len(photos))]
        picture = _vary(photos[name], rng)
        if damage := damages.get(row):
            return f"{date}-{row:06d}", damage(picture), name
        return f"{date}-{row:06d}", _encode(picture, rng, row), name

    def write(folder: Path) -> None:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for file, rows in enumerate(_split(num_rows, num_files)):
                groups = (
                    pool.map(make_row, rows[start : start + rows_per_group])
                    for start in range(0, len(rows), rows_per_group)
                )
                _write_groups(folder / f"pictures-{file}.parquet", groups)

    _write_partition(root, date, write)


def write_users(
    root: Path,
    date: str,
    *,
    num_rows: int = 200_000,
    num_files: int = 2,
    num_features: int = 32,
    seed: int = 0,
) -> None:
    """Write `<root>/dt=<date>/users-*.parquet`; a partition that exists is left alone.

    The same users every day, with new features; a few rows lack one of them. Memory does not grow
    with the number of rows: 100 million are 13 GB of files here, and little memory.
    """
    day = datetime.date.fromisoformat(date).toordinal()
    incomplete = _spread(NUM_USERS_WITH_NULLS, num_rows)
    names = [f"f{feature:02d}" for feature in range(num_features)]
    schema = pa.schema([("user_id", pa.int64()), *((name, pa.float32()) for name in names)])

    def row_group(rows: range) -> pa.Table:
        rng = np.random.default_rng([seed, day, rows.start])
        users = np.arange(rows.start, rows.stop, dtype=np.int64)
        missing = np.isin(users, incomplete)
        columns = {"user_id": pa.array(users)}
        for feature, name in enumerate(names):
            values = rng.standard_normal(len(rows), dtype=np.float32)
            mask = missing if feature == num_features // 2 and missing.any() else None
            columns[name] = pa.array(values, mask=mask)
        return pa.table(columns, schema)

    def write(folder: Path) -> None:
        files = max(num_files, -(-num_rows // MAX_USERS_OF_A_FILE))
        for file, rows in enumerate(_split(num_rows, files)):
            path = folder / f"users-{file}.parquet"
            with pq.ParquetWriter(
                path, schema, compression="zstd", use_dictionary=False, write_page_checksum=True
            ) as writer:
                for start in range(rows.start, rows.stop, USERS_ROW_GROUP_ROWS):
                    stop = min(start + USERS_ROW_GROUP_ROWS, rows.stop)
                    writer.write_table(row_group(range(start, stop)))

    _write_partition(root, date, write)


def _write_partition(root: Path, date: str, write: Callable[[Path], None]) -> None:
    """Fill a hidden folder beside `dt=<date>` and rename it: readers see all files or none."""
    partition = root / f"dt={date}"
    if partition.exists():
        return
    unfinished = root / f".dt={date}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        os.rename(unfinished, partition)
    except OSError:
        # Another process that made the same rows was first: its files are as good as ours.
        if not partition.exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_groups(path: Path, groups: Iterable[Iterator[tuple[str, bytes | None, str]]]) -> None:
    """One Parquet file, one row group for each of `groups`; only one of them is in memory."""
    with pq.ParquetWriter(
        path,
        PICTURES_SCHEMA,
        # Pictures are compressed already, and no two are equal.
        compression={"picture_id": "zstd", "image": "none", "photo": "zstd"},
        use_dictionary=["photo"],
        write_statistics=["picture_id", "photo"],
        write_page_checksum=True,
    ) as writer:
        for group in groups:
            columns = [list(column) for column in zip(*group, strict=True)]
            writer.write_table(pa.table(columns, schema=PICTURES_SCHEMA))


def _split(num_rows: int, num_files: int) -> list[range]:
    """Consecutive row ranges, of nearly the same length."""
    borders = [num_rows * file // num_files for file in range(num_files + 1)]
    return [range(start, stop) for start, stop in pairwise(borders)]


def _spread(count: int, num_rows: int) -> list[int]:
    """The rows in the middle of `count` equal parts of the table."""
    return [(2 * part + 1) * num_rows // (2 * count) for part in range(count)]


def load_photos() -> dict[str, Image]:
    """The source photographs by name, decoded once for all rows."""
    folders = {package: _package_folder(package) for package in ("PIL", *PHOTO_FILES)}
    from PIL import Image

    photos = {}
    for package, files in PHOTO_FILES.items():
        for file in files:
            path = folders[package] / file
            if not path.exists():
                raise DemoError(
                    f"{path}: missing; expected the photograph that {package} ships. "
                    "Run `pip install --force-reinstall 'nightscore[demo]'`."
                )
            with Image.open(path) as image:
                photo = image.convert("RGB")
            # Some colour profiles of these files are faulty: decoders would warn of every copy.
            photo.info.clear()
            photos[path.stem] = photo
    return photos


def _package_folder(package: str) -> Path:
    # Found, not imported: scikit-learn alone would take a second, and only files are wanted.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(
            f"Python package {package}: not installed; expected the packages of the demo. "
            "Run `pip install 'nightscore[demo]'`."
        )
    return Path(spec.submodule_search_locations[0])


def _vary(photo: Image, rng: np.random.Generator) -> Image:
    """A picture of about 500 x 375: a part of the photograph in another light."""
    from PIL import Image

    width, height = round(500 * rng.uniform(0.94, 1.06)), round(375 * rng.uniform(0.94, 1.06))
    zoom = rng.uniform(0.88, 1.0) * min(photo.width / width, photo.height / height)
    left = rng.uniform(0, photo.width - zoom * width)
    top = rng.uniform(0, photo.height - zoom * height)
    box = (left, top, left + zoom * width, top + zoom * height)
    picture = photo.resize((width, height), Image.Resampling.BICUBIC, box)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    light = (np.arange(256) - 128) * contrast + 128 + brightness
    return picture.point(np.clip(light, 0, 255).astype(np.uint8).tolist() * 3)


def _encode(picture: Image, rng: np.random.Generator, row: int) -> bytes:
    if row % PNG_EVERY == PNG_EVERY - 1:
        return _png(picture)
    return _jpeg(picture, quality=int(rng.integers(90, 96)))


def _jpeg(picture: Image, *, quality: int = 92) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    # Level 1: a tenth of the time of the default, a few percent more bytes.
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _cut_off_jpeg(picture: Image) -> bytes:
    content = _jpeg(picture)
    return content[: len(content) // 2]


def _cut_off_png(picture: Image) -> bytes:
    content = _png(picture)
    return content[: len(content) // 2]


def _jpeg_without_pixels(picture: Image) -> bytes:
    """Everything up to the start of the scan (marker FFDA)."""
    content = _jpeg(picture)
    return content[: content.index(b"\xff\xda")]


def _png_with_flipped_byte(picture: Image) -> bytes:
    """One byte of the pixels is wrong, and so is the checksum of its chunk."""
    content = bytearray(_png(picture))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def _noise(picture: Image) -> bytes:
    # Seeded by the picture, so that the same row is damaged in the same way every time.
    return np.random.default_rng([*picture.size, picture.tobytes()[0]]).bytes(40_000)


def _error_page(_picture: Image) -> bytes:
    """What a download leaves behind when nobody looked at its status."""
    return b"<!DOCTYPE html><html><title>403 Forbidden</title><h1>Forbidden</h1></html>\n"


def _nothing(_picture: Image) -> bytes:
    return b""


def _null(_picture: Image) -> None:
    return None


DAMAGES: tuple[Callable[[Image], bytes | None], ...] = (
    _cut_off_jpeg,
    _nothing,
    _null,
    _error_page,
    _noise,
    _png_with_flipped_byte,
    _jpeg_without_pixels,
    _cut_off_png,
)
