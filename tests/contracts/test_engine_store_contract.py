"""One suite over engine stores: on a local disk, and in a bucket of a real object store."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines.errors import (
    EngineCorruptError,
    EngineNotFoundError,
    LockTimeoutError,
    RollbackError,
)
from engines.keys import digest
from engines.manifest import StoredEngine
from engines.store import EngineStore, StoreOptions
from engines.upkeep import collect_garbage, roll_back
from pipeline.local_storage import LocalStorage
from pipeline.object_storage import ObjectStorage
from pipeline.storage import FileInfo, open_storage
from tests.engines.small_stores import a_manifest

REQUEST = digest("request")
LEASE_S = 1.0


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def machine(uri: str, tmp_path: Path, said: list[str]) -> Callable[[str], EngineStore]:
    """The store as another machine, with a cache of its own, sees it."""

    def open_on(name: str, lease_s: float = LEASE_S) -> EngineStore:
        options = StoreOptions(cache=tmp_path / "cache" / name, say=said.append, lease_s=lease_s)
        return EngineStore(open_storage(uri), options)

    return open_on


@pytest.fixture
def store(machine: Callable[[str], EngineStore]) -> EngineStore:
    return machine("here")


def publish(store: EngineStore, key: str = "key", data: bytes = b"graph" * 99) -> StoredEngine:
    manifest = a_manifest(key)
    return store.publish(manifest, data, {"scales.json": b'{"x": 0.5}'})


def replace_file(store: EngineStore, path: str, data: bytes) -> None:
    store.files.delete(path)
    assert store.files.create(path, data)


def flip(store: EngineStore, path: str) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(store.files.read(path) or b"")
    data[len(data) // 2] ^= 1
    replace_file(store, path, bytes(data))


def paths_of(store: EngineStore, prefix: str = "") -> list[str]:
    return [file.path for file in store.files.list_files(prefix)]


def test_what_was_published_is_found_by_another_machine(
    store: EngineStore, machine: Callable[[str], EngineStore]
) -> None:
    published = publish(store)
    found = machine("there").find(REQUEST)
    assert found is not None
    assert found.manifest == published.manifest
    assert found.artifact.read_bytes() == b"graph" * 99
    found.check()
    assert [engine.manifest for engine in store.list()] == [published.manifest]
    assert store.get(published.key[:9]).manifest == published.manifest


def test_an_unknown_request_and_an_unknown_key_are_not_there(store: EngineStore) -> None:
    assert store.find(REQUEST) is None
    assert store.list() == []
    with pytest.raises(EngineNotFoundError, match="0 in"):
        store.get("ab")


def test_an_engine_goes_to_a_lane_and_needs_no_store_there(store: EngineStore) -> None:
    engine = pickle.loads(pickle.dumps(publish(store)))
    engine.check()
    assert isinstance(engine.artifact, Path)
    assert engine.artifact.name.endswith("-graph.onnx")


@pytest.mark.parametrize("part", ["artifact", "attachment", "manifest", "version"])
def test_a_flipped_byte_is_never_served_and_the_next_build_replaces_it(
    store: EngineStore,
    machine: Callable[[str], EngineStore],
    caplog: pytest.LogCaptureFixture,
    part: str,
) -> None:
    first = publish(store)
    ends = {
        "artifact": "-graph.onnx",
        "attachment": "-scales.json",
        "manifest": "/manifest.json",
        "version": "/0001.json",
    }[part]
    (path,) = [path for path in paths_of(store) if path.endswith(ends)]
    flip(store, path)
    there = machine("there")  # it has nothing in its cache
    with caplog.at_level(logging.WARNING):
        assert there.find(REQUEST) is None
    assert "it is not used, and built again" in caplog.text
    if part != "version":
        with pytest.raises(EngineCorruptError):
            there.check(first.key)
    publish(there).check()
    assert there.check(first.key).key == first.key
    found = machine("third").find(REQUEST)
    assert found is not None
    assert found.key == first.key


@pytest.mark.parametrize("gone", ["-graph.onnx", "-scales.json", "/manifest.json"])
def test_a_lost_file_is_never_served_and_replaced(
    store: EngineStore, machine: Callable[[str], EngineStore], gone: str
) -> None:
    key = publish(store).key
    (path,) = [path for path in paths_of(store) if path.endswith(gone)]
    store.files.delete(path)
    assert machine("there").find(REQUEST) is None
    with pytest.raises(EngineCorruptError, match=r"gone|no manifest"):
        store.check(key)
    publish(store, data=b"built again, with other bytes")
    found = machine("there").find(REQUEST)
    assert found is not None
    assert store.check(key).manifest == found.manifest


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"\xff\xfe", b"{}", b'{"number": 7}', b"null"],
    ids=["empty", "torn", "no text", "no fields", "few fields", "null"],
)
def test_a_version_or_manifest_that_is_none_is_not_served(
    store: EngineStore, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    key = publish(store).key
    replace_file(store, f"requests/{REQUEST}/0001.json", text)
    assert store.find(REQUEST) is None
    assert "not used" in caplog.text
    replace_file(store, f"engines/{key}/manifest.json", text)
    assert store.list() == []
    with pytest.raises(EngineCorruptError):
        store.check(key)


def test_an_engine_of_another_version_of_the_runtime_is_not_served(
    store: EngineStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.publish(a_manifest(runtime_version="0.1"), b"graph", {})
    assert store.find(REQUEST) is None
    assert "built with onnxruntime 0.1; expected the version here" in caplog.text
    publish(store)
    assert store.find(REQUEST) is not None


def test_an_engine_that_answers_another_request_is_not_served(
    store: EngineStore, caplog: pytest.LogCaptureFixture
) -> None:
    engine = publish(store)
    version = store.versions.current(REQUEST)
    assert version is not None
    store.versions.append(digest("other"), engine.key, version.manifest_sha256, "built")
    assert store.find(digest("other")) is None
    assert "answers request" in caplog.text


def test_of_two_builds_of_one_key_the_first_is_kept(
    store: EngineStore, machine: Callable[[str], EngineStore]
) -> None:
    publish(store, data=b"first")
    second = publish(machine("there"), data=b"second")
    assert second.artifact.read_bytes() == b"first"
    second.check()


def test_of_many_that_publish_one_key_at_once_all_get_the_same_engine(
    machine: Callable[[str], EngineStore],
) -> None:
    stores = [machine(str(number)) for number in range(6)]
    start = threading.Barrier(len(stores))

    def build(number: int) -> StoredEngine:
        start.wait(30)
        return publish(stores[number], data=b"build %d" % number)

    with ThreadPoolExecutor(len(stores)) as pool:
        engines = list(pool.map(build, range(len(stores))))
    assert len({engine.manifest.artifact_sha256 for engine in engines}) == 1
    numbers = [version.number for version in stores[0].versions.history(REQUEST)]
    assert numbers == list(range(1, 7))
    found = stores[0].find(REQUEST)
    assert found is not None
    assert found.manifest == engines[0].manifest


def test_the_lock_is_held_by_one_at_a_time(machine: Callable[..., EngineStore]) -> None:
    inside, most = 0, 0

    def hold(name: str) -> None:
        nonlocal inside, most
        # A lease so long that a busy machine does not make its owner look dead.
        with machine(name, lease_s=60.0).lock(REQUEST, timeout_s=60):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, "abcd"))
    assert most == 1


def test_who_waits_says_so_once_and_not_for_ever(store: EngineStore, said: list[str]) -> None:
    with (
        store.lock(REQUEST),
        pytest.raises(LockTimeoutError, match=r"held by .*process .*expected its build to end"),
        store.lock(REQUEST, timeout_s=0.5),
    ):
        pytest.fail("two owners at once")
    (line,) = said
    assert "builds this engine; waiting for it" in line


def test_a_lock_leaves_nothing_in_the_way_of_the_next(store: EngineStore) -> None:
    for _ in range(2):
        with store.lock(REQUEST, timeout_s=0.0):
            pass
    assert [path for path in paths_of(store, "locks") if not path.endswith(".lock")] == []


def test_locks_of_different_requests_do_not_meet(store: EngineStore) -> None:
    with store.lock(REQUEST), store.lock(digest("other"), timeout_s=0.0):
        pass


def test_rolling_back_and_forth_appends_versions(store: EngineStore) -> None:
    first, second = publish(store, "first"), publish(store, "second", b"other")
    assert roll_back(store, REQUEST).engine == first.key
    assert store.find(REQUEST) == first
    assert roll_back(store, REQUEST).engine == second.key
    assert roll_back(store, REQUEST, to=first.key).number == 5
    why = [version.why for version in store.versions.history(REQUEST)]
    assert why == ["built", "built", "rolled back", "rolled back", "rolled back"]


def test_rolling_back_needs_another_engine_that_is_good(store: EngineStore) -> None:
    with pytest.raises(RollbackError, match="no engine has answered this request"):
        roll_back(store, REQUEST)
    first = publish(store, "first")
    with pytest.raises(RollbackError, match="the only one that has answered"):
        roll_back(store, REQUEST)
    with pytest.raises(RollbackError, match="current already"):
        roll_back(store, REQUEST, to=first.key)
    with pytest.raises(RollbackError, match="has never answered this request"):
        roll_back(store, REQUEST, to=digest("another"))
    publish(store, "second", b"other")
    (path,) = [path for path in paths_of(store, f"engines/{first.key}") if "graph" in path]
    flip(store, path)
    with pytest.raises(EngineCorruptError, match="changed after it was stored"):
        roll_back(store, REQUEST)
    assert len(store.versions.history(REQUEST)) == 2


def test_an_engine_that_missed_the_gate_is_never_promoted(store: EngineStore) -> None:
    good = a_manifest("first")
    rungs = tuple(dataclasses.replace(rung, passed=False) for rung in good.rungs)
    store.publish(dataclasses.replace(good, rungs=rungs), b"graph", {})
    publish(store, "second")
    with pytest.raises(RollbackError, match="did not pass the gate"):
        roll_back(store, REQUEST)


def test_a_damaged_current_engine_can_be_rolled_back_from(
    store: EngineStore, machine: Callable[[str], EngineStore]
) -> None:
    first, second = publish(store, "first"), publish(store, "second", b"other")
    (path,) = [path for path in paths_of(store, f"engines/{second.key}") if "graph" in path]
    flip(store, path)
    assert machine("there").find(REQUEST) is None
    roll_back(store, REQUEST)
    assert store.find(REQUEST) == first


@pytest.fixture
def two_hours_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes all files two hours old."""

    def pass_time() -> None:
        now = time.time
        monkeypatch.setattr("engines.upkeep.time.time", lambda: now() + 7200)

    return pass_time


