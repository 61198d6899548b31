"""What is particular to a manifest, to a store on a local disk, and to the cache of a bucket."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import threading
from pathlib import Path

import numpy as np
import pytest

from engines.build import resolve_engine
from engines.devices import Gpu
from engines.errors import EngineCorruptError
from engines.gate import Accuracy
from engines.load import open_runner
from engines.manifest import EngineManifest, Rung, StoredEngine, parse_manifest
from engines.runner import TensorSpec
from engines.store import EngineStore, StoreOptions, default_cache
from pipeline.errors import StoreUnavailableError
from pipeline.local_storage import LocalStorage
from tests.engines.small_devices import H200
from tests.engines.small_models import (
    feature_sample,
    features_spec,
    request_for,
    write_features_model,
)
from tests.engines.small_stores import a_manifest, linear_graph, probe_of

GPU = H200


@pytest.fixture
def engine(store: EngineStore, tmp_path: Path) -> StoredEngine:
    """An engine that runs."""
    graph = linear_graph()
    return store.publish(a_manifest(probe=probe_of(graph, tmp_path)), graph, {"notes": b"x"})


@pytest.mark.parametrize("device", [a_manifest().device, GPU], ids=["cpu", "gpu"])
def test_a_manifest_reads_back_as_it_was_written(device: Gpu) -> None:
    manifest = a_manifest(device=device, attachments={"scales.json": "ab"})
    found = parse_manifest(manifest.to_json())
    assert found == manifest
    assert type(found.device) is type(device)


def test_a_probe_that_is_not_finite_reads_back() -> None:
    manifest = a_manifest(probe=(float("nan"), float("inf")))
    np.testing.assert_array_equal(parse_manifest(manifest.to_json()).probe, manifest.probe)


@pytest.mark.parametrize("owner", [EngineManifest, Rung, Accuracy, TensorSpec])
def test_a_manifest_of_a_program_that_knew_fewer_fields_is_none(owner: type) -> None:
    """Fields without a default are asked for, wherever they are nested."""
    (name, *_) = [f.name for f in dataclasses.fields(owner) if f.name != "name"]
    text = a_manifest().to_json().decode().replace(f'"{name}":', '"former":')
    with pytest.raises(EngineCorruptError, match=rf"{name}: Field required"):
        parse_manifest(text.encode())


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runtime_version": "1.0"}, "built with onnxruntime 1.0; expected the version here, "),
        ({"runtime": "tensorflow"}, "expected the version here, none"),
    ],
)
def test_an_engine_of_another_runtime_is_caught_before_use(
    engine: StoredEngine, changes: dict[str, str], said: str
) -> None:
    manifest = dataclasses.replace(engine.manifest, **changes)
    with pytest.raises(EngineCorruptError, match=said):
        dataclasses.replace(engine, manifest=manifest).check()


def test_an_engine_that_computes_something_else_is_caught_by_its_probe(
    engine: StoredEngine,
) -> None:
    with open_runner(engine):
        pass
    other = tuple(value + 1.0 for value in engine.manifest.probe)
    changed = dataclasses.replace(engine.manifest, probe=other)
    with (
        pytest.raises(EngineCorruptError, match="probe batch gives"),
        open_runner(dataclasses.replace(engine, manifest=changed)),
    ):
        pytest.fail("an engine with other results was opened")


def test_an_engine_built_again_with_another_answer_replaces_what_was_said_of_it(
    store: EngineStore, engine: StoredEngine
) -> None:
    right, graph = engine.manifest, engine.artifact.read_bytes()
    near = tuple(value * 1.0001 for value in right.probe)
    store.publish(dataclasses.replace(right, probe=near), graph, {})
    found = store.find(right.request_key)
    assert found is not None
    assert found.manifest.probe == right.probe, "within the tolerance the earlier build is kept"
    wrong = tuple(value + 1.0 for value in right.probe)
    assert store.publish(dataclasses.replace(right, probe=wrong), graph, {}).manifest.probe == wrong
    again = store.publish(right, graph, {})
    assert again.manifest.probe == right.probe
    assert store.find(right.request_key) == again
    assert store.check(right.key) == again
    with open_runner(again):
        pass


def test_on_a_local_disk_engines_are_read_in_place(engine: StoredEngine, tmp_path: Path) -> None:
    assert engine.artifact.parent == tmp_path / "store" / "engines" / engine.key
    assert not list((tmp_path / "store").rglob(".*.tmp"))


def test_a_full_disk_leaves_nothing_that_is_served(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    manifest = a_manifest()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.storage.os.link", refuse)
        with pytest.raises(StoreUnavailableError, match="No space"):
            store.publish(manifest, b"graph", {})
    assert store.find(manifest.request_key) is None
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    store.publish(manifest, b"graph", {}).check()


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
        resolved = resolve_engine(request_for(spec), store, feature_sample, lambda _: None)
        built.append(resolved.built)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == [False, False, True]


class Remote(LocalStorage):
    """A folder with the address of a bucket; remembers what is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.uri = "s3://bucket/engines"
        self.reads: list[str] = []

    def read(self, path: str) -> bytes | None:
        self.reads.append(path)
        return super().read(path)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "bucket")


@pytest.fixture
def cached(remote: Remote, tmp_path: Path) -> EngineStore:
    return EngineStore(remote, StoreOptions(cache=tmp_path / "cache"))


def test_an_engine_that_is_here_is_not_fetched_again(remote: Remote, cached: EngineStore) -> None:
    engine = cached.publish(a_manifest(), b"graph", {})
    remote.reads.clear()
    assert cached.find(engine.manifest.request_key) == engine
    assert [path for path in remote.reads if "graph" in path] == []


def test_a_damaged_copy_is_fetched_again(cached: EngineStore, tmp_path: Path) -> None:
    engine = cached.publish(a_manifest(), b"graph", {})
    assert engine.artifact.is_relative_to(tmp_path / "cache")
    engine.artifact.write_bytes(b"grapH")
    found = cached.find(engine.manifest.request_key)
    assert found is not None
    assert found.artifact.read_bytes() == b"graph"


def test_a_fetch_that_fails_leaves_no_copy(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineStore(remote, StoreOptions(cache=tmp_path / "first")).publish(
        a_manifest(), b"graph", {}
    )

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engines.store.os.replace", refuse)
    second = EngineStore(remote, StoreOptions(cache=tmp_path / "second"))
    with pytest.raises(OSError, match="No space"):
        second.find(engine.manifest.request_key)
    assert [path for path in (tmp_path / "second").rglob("*") if path.is_file()] == []


def test_the_cache_is_where_caches_belong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "nightscore" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache() == Path("/home/somebody/.cache/nightscore/engines")
