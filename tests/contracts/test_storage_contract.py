"""One suite over every storage: a local disk, and a real object store."""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, InputChangedError, StorageError
from pipeline.local_storage import LocalStorage, exchange
from pipeline.object_storage import DEADLINE_VARIABLE, ObjectStorage
from pipeline.storage import MANIFEST, SUCCESS, Storage, open_storage, probe

NUM_WRITERS = 16


def test_the_address_decides_the_kind(uri: str, storage: Storage) -> None:
    assert isinstance(storage, ObjectStorage if uri.startswith("s3://") else LocalStorage)
    assert storage.uri == uri


def test_what_was_created_can_be_read_at_once_by_others(uri: str, storage: Storage) -> None:
    for number in range(20):
        assert storage.create(f"a/{number}", b"%d" % number)
        assert open_storage(uri).read(f"a/{number}") == b"%d" % number


def test_create_never_replaces(storage: Storage) -> None:
    assert storage.create("a/b/c", b"first")
    assert not storage.create("a/b/c", b"second")
    assert storage.read("a/b/c") == b"first"


def test_an_empty_file_is_created_and_not_replaced(storage: Storage) -> None:
    assert storage.create("marker", b"")
    assert storage.read("marker") == b""
    assert not storage.create("marker", b"other")
    assert storage.read("marker") == b""


def test_of_many_writers_one_wins_and_its_bytes_stay(uri: str) -> None:
    storages = [open_storage(uri) for _ in range(NUM_WRITERS)]
    for number in range(2):
        start = threading.Barrier(NUM_WRITERS)
        path = f"race/{number}"

        def write(
            writer: int, start: threading.Barrier = start, path: str = path
        ) -> tuple[bool, bytes]:
            data = b"writer %d " % writer * 1000
            start.wait(30)
            return storages[writer].create(path, data), data

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            outcomes = list(pool.map(write, range(NUM_WRITERS)))
        winners = [data for won, data in outcomes if won]
        assert len(winners) == 1
        assert storages[0].read(path) == winners[0]


def test_a_lost_race_leaves_nothing_behind(storage: Storage) -> None:
    storage.create("x/one", b"1")
    storage.create("x/one", b"2")
    assert [info.path for info in storage.list_files("")] == ["x/one"]


def test_what_is_missing_is_none_or_empty(storage: Storage) -> None:
    storage.create("there/file", b"x")
    assert storage.read("there/other") is None
    assert storage.read("nowhere/at/all") is None
    assert storage.info("there/other") is None
    assert storage.info("there") is None  # a folder is no file
    assert storage.list_files("nowhere") == []
    storage.delete("there/other")  # fine


def test_below_a_file_there_is_nothing(storage: Storage) -> None:
    storage.create("file", b"x")
    assert storage.read("file/below") is None
    assert storage.info("file/below") is None
    assert storage.list_files("file/below") == []


def test_listing_goes_all_the_way_down_and_no_further(storage: Storage) -> None:
    for path in ("b/2", "b/1", "b/c/3", "bc/4", "a"):
        storage.create(path, path.encode())
    found = storage.list_files("b")
    assert [(info.path, info.num_bytes) for info in found] == [("b/1", 3), ("b/2", 3), ("b/c/3", 5)]
    everything = [info.path for info in storage.list_files("")]
    assert everything == ["a", "b/1", "b/2", "b/c/3", "bc/4"]


def test_listing_while_others_write_does_not_fail(uri: str, storage: Storage) -> None:
    storage.create("busy/first", b"x")
    writer = open_storage(uri)
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(150):
                writer.create(f"busy/{number}", b"x" * 100)
                writer.delete(f"busy/{number}")
        finally:
            done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.is_set():
            assert "busy/first" in [info.path for info in storage.list_files("busy")]
        writing.result()


def test_the_same_version_is_listed_and_asked_for(storage: Storage) -> None:
    storage.create("a/file", b"content")
    (listed,) = storage.list_files("a")
    assert storage.info("a/file") == listed
    assert storage.info("a/file") == listed


def test_another_content_of_the_same_length_is_another_version(storage: Storage) -> None:
    storage.create("file", b"one")
    before = storage.info("file")
    storage.delete("file")
    storage.create("file", b"two")
    after = storage.info("file")
    assert before is not None
    assert after is not None
    assert before.num_bytes == after.num_bytes
    assert before.version != after.version


def test_many_files_come_in_the_order_asked_for(storage: Storage) -> None:
    for name in "abc":
        storage.create(name, name.encode() * 3)
    assert storage.read_many([]) == []
    assert storage.read_many(["b"]) == [b"bbb"]
    assert storage.read_many(["c", "a", "b"]) == [b"ccc", b"aaa", b"bbb"]


