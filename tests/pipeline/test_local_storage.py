"""What only a local disk has: symbolic links, and folders that others put files into."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError, StorageError
from pipeline.local_storage import LocalStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def listed(root: Path) -> list[str]:
    return [info.path for info in LocalStorage(str(root)).list_files("")]


def test_links_to_files_and_folders_are_followed(root: Path, tmp_path: Path) -> None:
    elsewhere = LocalStorage(str(tmp_path / "elsewhere"))
    for path in ("hour=1/x.parquet", "y.parquet"):
        elsewhere.create(path, b"rows")
    (root / "hour=1").symlink_to(tmp_path / "elsewhere" / "hour=1")
    (root / "again").symlink_to(tmp_path / "elsewhere" / "hour=1")
    (root / "z.parquet").symlink_to(tmp_path / "elsewhere" / "y.parquet")
    assert listed(root) == ["again/x.parquet", "hour=1/x.parquet", "z.parquet"]


@pytest.mark.parametrize("name", ["z.parquet", "hour=1"])
@pytest.mark.parametrize("target", ["../unmounted/z.parquet", "z.parquet"])
def test_a_link_that_leads_nowhere_is_named(root: Path, name: str, target: str) -> None:
    (root / name).symlink_to(target if name == "z.parquet" else target.replace("z.par", "h"))
    with pytest.raises(InputError, match=rf"in/{name}: a link to .+, which is not there; exp"):
        listed(root)


def test_what_is_hidden_may_lead_nowhere(root: Path) -> None:
    (root / ".#z.parquet").symlink_to("me@here.1234")  # Emacs edits it
    (root / ".venv").mkdir()
    (root / ".venv" / "python").symlink_to("gone")
    assert listed(root) == []


@pytest.mark.parametrize("target", ["sub", ".", "../elsewhere"])
def test_a_link_that_leads_back_is_named(root: Path, tmp_path: Path, target: str) -> None:
    (root / "sub").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "sub" / "link").symlink_to(root / target)
    with pytest.raises(InputError, match="in which it lies itself; expected folders without"):
        listed(root)


def test_on_a_disk_what_lies_in_a_dates_folder_is_told_and_stays(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.create("run/one", b"1")
    storage.create("dt=1/.DS_Store", b"x")
    said = r"dt=1: has `\.DS_Store` and no _MANIFEST\.json; expected .* Move it away"
    with pytest.raises(StorageError, match=said):
        storage.check_free("dt=1")
    with pytest.raises(StorageError, match=said):
        storage.publish({"a.parquet": "run/one"}, b"{}", "dt=1")
    assert [info.path for info in storage.list_files("")] == ["dt=1/.DS_Store", "run/one"]
