"""Make the rows that every peer scores: labelled pictures (default), or --features for ranking.

Pictures are seeded crops, rescales and re-encodings of photographs: about 500 x 375 pixels, JPEG
quality 90 to 95, every row different. Row k is the same whatever the number of rows.
Beside OUT, a small OUT-startup is written, with which compare.py measures the start-up time.
"""

import argparse
import csv
import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

NUM_FEATURES = 32
PICTURES = pa.schema({"id": pa.string(), "image": pa.binary(), "label": pa.int32()})
FEATURES = pa.schema(
    [("user_id", pa.int64()), *((f"f{i:02d}", pa.float32()) for i in range(NUM_FEATURES))])


def load_photos(folder: Path) -> list[tuple[Image.Image, int]]:
    with (folder / "labels.csv").open(newline="") as lines:
        return [(Image.open(folder / row["path"]).convert("RGB"), int(row["class_index"]))
                for row in csv.DictReader(lines)]


def damage(jpeg: bytes, kind: int) -> bytes:
    """Cut off; empty; no picture at all; or a header without pixels."""
    kinds = jpeg[:len(jpeg) // 2], b"", b"<html>404 Not Found</html>", jpeg[:600].ljust(len(jpeg))
    return kinds[kind % len(kinds)]


def random_picture(photo: Image.Image, rng: np.random.Generator) -> bytes:
    """A crop round the middle with 70 to 100 % of the shorter side, rescaled and re-encoded."""
    width, height = photo.size
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(3 / 2)))
    side = rng.uniform(0.7, 1.0) * min(width, height)
    crop_width, crop_height = min(side * max(aspect, 1), width), min(side / min(aspect, 1), height)
    left = rng.triangular(0, 0.5, 1) * (width - crop_width)
    top = rng.triangular(0, 0.5, 1) * (height - crop_height)
    scale = rng.uniform(300, 450) / min(crop_width, crop_height)
    picture = photo.resize(
        (round(crop_width * scale), round(crop_height * scale)), Image.Resampling.LANCZOS,
        box=(left, top, left + crop_width, top + crop_height))
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.85, 1.15))
    picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.85, 1.15))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=int(rng.integers(90, 96)))
    return jpeg.getvalue()


def write_pictures(out: Path, num_rows: int, args: argparse.Namespace):
    photos = load_photos(args.photos)
    broken = np.linspace(0, num_rows - 1, args.broken, dtype=int).tolist()

    def make_row(row):
        photo, label = photos[row % len(photos)]
        jpeg = random_picture(photo, np.random.default_rng((args.seed, row)))
        if row in broken:
            jpeg = damage(jpeg, broken.index(row))
        return f"{row:08d}", jpeg, label

    with ThreadPoolExecutor(2) as pool:
        for path, rows in split(out, num_rows, args.files):
            with pq.ParquetWriter(path, PICTURES, compression="none", use_dictionary=False) as file:
                for start in range(rows.start, rows.stop, 100):
                    group = zip(*pool.map(make_row, rows[start - rows.start:][:100]), strict=True)
                    file.write_table(pa.table(list(map(list, group)), schema=PICTURES))


def write_features(out: Path, num_rows: int, args: argparse.Namespace):
    rng = np.random.default_rng(args.seed)
    for path, rows in split(out, num_rows, args.files):
        with pq.ParquetWriter(path, FEATURES, use_dictionary=False) as file:
            for start in range(rows.start, rows.stop, 1 << 17):
                user_id = np.arange(start, min(start + (1 << 17), rows.stop))
                columns = rng.standard_normal((NUM_FEATURES, len(user_id)), np.float32)
                file.write_table(pa.table([user_id, *columns], schema=FEATURES))


def split(out: Path, num_rows: int, num_files: int):
    """The path and the row numbers of each file."""
    out.mkdir(parents=True)
    bounds = np.linspace(0, num_rows, num_files + 1, dtype=int).tolist()
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield out / f"part-{part}.parquet", range(start, stop)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", action="store_true", help="user_id and f00 to f31")
    parser.add_argument("--photos", type=Path, help="folder with labels.csv: path, class_index")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--rows", type=int, help="default 4000, with --features 10 million")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--broken", type=int, default=0, help="damage this many of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write = write_features if args.features else write_pictures
    out = args.out
    if not (args.features or args.photos):
        parser.error("--photos: missing; expected a folder of photographs, or --features.")
    if out.exists():
        parser.error(f"--out {out}: exists already; expected a new folder. Remove it first.")
    write(out, args.rows or (10_000_000 if args.features else 4000), args)
    args.broken = 0
    write(out.with_name(out.name + "-startup"), 1000 if args.features else 32, args)


if __name__ == "__main__":
    main()