@pytest.mark.parametrize("name", ["team[1]", "team*", "team?", "a b+c%20 ü"])
def test_names_are_no_patterns(uri: str, name: str) -> None:
    beside, storage = open_storage(f"{uri}/team1"), open_storage(f"{uri}/{name}")
    for path in ("a/one", "a/t*", "a/two"):
        assert [each.create(path, each.uri.encode()) for each in (beside, storage)] == [True] * 2
    assert storage.read_many(["a/one", "a/t*"]) == [storage.uri.encode()] * 2
    assert [info.path for info in storage.list_files("a")] == ["a/one", "a/t*", "a/two"]
    storage.copy({"b/t*": "a/t*"})
    storage.delete_many(["a/t*"])
    assert [info.path for info in storage.list_files("")] == ["a/one", "a/two", "b/t*"]
    assert storage.publish({"part": "a/one"}, b"{}", "dt=1")
    assert len(beside.list_files("")) == 3


def test_an_open_file_can_be_read_from_anywhere(storage: Storage) -> None:
    storage.create("file", bytes(range(256)))
    with storage.open("file") as file:
        file.seek(-6, 2)
        assert file.read(4) == bytes([250, 251, 252, 253])
        file.seek(10)
        assert file.read(2) == bytes([10, 11])


def test_a_file_that_was_listed_is_read_as_it_was_or_not_at_all(storage: Storage) -> None:
    storage.create("file", b"as it was")
    (listed,) = storage.list_files("")
    with storage.open("file", listed) as file:
        assert file.read() == b"as it was"
    storage.delete("file")
    storage.create("file", b"different")
    opened = storage.open("file", listed)
    with opened as file:
        if storage.is_far:
            with pytest.raises(InputChangedError, match="gone, or another version"):
                file.read()
        else:  # whoever reads it looks before and after
            assert storage.info("file") != listed


def test_a_file_that_is_missing_cannot_be_opened(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.open("missing")


def test_a_deleted_file_is_gone(storage: Storage) -> None:
    storage.create("file", b"x")
    storage.delete("file")
    assert storage.read("file") is None
    assert storage.create("file", b"y")


def test_publishing_makes_everything_appear(storage: Storage) -> None:
    storage.create("run/part-0", b"zero")
    storage.create("run/bad-0", b"bad")
    files = {"part-0.parquet": "run/part-0", "_quarantine/bad-0.parquet": "run/bad-0"}
    assert storage.publish(files, b"{}", "job/dt=1")
    assert storage.read("job/dt=1/part-0.parquet") == b"zero"
    assert storage.read("job/dt=1/_quarantine/bad-0.parquet") == b"bad"
    assert storage.read(f"job/dt=1/{MANIFEST}") == b"{}"
    assert storage.read(f"job/dt=1/{SUCCESS}") == b""
    names = [info.path for info in storage.list_files("job")]
    assert len(names) == 4  # and nothing else, such as a folder in the making


def test_a_second_publisher_loses_and_changes_nothing(storage: Storage) -> None:
    storage.create("run/one", b"one")
    storage.create("run/two", b"two")
    assert storage.publish({"part.parquet": "run/one"}, b"first", "job/dt=1")
    assert not storage.publish({"part-x.parquet": "run/two"}, b"second", "job/dt=1")
    assert storage.read(f"job/dt=1/{MANIFEST}") == b"first"
    assert storage.read("job/dt=1/part-x.parquet") is None
    assert storage.read("job/dt=1/part.parquet") == b"one"


def test_of_several_publishers_at_once_one_wins(uri: str) -> None:
    storages = [open_storage(uri) for _ in range(6)]
    for number, storage in enumerate(storages):
        storage.create(f"run/part-{number}", b"%d" % number)
    start = threading.Barrier(len(storages))

    def publish(number: int) -> bool:
        start.wait(30)
        files = {f"part-{number:05d}-0123456789ab.parquet": f"run/part-{number}"}
        return storages[number].publish(files, b"manifest %d" % number, "job/dt=1")

    with ThreadPoolExecutor(len(storages)) as pool:
        outcomes = list(pool.map(publish, range(len(storages))))
    assert outcomes.count(True) == 1
    winner = outcomes.index(True)
    assert storages[0].read(f"job/dt=1/{MANIFEST}") == b"manifest %d" % winner
    part = f"job/dt=1/part-{winner:05d}-0123456789ab.parquet"
    assert storages[0].read(part) == b"%d" % winner


def test_publishing_a_part_that_is_gone_publishes_nothing(storage: Storage) -> None:
    storage.create("run/one", b"one")
    with pytest.raises(OSError, match=r"(?s)."):
        storage.publish({"a.parquet": "run/one", "b.parquet": "run/gone"}, b"{}", "job/dt=1")
    assert storage.read(f"job/dt=1/{MANIFEST}") is None
    assert storage.read(f"job/dt=1/{SUCCESS}") is None
    assert storage.publish({"a.parquet": "run/one"}, b"{}", "job/dt=1")


def test_a_folder_that_is_published_or_empty_is_free(storage: Storage, tmp_path: Path) -> None:
    storage.check_free("dt=1")
    (tmp_path / "store" / "dt=1").mkdir(parents=True)
    storage.check_free("dt=1")
    storage.create("run/one", b"1")
    assert storage.publish({"a.parquet": "run/one"}, b"{}", "dt=1")
    storage.check_free("dt=1")


def test_a_good_store_passes_the_probe_and_is_left_clean(storage: Storage) -> None:
    probe(storage, "job/_runs")
    assert storage.list_files("") == []


def careless(kind: type[LocalStorage] | type[ObjectStorage]) -> Callable[[str], Storage]:
    """A store that ignores If-None-Match, as rclone's S3 server does."""

    class Careless(kind):  # type: ignore[misc, valid-type]
        def create(self, path: str, data: bytes) -> bool:
            self.delete(path)
            return bool(super().create(path, data))

    return Careless


def test_a_store_that_replaces_is_refused(uri: str) -> None:
    kind = ObjectStorage if uri.startswith("s3://") else LocalStorage
    storage = careless(kind)(uri)
    with pytest.raises(StorageError, match="does not honour create-if-absent"):
        probe(storage, "job")
    assert storage.list_files("") == []


def test_a_store_that_shows_something_else_is_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: type = ObjectStorage if uri.startswith("s3://") else LocalStorage

    class Stale(kind):  # type: ignore[misc]
        def read(self, path: str) -> bytes | None:
            return None if "_probe-" in path else super().read(path)

    monkeypatch.setenv(DEADLINE_VARIABLE, "0.1")
    with pytest.raises(StorageError, match=r"expected (conditional|a) write"):
        probe(Stale(uri), "job")


def test_an_output_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); expected a writable output"):
        probe(open_storage(str(tmp_path / "file" / "x")), "job")


