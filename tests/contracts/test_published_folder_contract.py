"""The folder of a date, over every storage: what others put there is refused, and stays."""

from __future__ import annotations

import os

import pytest
import s3fs

from pipeline.errors import StorageError
from pipeline.storage import MANIFEST, SUCCESS, Storage, open_storage

OURS = "part-00000-0123456789ab.parquet"
FOREIGN = [
    "README.md",
    "part-00000-spark.snappy.parquet",
    "part-00000-0b0ad0a5-6ad5-4b43-9a2f-2a3c5e9bd1c1-c000.snappy.parquet",
    "_SUCCESS",
    "part-00000-0123456789ab.parquet.crc",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_put_into_a_dates_folder_is_told_and_stays(storage: Storage, name: str) -> None:
    storage.create("run/one", b"1")
    storage.create(f"dt=1/{name}", b"of an earlier pipeline")
    said = rf"dt=1: has `{name}` and no _MANIFEST\.json; expected .* Move it away, and run the same"
    with pytest.raises(StorageError, match=said):
        storage.check_free("dt=1")
    with pytest.raises(StorageError, match=said):
        storage.publish({OURS: "run/one"}, b"{}", "dt=1")
    assert [info.path for info in storage.list_files("dt=1")] == [f"dt=1/{name}"]


def test_what_others_put_into_a_published_folder_is_in_nobodys_way(storage: Storage) -> None:
    storage.create("run/one", b"1")
    assert storage.publish({OURS: "run/one"}, b"{}", "dt=1")
    storage.create("dt=1/NOTES.md", b"looked at by Ann, fine")
    storage.check_free("dt=1")
    assert not storage.publish({OURS: "run/one"}, b"other", "dt=1")
    assert storage.read("dt=1/NOTES.md") == b"looked at by Ann, fine"


def test_what_a_publisher_that_died_has_copied_is_no_part_of_what_is_published(
    s3_folder: str,
) -> None:
    storage = open_storage(s3_folder)
    storage.create("parts/one", b"1")
    for stray in ("part-00001-ba9876543210", "_quarantine/quarantine-00001-ba9876543210"):
        storage.create(f"dt=1/{stray}.parquet", b"of another run")
    storage.check_free("dt=1")
    assert storage.publish({OURS: "parts/one"}, b"first", "dt=1")
    names = sorted(info.path for info in storage.list_files("dt=1"))
    assert names == [f"dt=1/{MANIFEST}", f"dt=1/{SUCCESS}", f"dt=1/{OURS}"]


def test_a_folder_that_a_console_made_is_free(s3_folder: str) -> None:
    bucket, _, prefix = s3_folder.removeprefix("s3://").partition("/")
    fs = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
        config_kwargs={"s3": {"addressing_style": "path"}},
    )
    fs.call_s3("put_object", Bucket=bucket, Key=f"{prefix}/dt=1/", Body=b"")
    open_storage(s3_folder).check_free("dt=1")