def test_engines_beyond_the_newest_versions_are_removed(
    store: EngineStore, two_hours_on: Callable[[], None]
) -> None:
    engines = [publish(store, name, name.encode()) for name in "abcd"]
    other = store.publish(a_manifest("e", "another request"), b"e", {})
    sizes = {file.path: file.num_bytes for file in store.files.list_files("")}
    assert collect_garbage(store, 3).engines == ()  # too young: it may be published right now
    two_hours_on()
    planned = collect_garbage(store, 3, dry_run=True)
    assert planned.engines == (engines[0].key,)
    assert len(store.list()) == 5
    done = collect_garbage(store, 3)
    assert done == planned
    left = paths_of(store)
    assert done.num_bytes == sum(size for path, size in sizes.items() if path not in left)
    assert not store.folder(engines[0].key).exists()
    assert {e.key for e in store.list()} == {other.key, *(e.key for e in engines[1:])}
    for engine in (*engines[1:], other):
        store.check(engine.key)
    with pytest.raises(EngineCorruptError, match=r"no manifest\.json"):
        roll_back(store, REQUEST, to=engines[0].key)


def test_what_killed_processes_left_is_removed_when_it_is_old(
    store: EngineStore, two_hours_on: Callable[[], None]
) -> None:
    engine = publish(store)
    left_overs = {
        f"engines/{engine.key}/.graph.onnx.{'0' * 32}.tmp",
        f"engines/{engine.key}/0123456789abcdef-graph.onnx",
        f"requests/{REQUEST}/.0002.json.{'0' * 32}.tmp",
        f"locks/{REQUEST}/000001.json",
        f"locks/{REQUEST}/000001.token.7",
    }
    for path in (*left_overs, "somebody/elses"):
        store.files.create(path, b"12345")
    assert collect_garbage(store, 3).left_overs == ()
    two_hours_on()
    garbage = collect_garbage(store, 3)
    assert set(garbage.left_overs) == left_overs
    assert garbage.num_bytes == 25
    assert collect_garbage(store, 3).left_overs == ()
    store.check(engine.key)
    assert "somebody/elses" in paths_of(store)


