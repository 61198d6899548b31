"""What a look at a dataset guesses of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.look import Dataset, look_at
from pipeline.storage import open_storage

JPEG, PNG = b"\xff\xd8\xff\xe0rest", b"\x89PNG\r\n\x1a\nrest"


def look(root: Path) -> Dataset:
    return look_at(open_storage(str(root)))


def write(root: Path, folder: str = "dt=2026-11-20", **columns: Any) -> None:
    path = root / folder / "part-0.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"user_id": [1, 2], "f0": [0.5, 0.25]}), path)


@pytest.mark.parametrize(
    ("folder", "partition"),
    [
        ("dt=2026-11-20", "dt={date}"),
        ("2026-11-20", "{date}"),
        ("eu/day_2026-11-20/hour", "eu/day_{date}"),
        ("all", None),
        ("dt=2026-13-40", None),
    ],
)
def test_folders_with_dates_are_partitions(
    folder: str, partition: str | None, tmp_path: Path
) -> None:
    write(tmp_path, folder)
    found = look(tmp_path)
    assert found.partition == partition
    assert found.dates == (("2026-11-20",) if partition else ())


def test_the_newest_date_is_looked_at(tmp_path: Path) -> None:
    write(tmp_path, "dt=2026-11-19", old_id=[1], f0=[1.0])
    write(tmp_path, "dt=2026-11-20", new_id=[1], f0=[1.0])
    write(tmp_path, "_staging/dt=2026-11-21", staged_id=[1], f0=[1.0])
    found = look(tmp_path)
    assert found.dates == ("2026-11-19", "2026-11-20")
    assert found.ids == ("new_id",)


@pytest.mark.parametrize("image", [JPEG, PNG])
def test_a_column_of_pictures_is_told_by_its_bytes(image: bytes, tmp_path: Path) -> None:
    thumbnails, hashes = [image, None, image, b""], [b"1", b"2", b"3", b"4"]
    write(tmp_path, picture_id=[1, 2, 3, 4], hash=hashes, thumbnail=thumbnails)
    assert look(tmp_path).image_column == "thumbnail"


def test_pictures_may_be_in_the_struct_that_hugging_face_writes(tmp_path: Path) -> None:
    images = [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    write(tmp_path, picture_id=[1, 2, 3], image=images)
    assert look(tmp_path).image_column == "image"


def test_columns_that_are_numbered_alike_are_features_together(tmp_path: Path) -> None:
    columns = {f"f{n}": [0.5] for n in range(3)}
    write(tmp_path, user_id=[1], age=[40], **columns)
    first, *others = look(tmp_path).features
    assert (first.patterns, first.width) == (("f*",), 3)
    assert others[-1].patterns == ("age", "f0", "f1", "f2")


def test_a_glob_that_takes_other_columns_too_is_no_guess(tmp_path: Path) -> None:
    write(tmp_path, user_id=[1], f0=[0.5], f1=[0.5], flag=["yes"])
    assert look(tmp_path).features[0].patterns == ("f0", "f1")


def test_a_list_of_fixed_size_comes_first(tmp_path: Path) -> None:
    vectors = pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3))
    write(tmp_path, user_id=[1], f0=[0.5], embedding=vectors)
    first = look(tmp_path).features[0]
    assert (first.patterns, first.width) == (("embedding",), 3)


@pytest.mark.parametrize(
    ("columns", "ids"),
    [
        (
            {"user_id": [1, 1], "session_key": ["a", "b"], "f0": [1.0, 2.0]},
            ("user_id", "session_key"),
        ),
        ({"country": ["ch", "ch"], "name": ["a", "b"], "f0": [1.0, 2.0]}, ("name",)),
        ({"country": ["ch", "ch"], "f0": [1.0, 2.0]}, ("country",)),
    ],
)
def test_ids_are_told_by_name_then_by_values(
    columns: dict[str, Any], ids: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path, **columns)
    assert look(tmp_path).ids == ids


def test_what_cannot_be_a_job_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.parquet files"):
        look(tmp_path)
    write(tmp_path, f0=[1.0])
    with pytest.raises(InputError, match="expected an id"):
        look(tmp_path)
    (tmp_path / "dt=2026-11-20" / "part-0.parquet").write_bytes(b"no Parquet")
    with pytest.raises(InputError, match="expected a Parquet file"):
        look(tmp_path)
