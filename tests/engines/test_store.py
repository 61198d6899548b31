from __future__ import annotations

import dataclasses
import fcntl
import threading
from pathlib import Path

import pytest

from engines.build import resolve_engine
from engines.errors import EngineCorruptError, EngineError, LockTimeoutError
from engines.load import open_runner
from engines.store import EngineStore, StoredEngine
from tests.engines.small_models import (
    feature_rows,
    features_spec,
    request_for,
    write_features_model,
)


@pytest.fixture
def engine(store: EngineStore, tmp_path: Path) -> StoredEngine:
    spec = features_spec(write_features_model(tmp_path / "model.onnx"))
    return resolve_engine(request_for(spec), store, feature_rows, lambda _: None).engine


def test_a_manifest_reads_back_as_it_was_written(store: EngineStore, engine: StoredEngine) -> None:
    assert store.find(engine.manifest.request_key) == engine
    assert store.list() == [engine]


def test_an_engine_is_found_by_a_unique_prefix(store: EngineStore, engine: StoredEngine) -> None:
    assert store.get(engine.key[:8]) == engine
    with pytest.raises(EngineError, match="0 in"):
        store.get("0" * 64 if engine.key[0] != "0" else "f" * 64)


def test_an_unknown_request_finds_nothing(store: EngineStore) -> None:
    assert store.find("0" * 64) is None
    assert store.list() == []


def test_a_flipped_byte_in_a_stored_engine_is_caught_before_use(engine: StoredEngine) -> None:
    data = bytearray(engine.artifact.read_bytes())
    data[len(data) // 2] ^= 1
    engine.artifact.write_bytes(data)
    with pytest.raises(EngineCorruptError, match="sha256"), open_runner(engine):
        pytest.fail("a changed engine was opened")


def test_an_engine_whose_graph_is_gone_is_caught_before_use(engine: StoredEngine) -> None:
    engine.artifact.unlink()
    with pytest.raises(EngineCorruptError, match="No such file"), open_runner(engine):
        pytest.fail("a missing engine was opened")


def test_an_engine_that_computes_something_else_is_caught_by_its_probe(
    engine: StoredEngine,
) -> None:
    other = tuple(value + 1.0 for value in engine.manifest.probe)
    changed = dataclasses.replace(engine.manifest, probe=other)
    with (
        pytest.raises(EngineCorruptError, match="probe batch gives"),
        open_runner(dataclasses.replace(engine, manifest=changed)),
    ):
        pytest.fail("an engine with other results was opened")


def test_publishing_twice_keeps_one_engine_and_leaves_no_half_files(
    store: EngineStore, engine: StoredEngine, tmp_path: Path
) -> None:
    store.publish(engine.manifest, engine.artifact.read_bytes(), {})
    assert [path.name for path in (tmp_path / "store" / "engines").iterdir()] == [engine.key]
    assert not list((tmp_path / "store").rglob("*.tmp"))


def test_publishing_replaces_a_damaged_engine(store: EngineStore, engine: StoredEngine) -> None:
    graph = engine.artifact.read_bytes()
    engine.artifact.write_bytes(b"damaged")
    store.publish(engine.manifest, graph, {}).check()


def test_a_failed_publication_leaves_nothing(
    store: EngineStore, engine: StoredEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("disk says no")

    monkeypatch.setattr("engines.store.os.rename", refuse)
    manifest = dataclasses.replace(engine.manifest, key="a" * 64, request_key="b" * 64)
    with pytest.raises(PermissionError):
        store.publish(manifest, b"graph", {})
    assert [path.name for path in (tmp_path / "store" / "engines").iterdir()] == [engine.key]
    assert store.find("b" * 64) is None


def test_a_held_lock_times_out_by_name(store: EngineStore) -> None:
    with (
        store.lock("k"),
        pytest.raises(LockTimeoutError, match="held by another process"),
        store.lock("k", timeout_s=0.0),
    ):
        pytest.fail("two holders at once")


def test_a_lock_is_free_once_its_owner_is_gone(store: EngineStore, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "locks"
    folder.mkdir(parents=True)
    with (folder / "k.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    with store.lock("k", timeout_s=0.0):
        pass


def test_several_builders_of_one_engine_build_once(store: EngineStore, tmp_path: Path) -> None:
    spec = features_spec(write_features_model(tmp_path / "model.onnx"))
    built: list[bool] = []

    def build() -> None:
        resolved = resolve_engine(request_for(spec), store, feature_rows, lambda _: None)
        built.append(resolved.built)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == [False, False, True]