def test_a_reply_that_is_lost_appends_one_version(
    uri: str, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage's promise, seen from here: an entry that is ours counts as created."""
    kind = ObjectStorage if uri.startswith("s3://") else LocalStorage
    create = kind.create

    def twice(self: LocalStorage | ObjectStorage, path: str, data: bytes) -> bool:
        create(self, path, data)  # type: ignore[arg-type]
        return self.read(path) == data

    monkeypatch.setattr(kind, "create", twice)
    publish(store)
    assert [version.number for version in store.versions.history(REQUEST)] == [1]


def test_the_manifest_comes_after_the_files_that_it_names(
    uri: str, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that dies at any write leaves nothing that is served, and the next one succeeds."""
    kind = ObjectStorage if uri.startswith("s3://") else LocalStorage
    create = kind.create

    class DiedError(Exception):
        """Stands for a kill."""

    num_writes = 4  # artifact, attachment, manifest, version
    for allowed in range(num_writes):
        count = 0

        def dying(
            self: LocalStorage | ObjectStorage, path: str, data: bytes, allowed: int = allowed
        ) -> bool:
            nonlocal count
            count += 1
            if count > allowed:
                raise DiedError
            return create(self, path, data)  # type: ignore[arg-type]

        monkeypatch.setattr(kind, "create", dying)
        name = f"request {allowed}"
        manifest = a_manifest(f"key {allowed}", name)
        with pytest.raises(DiedError):
            store.publish(manifest, b"half", {"scales.json": b"{}"})
        monkeypatch.setattr(kind, "create", create)
        assert store.find(digest(name)) is None
        store.publish(manifest, b"whole", {"scales.json": b"{}"})
        found = store.find(digest(name))
        assert found is not None
        found.check()


def test_a_listing_knows_when_a_file_was_made(store: EngineStore) -> None:
    publish(store)
    for file in store.files.list_files(""):
        assert isinstance(file, FileInfo)
        assert abs(file.modified_at - time.time()) < 60


def test_entries_are_plain_json_for_other_tools(store: EngineStore) -> None:
    key = publish(store).key
    entry = json.loads(store.files.read(f"requests/{REQUEST}/0001.json") or b"")
    assert (entry["number"], entry["engine"], entry["why"]) == (1, key, "built")
    assert {"at", "host", "manifest_sha256"} <= set(entry)