def test_an_object_store_that_does_not_know_us_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, s3_folder: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ConfigError, match=r"cannot be written \(.+\); expected a writable output"):
        probe(open_storage(s3_folder), "job")


@pytest.mark.parametrize("address", ["gs://bucket/x", "s3://", "ftp://x/y"])
def test_other_kinds_of_storage_are_named(address: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown kind of storage; expected a path or s3://"):
        open_storage(address)


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}")
    storage.create("a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_torn_write_never_has_the_final_name(tmp_path: Path) -> None:
    """What a killed writer leaves is hidden, and does not stop the next one."""
    storage = LocalStorage(str(tmp_path))
    (tmp_path / f".part.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    assert storage.create("part", b"whole")
    assert storage.read("part") == b"whole"


def test_copies_appear_beside_and_leave_alone_what_is_there(storage: Storage) -> None:
    storage.create("from/one", b"1")
    storage.create("from/two", b"2")
    storage.copy({"to/a/one": "from/one", "to/two": "from/two"})
    storage.copy({"to/two": "from/two"})
    assert [storage.read(path) for path in ("to/a/one", "to/two", "from/one")] == [b"1", b"2", b"1"]


def test_many_files_go_at_once_and_missing_ones_are_fine(storage: Storage) -> None:
    paths = [f"a/{number % 7}/{number}" for number in range(50)]
    for path in paths:
        storage.create(path, b"x")
    storage.create("a/stays", b"x")
    storage.delete_many([*paths, "a/never/was"])
    storage.delete_many([])
    assert [info.path for info in storage.list_files("")] == ["a/stays"]


def test_deleting_many_leaves_no_empty_folders(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "store"))
    storage.create("a/b/c/file", b"x")
    storage.create("a/other", b"x")
    storage.delete_many(["a/b/c/file"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "other", "store"]


class TestSwap:
    """One version in the place of another."""

    @pytest.fixture(autouse=True)
    def _publish(self, storage: Storage) -> None:
        for name in ("one", "two", "three"):
            storage.create(f"parts/{name}", name.encode())
        assert storage.publish({"x/one": "parts/one"}, b"first", "dt=1")

    def test_it_takes_the_place_of_the_expected_version(self, storage: Storage) -> None:
        assert storage.swap({"x/two": "parts/two"}, b"second", "dt=1", b"first")
        assert storage.read(f"dt=1/{MANIFEST}") == b"second"
        assert storage.read("dt=1/x/two") == b"two"
        assert [info.path for info in storage.list_files("")][-1] == "parts/two"

    def test_another_version_stays(self, storage: Storage) -> None:
        before = storage.list_files("")
        assert not storage.swap({"two": "parts/two"}, b"third", "dt=1", b"second")
        assert not storage.swap({"two": "parts/two"}, b"third", "dt=2", b"second")
        assert storage.list_files("") == before

    def test_of_many_that_expect_the_same_version_one_wins(
        self, uri: str, storage: Storage
    ) -> None:
        storages = [open_storage(uri) for _ in range(NUM_WRITERS)]
        start = threading.Barrier(NUM_WRITERS)

        def swap(writer: int) -> bool:
            start.wait(30)
            files = {f"two-{writer}": "parts/two"}
            return storages[writer].swap(files, b"by %d" % writer, "dt=1", b"first")

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            won = [writer for writer, did in enumerate(pool.map(swap, range(NUM_WRITERS))) if did]
        assert len(won) == 1
        assert storage.read(f"dt=1/{MANIFEST}") == b"by %d" % won[0]
        assert storage.read(f"dt=1/two-{won[0]}") == b"two"


def test_on_a_disk_a_swapped_folder_has_nothing_of_the_version_before(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.create("parts/one", b"1")
    storage.create("parts/two", b"2")
    storage.publish({"one": "parts/one"}, b"first", "dt=1")
    storage.swap({"two": "parts/two"}, b"second", "dt=1", b"first")
    assert sorted(path.name for path in (tmp_path / "dt=1").iterdir()) == sorted(
        [MANIFEST, SUCCESS, "two"]
    )
    assert not list(tmp_path.glob("_publishing-*"))


def test_an_object_store_is_told_whole_only_once_the_caller_has_tidied_up(s3_folder: str) -> None:
    storage = open_storage(s3_folder)
    storage.create("parts/one", b"1")
    storage.publish({"one": "parts/one"}, b"first", "dt=1")
    assert storage.info(f"dt=1/{SUCCESS}") is not None
    storage.swap({"two": "parts/one"}, b"second", "dt=1", b"first")
    assert storage.info(f"dt=1/{SUCCESS}") is None


def test_an_upload_that_nobody_completed_is_found_and_dropped(s3_folder: str) -> None:
    import s3fs

    storage = open_storage(s3_folder)
    assert isinstance(storage, ObjectStorage)
    bucket, _, prefix = s3_folder.removeprefix("s3://").partition("/")
    fs = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
        config_kwargs={"s3": {"addressing_style": "path"}},
    )
    begun = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/job/big")
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/jobless/big")
    (found,) = storage.unfinished_uploads("job")
    assert (found.path, found.upload_id) == ("job/big", begun["UploadId"])
    assert abs(found.started_at - time.time()) < 60
    storage.abort_upload(found)
    storage.abort_upload(found)
    assert storage.unfinished_uploads("job") == []


def test_a_disk_has_no_uploads(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path)).unfinished_uploads("job") == []


def test_a_file_system_that_cannot_exchange_folders_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # as on macOS
    with pytest.raises(StorageError, match=r"cannot exchange two folders at once; expected Linux"):
        exchange(tmp_path / "one", tmp_path / "two")


def test_a_lock_that_is_not_given_back_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.create("job/parts/one", b"1")
    storage.publish({"one": "job/parts/one"}, b"first", "job/dt=1")
    monkeypatch.setattr("pipeline.local_storage.LOCK_TIMEOUT_S", 0.2)
    descriptor = os.open(tmp_path / "job", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match=r"locked by another process for 0\.2 s"):
        storage.swap({"one": "job/parts/one"}, b"second", "job/dt=1", b"first")
    os.close(descriptor)
    assert storage.swap({"one": "job/parts/one"}, b"second", "job/dt=1", b"first")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", ".."])
def test_no_path_leads_out_of_the_root(storage: Storage, path: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: storage.list_files(path),
        lambda: storage.info(path),
        lambda: storage.open(path),
        lambda: storage.read(path),
        lambda: storage.read_many([path]),
        lambda: storage.create(path, b"x"),
        lambda: storage.delete(path),
        lambda: storage.publish({}, b"x", path),
        lambda: storage.publish({"part": path}, b"x", "target-1"),
        lambda: storage.publish({path: "part"}, b"x", "target-2"),
    ]
    storage.create("part", b"x")
    for call in calls:
        with pytest.raises(StorageError, match="leads out of it"):
            call()
    assert storage.list_files("target-1") == storage.list_files("target-2") == []


def test_dots_within_a_name_are_ordinary(storage: Storage) -> None:
    assert storage.create("a..b/...c", b"x")
    assert storage.read("a..b/...c") == b"x"


def test_folders_are_listed_by_name_and_not_looked_into(storage: Storage) -> None:
    for path in ("b/2", "b/c/3", "b/a/d/4", "bc/5", "a"):
        storage.create(path, b"x")
    assert storage.list_folders("b") == ["a", "c"]
    assert storage.list_folders("b/a") == ["d"]
    assert storage.list_folders("bc") == storage.list_folders("nowhere") == []
    assert storage.list_folders("a") == []  # a file
