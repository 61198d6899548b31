"""The demo's input is seeded, realistic, written at once, and a little broken."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import demo_data
from flows.demo_data import DAMAGES, DemoError, write_pictures, write_users

PIL_Image = pytest.importorskip("PIL.Image", reason="needs nightscore[demo]")
pytest.importorskip("skimage", reason="needs nightscore[demo]")
DATE = "2026-11-20"
NUM_ROWS = 80


def read(root: Path, date: str = DATE) -> pa.Table:
    files = sorted((root / f"dt={date}").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def is_readable(content: bytes | None) -> bool:
    try:
        PIL_Image.open(io.BytesIO(content or b"")).load()
    except (OSError, SyntaxError):
        return False
    return True


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root, DATE, num_rows=NUM_ROWS, num_files=4, rows_per_group=8)
    return root


def test_pictures_come_in_files_and_row_groups_of_the_size_asked_for(pictures: Path) -> None:
    files = sorted((pictures / f"dt={DATE}").iterdir())
    assert [file.name for file in files] == [f"pictures-{n}.parquet" for n in range(4)]
    metadata = pq.read_metadata(files[0])
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert groups == [8, 8, 4]
    assert pq.read_schema(files[0]).equals(demo_data.PICTURES_SCHEMA)


def test_pictures_are_photographs_of_the_usual_size(pictures: Path) -> None:
    good = [content for content in read(pictures)["image"].to_pylist() if is_readable(content)]
    sizes = [PIL_Image.open(io.BytesIO(content)).size for content in good]
    assert all(470 <= width <= 530 and 350 <= height <= 400 for width, height in sizes)
    jpegs = [content for content in good if content.startswith(b"\xff\xd8")]
    assert 40_000 < sum(map(len, jpegs)) / len(jpegs) < 110_000
    assert 0 < len(good) - len(jpegs) <= NUM_ROWS // 25


def test_pictures_carry_none_of_their_sources_metadata(pictures: Path) -> None:
    for content in filter(is_readable, read(pictures)["image"].to_pylist()):
        assert "icc_profile" not in PIL_Image.open(io.BytesIO(content)).info


def test_every_row_is_told_apart_and_names_its_photograph(pictures: Path) -> None:
    table = read(pictures)
    assert len(set(table["picture_id"].to_pylist())) == NUM_ROWS
    assert len(set(table["image"].to_pylist())) == NUM_ROWS
    assert set(table["photo"].to_pylist()) <= {
        Path(file).stem for files in demo_data.PHOTO_FILES.values() for file in files
    }


def test_eight_rows_are_damaged_two_in_each_file(pictures: Path) -> None:
    for file in (pictures / f"dt={DATE}").iterdir():
        contents = pq.read_table(file)["image"].to_pylist()
        assert sum(not is_readable(content) for content in contents) == 2


def test_the_damages_are_all_different(pictures: Path) -> None:
    contents = read(pictures)["image"].to_pylist()
    bad = {
        content and content[:4] + content[-4:] for content in contents if not is_readable(content)
    }
    assert len(bad) == len(DAMAGES) == 8
    assert {None, b""} <= bad


def test_the_same_rows_are_made_again_whatever_their_number(pictures: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, DATE, num_rows=NUM_ROWS // 2, num_files=1)
    pairs = zip(read(tmp_path).to_pylist(), read(pictures).to_pylist(), strict=False)
    undamaged = [pair for pair in pairs if all(is_readable(row["image"]) for row in pair)]
    assert len(undamaged) > NUM_ROWS // 4
    assert all(shorter == longer for shorter, longer in undamaged)


@pytest.mark.parametrize(("date", "seed"), [("2026-11-21", 0), (DATE, 1)])
def test_another_date_or_seed_has_other_pictures(
    pictures: Path, tmp_path: Path, date: str, seed: int
) -> None:
    write_pictures(tmp_path, date, num_rows=12, num_files=1, seed=seed)
    before = set(read(pictures)["image"].to_pylist())
    after = [
        content for content in read(tmp_path, date)["image"].to_pylist() if is_readable(content)
    ]
    assert after
    assert not before & set(after)


def test_a_partition_that_exists_is_left_alone(pictures: Path) -> None:
    folder = pictures / f"dt={DATE}"
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    write_pictures(pictures, DATE, num_rows=1, num_files=1)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_failure_half_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pq, "ParquetWriter", fail)
    with pytest.raises(OSError, match="disk full"):
        write_pictures(tmp_path, DATE, num_rows=4, num_files=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["PIL", "skimage", "sklearn"])
def test_a_missing_demo_package_is_one_sentence_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find_spec = importlib.util.find_spec

    def find_all_but_one(name: str, *args: Any) -> Any:
        return None if name == package else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_one)
    with pytest.raises(DemoError, match=rf"{package}.*pip install 'nightscore\[demo\]'"):
        write_pictures(tmp_path, DATE)
    assert list(tmp_path.iterdir()) == []


def test_users_have_features_and_a_few_gaps(tmp_path: Path) -> None:
    write_users(tmp_path, DATE, num_rows=140_000, num_files=2, num_features=4)
    table = read(tmp_path)
    assert table.schema.names == ["user_id", "f00", "f01", "f02", "f03"]
    assert {str(field.type) for field in table.schema} == {"int64", "float"}
    assert table["user_id"].to_pylist() == list(range(140_000))
    assert sum(column.null_count for column in table.columns) == demo_data.NUM_USERS_WITH_NULLS
    metadata = pq.read_metadata(tmp_path / f"dt={DATE}" / "users-0.parquet")
    assert metadata.row_group(0).num_rows == demo_data.USERS_ROW_GROUP_ROWS


def test_users_keep_their_ids_and_get_new_features_every_day(tmp_path: Path) -> None:
    for date in (DATE, "2026-11-21"):
        write_users(tmp_path, date, num_rows=100, num_files=1, num_features=2)
    today, tomorrow = read(tmp_path), read(tmp_path, "2026-11-21")
    assert today["user_id"].equals(tomorrow["user_id"])
    assert not today["f00"].equals(tomorrow["f00"])


def test_the_same_users_are_made_again(tmp_path: Path) -> None:
    for root in (tmp_path / "one", tmp_path / "two"):
        write_users(root, DATE, num_rows=100, num_files=1)
    assert read(tmp_path / "one").equals(read(tmp_path / "two"))


def test_many_users_are_written_group_by_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_data, "USERS_ROW_GROUP_ROWS", 100)
    monkeypatch.setattr(demo_data, "MAX_USERS_OF_A_FILE", 400)
    demo_data.write_users(tmp_path, DATE, num_rows=1_250, num_features=3)
    files = sorted(tmp_path.glob("dt=*/*.parquet"))
    assert [pq.read_metadata(path).num_row_groups for path in files] == [4, 4, 4, 4]
    users = pa.concat_tables(pq.read_table(path, partitioning=None) for path in files)
    assert users["user_id"].to_pylist() == list(range(1_250))
    assert len(np.unique(users["f00"].to_numpy())) > 1_200
