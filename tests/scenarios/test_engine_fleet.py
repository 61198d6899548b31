"""Several processes that want one engine: on a disk and in a bucket, killed and suspended."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from engines.build import Sample, resolve_engine
from engines.store import EngineStore, StoreOptions
from pipeline.storage import open_storage
from tests.conftest import DATE
from tests.engines.small_models import (
    feature_sample,
    features_spec,
    request_for,
    write_features_model,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]
SPAWN = multiprocessing.get_context("spawn")
LEASE_S = 6.0
PATIENCE_S = 120.0


@pytest.fixture(params=["local", "object"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "object":
        return str(request.getfixturevalue("s3_folder"))
    return str(tmp_path / "store")


def machine(name: str, folder: str, uri: str) -> None:
    """One machine: gets the engine, and writes down what it did. `<name>.hold` stops its build."""
    notes = Path(folder)

    def note(text: str) -> None:
        with (notes / f"{name}.said").open("a") as file:
            file.write(text + "\n")

    def rows(num_rows: int, seed: int) -> Sample:
        note("building")
        while (notes / f"{name}.hold").exists():
            time.sleep(0.02)
        return feature_sample(num_rows, seed)

    options = StoreOptions(cache=notes / f"{name}.cache", say=note, lease_s=LEASE_S)
    store = EngineStore(open_storage(uri), options)
    request = request_for(features_spec(notes / "m.onnx"))
    resolved = resolve_engine(request, store, rows, lambda _: None)
    resolved.engine.check()
    result = {"key": resolved.engine.key, "built": resolved.built}
    result["sha256"] = resolved.engine.manifest.artifact_sha256
    (notes / f"{name}.json").write_text(json.dumps(result))


class Fleet:
    """Machines that share a store."""

    def __init__(self, folder: Path, uri: str) -> None:
        self._folder = folder
        self._uri = uri
        self.processes: dict[str, BaseProcess] = {}
        write_features_model(folder / "m.onnx")

    def start(self, name: str, *, hold: bool = False) -> BaseProcess:
        if hold:
            (self._folder / f"{name}.hold").touch()
        process = SPAWN.Process(target=machine, args=(name, str(self._folder), self._uri))
        process.start()
        self.processes[name] = process
        return process

    def go_on(self, name: str) -> None:
        (self._folder / f"{name}.hold").unlink()

    def said(self, name: str) -> str:
        path = self._folder / f"{name}.said"
        return path.read_text() if path.exists() else ""

    def wait_until_said(self, name: str, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.said(name):
            assert self.processes[name].is_alive(), f"{name} ended: {self.said(name)}"
            assert time.monotonic() < deadline, f"{name}: {self.said(name)}"
            time.sleep(0.02)

    def result(self, name: str) -> dict[str, Any]:
        process = self.processes[name]
        process.join(PATIENCE_S)
        assert process.exitcode == 0, self.said(name)
        found: dict[str, Any] = json.loads((self._folder / f"{name}.json").read_text())
        return found

    def store(self) -> EngineStore:
        return EngineStore(open_storage(self._uri), StoreOptions(cache=self._folder / "here"))


@contextmanager
def open_fleet(folder: Path, uri: str) -> Iterator[Fleet]:
    fleet = Fleet(folder, uri)
    try:
        yield fleet
    finally:
        for process in fleet.processes.values():
            process.kill()
            process.join()


@pytest.fixture
def fleet(tmp_path: Path, uri: str) -> Iterator[Fleet]:
    with open_fleet(tmp_path, uri) as fleet:
        yield fleet


@pytest.fixture
def fleet_on_s3(tmp_path: Path, s3_folder: str) -> Iterator[Fleet]:
    with open_fleet(tmp_path, s3_folder) as fleet:
        yield fleet


def test_machines_that_want_one_engine_build_it_once(fleet: Fleet) -> None:
    for name in "abc":
        fleet.start(name)
    results = [fleet.result(name) for name in "abc"]
    assert sorted(result["built"] for result in results) == [False, False, True]
    assert len({(result["key"], result["sha256"]) for result in results}) == 1
    assert sum(fleet.said(name).count("building\n") for name in "abc") == 1
    (engine,) = fleet.store().list()
    assert len(fleet.store().versions.history(engine.manifest.request_key)) == 1


def test_who_waits_for_a_builder_that_is_killed_takes_over(fleet: Fleet) -> None:
    builder = fleet.start("builder", hold=True)
    fleet.wait_until_said("builder", "building")
    fleet.start("waiter")
    fleet.wait_until_said("waiter", "builds this engine; waiting for it")
    assert "building" not in fleet.said("waiter")
    assert builder.pid
    os.kill(builder.pid, signal.SIGKILL)
    result = fleet.result("waiter")
    assert result["built"]
    assert fleet.store().check(result["key"]).key == result["key"]
    locks = fleet.store().files.list_files("locks")
    assert [file.path for file in locks if not file.path.endswith(".lock")] == []


def test_a_slow_builder_that_shows_life_keeps_its_lease(fleet_on_s3: Fleet) -> None:
    fleet = fleet_on_s3
    fleet.start("builder", hold=True)
    fleet.wait_until_said("builder", "building")
    fleet.start("waiter")
    fleet.wait_until_said("waiter", "waiting for it")
    time.sleep(2.5 * LEASE_S)
    assert "building" not in fleet.said("waiter")
    fleet.go_on("builder")
    assert fleet.result("builder")["built"]
    assert not fleet.result("waiter")["built"]


def test_a_builder_that_wakes_up_after_it_was_replaced_does_no_harm(fleet_on_s3: Fleet) -> None:
    """Suspended past its lease, as a machine may be: two build, and both engines are whole."""
    fleet = fleet_on_s3
    builder = fleet.start("builder", hold=True)
    fleet.wait_until_said("builder", "building")
    assert builder.pid
    os.kill(builder.pid, signal.SIGSTOP)
    fleet.start("waiter")
    results = [fleet.result("waiter")]
    fleet.go_on("builder")
    os.kill(builder.pid, signal.SIGCONT)
    results.append(fleet.result("builder"))
    assert [result["built"] for result in results] == [True, True]
    store = fleet.store()
    for result in results:
        assert store.check(result["key"]).manifest.artifact_sha256 == result["sha256"]
    (request,) = store.versions.all()
    assert store.find(request) is not None
    assert store.files.list_files("locks") == []


def test_a_build_that_is_interrupted_leaves_no_lease(
    start_score: Callable[..., Any], features_job: Path, s3_folder: str
) -> None:
    command = start_score(
        *("engine", "build", features_job, "--date", DATE, "--json"),
        *("--set", f"engine.store={s3_folder}"),
        *("--set", "engine.gate.rows=8000"),  # or it is over before it is interrupted
    )
    files = open_storage(s3_folder)
    deadline = time.monotonic() + PATIENCE_S
    while not files.list_files("locks"):
        assert command.is_running(), command.end().err
        assert time.monotonic() < deadline
        time.sleep(0.02)
    command.signal(signal.SIGTERM)
    ended = command.end()
    assert ended.code == 75, ended.err
    assert "SIGTERM received; nothing was stored." in ended.json["error"]
    assert files.list_files("") == []


def test_one_machine_builds_for_a_fleet_that_then_scores(
    start_score: Callable[..., Any],
    features_job: Path,
    s3_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commands as they are: two builds at once, and the nights of two other machines."""
    store = ("--set", f"engine.store={s3_folder}/engines", "--json")

    def on(name: str, *arguments: object) -> Any:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return start_score(*arguments, *store)

    commands = [on(n, "engine", "build", features_job, "--date", DATE) for n in ("one", "two")]
    ended = [command.end() for command in commands]
    assert [e.code for e in ended] == [0, 0], [e.err for e in ended]
    assert sorted(e.json["built"] for e in ended) == [False, True]
    (key,) = {e.json["key"] for e in ended}
    (loser,) = [e for e in ended if not e.json["built"]]
    assert "measuring" not in loser.err
    verified = on("three", "engine", "verify", features_job).end()
    assert verified.code == 0, verified.err
    assert verified.json["engines"][0]["opened"]
    night = on("four", "run", features_job, "--date", DATE).end()
    assert night.code == 0, night.err
    assert night.json["engine"]["key"] == key
    assert "measuring" not in night.err
