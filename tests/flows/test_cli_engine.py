"""The `score engine` commands: what they say, what they do, and what they refuse."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines.build import request_key
from engines.devices import Cpu, this_cpu
from engines.errors import CudaError, EngineError, OutOfDeviceMemoryError
from engines.manifest import EngineManifest, StoredEngine
from engines.model import fingerprint_model
from engines.store import EngineStore
from flows.cli import run_command
from flows.devices import num_cores
from pipeline.engine import request_for
from pipeline.job_file import load_job
from tests.conftest import DATE, Ended, write_job
from tests.engines.small_stores import a_manifest, linear_graph, local_store, probe_of

pytestmark = pytest.mark.timeout(300)
NUM_FEATURES = 8


@dataclass(frozen=True)
class Place:
    """A job, and the store of its engines."""

    job: Path
    store: EngineStore
    folder: Path

    def manifest(self, key: str) -> EngineManifest:
        """Of an engine that answers what the job asks for on this device."""
        job = load_job(str(self.job))
        request = request_for(job, NUM_FEATURES, this_cpu(num_cores()))
        fingerprint = fingerprint_model(request.model)
        return a_manifest(
            key,
            request_key=request_key(request, fingerprint),
            model_fingerprint=fingerprint,
            device=request.device,
            probe=probe_of(linear_graph(), self.folder),
        )

    def publish(self, key: str, **changes: Any) -> StoredEngine:
        manifest = dataclasses.replace(self.manifest(key), **changes)
        return self.store.publish(manifest, linear_graph(), {"notes.txt": key.encode()})


@pytest.fixture(params=["features"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    (tmp_path / "model.onnx").write_bytes(linear_graph())
    kinds: dict[str, Any] = {
        "features": {"features": {"columns": ["f*"]}},
        "images": {"images": {"column": "image"}},
    }
    job = {
        "name": "users",
        "input": {"uri": str(tmp_path / "in"), "passthrough": ["user_id"], **kinds[request.param]},
        "model": {"source": str(tmp_path / "model.onnx"), "head": "scores"},
        "engine": {"store": str(tmp_path / "engines")},
        "output": {"uri": str(tmp_path / "out")},
        "lanes": {"device": "cpu"},
        "cost": {"instance": "c6i.large"},
    }
    store = local_store(tmp_path / "engines")
    return Place(job=write_job(tmp_path / "job.yaml", job), store=store, folder=tmp_path)


@pytest.fixture
def engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs `score engine ...` in this process."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["score", "engine", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_command()
        out, err = capsys.readouterr()
        return Ended(int(stop.value.code or 0), out, err)

    return call


def check_refused(ended: Ended, code: int, said: str) -> None:
    assert ended.code == code, ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def check_narrow(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 80, text


def test_an_empty_store_says_so(engine: Callable[..., Ended], place: Place) -> None:
    assert "no engine is built yet" in engine("list", place.job).out
    assert engine("list", place.job, "--json").json == {"engines": []}
    assert "no engine to verify" in " ".join(engine("verify", place.job).out.split())
    ended = engine("gc", place.job)
    assert ended.out == "removed 0 engines, 0 left-over files, 0 bytes\n"
    check_refused(engine("show", place.job, "ab"), 2, "engine ab: 0 in")


def test_a_list_marks_what_is_current(engine: Callable[..., Ended], place: Place) -> None:
    source = "engines.some_models:efficientnet_lite0_with_a_long_name"
    first, second = place.publish("first", model_source=source), place.publish("second")
    ended = engine("list", place.job)
    check_narrow(ended.out)
    (old,) = [line for line in ended.out.splitlines() if first.key[:12] in line]
    (new,) = [line for line in ended.out.splitlines() if second.key[:12] in line]
    assert "current" not in old
    assert new.rstrip().endswith("2 current")
    listed = engine("list", place.job, "--json").json["engines"]
    facts = {entry["key"]: entry for entry in listed}
    assert (facts[first.key]["version"], facts[first.key]["current"]) == (1, False)
    assert (facts[second.key]["version"], facts[second.key]["current"]) == (2, True)


def test_one_engine_is_shown_with_its_ladder(engine: Callable[..., Ended], place: Place) -> None:
    key = place.publish("first").key
    ended = engine("show", place.job, key[:7])
    check_narrow(ended.out)
    assert key in "".join(line[18:].strip() for line in ended.out.splitlines())
    for said in ("1, current", "onnxruntime fp32", "1,000", "NotImplementedError: no"):
        assert said in ended.out
    assert engine("show", place.job, key, "--json").json["version"] == 1


def test_an_intact_engine_is_opened(engine: Callable[..., Ended], place: Place) -> None:
    key = place.publish("first").key
    ended = engine("verify", place.job)
    assert (ended.code, ended.out.split()[:2]) == (0, [key[:12], "intact,"])
    assert "opened, the probe batch agrees" in ended.out
    ended = engine("verify", place.job, key[:5], "--json")
    assert ended.code == 0
    assert ended.json["damaged"] == []
    (facts,) = ended.json["engines"]
    assert (facts["files"], facts["opened"]) == (3, True)


@pytest.mark.parametrize("part", ["*-graph.onnx", "*-notes.txt", "manifest.json"])
def test_a_damaged_engine_is_named_and_exit_code_1_says_so(
    engine: Callable[..., Ended], place: Place, part: str
) -> None:
    good, bad = place.publish("first"), place.publish("second")
    (path,) = Path(bad.folder).glob(part)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ended = engine("verify", place.job, "--json")
    assert ended.code == 1
    assert ended.json["damaged"] == [bad.key]
    ended = engine("verify", place.job)
    assert ended.code == 1
    assert "damaged:" in ended.out
    assert engine("verify", place.job, good.key).code == 0


def test_an_engine_that_answers_otherwise_than_when_it_was_built_is_damaged(
    engine: Callable[..., Ended], place: Place
) -> None:
    place.publish("first", probe=(9.0, 9.0, 9.0, 9.0))
    ended = engine("verify", place.job)
    assert ended.code == 1
    assert "its probe batch gives" in " ".join(ended.out.split())


def test_a_file_that_its_runtime_refuses_is_damaged(
    engine: Callable[..., Ended], place: Place
) -> None:
    place.store.publish(place.manifest("first"), b"no graph", {})
    ended = engine("verify", place.job)
    assert ended.code == 1
    assert "expected it to open" in " ".join(ended.out.split())


@pytest.mark.parametrize("error", [OutOfDeviceMemoryError, CudaError, EngineError])
def test_an_engine_that_the_device_has_no_room_for_is_not_damaged(
    engine: Callable[..., Ended],
    place: Place,
    error: type[EngineError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise error("slots: 3 GiB; expected room on the device.")

    monkeypatch.setattr("flows.engines.try_engine", refuse)  # no such device here
    place.publish("first")
    ended = engine("verify", place.job)
    assert ended.code == 0
    said = "intact, 3 files; not opened: slots: 3 GiB; expected room on the device."
    assert said in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": Cpu(name="x", architecture="y", instructions=(), num_threads=1)}, "device"),
        ({"runtime_version": "0.1"}, "built with onnxruntime 0.1, which is not installed here"),
    ],
    ids=["device", "runtime"],
)
def test_what_this_machine_cannot_open_is_checked_by_its_hashes(
    engine: Callable[..., Ended], place: Place, changes: dict[str, Any], said: str
) -> None:
    place.publish("first", **changes)
    ended = engine("verify", place.job)
    assert ended.code == 0
    assert "intact, 3 files; not opened" in ended.out
    assert said in " ".join(ended.out.split())


@pytest.mark.parametrize("place", ["features", "images"], indirect=True)
def test_rolling_back_makes_the_earlier_engine_current(
    engine: Callable[..., Ended], place: Place
) -> None:
    first, second = place.publish("first"), place.publish("second")
    ended = engine("rollback", place.job)
    assert ended.code == 0, ended.err
    check_narrow(ended.out)
    assert f"engine {first.key[:12]} is current again (version 3)" in ended.out
    assert place.store.find(first.manifest.request_key) == first
    ended = engine("rollback", place.job, "--to", second.key[:8], "--json")
    assert (ended.json["engine"], ended.json["number"]) == (second.key, 4)
    assert ended.json["replaced"] == first.key


def test_without_an_earlier_engine_rolling_back_is_refused(
    engine: Callable[..., Ended], place: Place
) -> None:
    said = "no engine for what this job asks for on this device; expected at least two."
    check_refused(engine("rollback", place.job), 1, said)
    key = place.publish("first").key
    said = "the only one that has answered this request; expected an earlier one."
    check_refused(engine("rollback", place.job), 1, said)
    check_refused(engine("rollback", place.job, "--to", key), 1, "current already")


@pytest.mark.parametrize("loss", ["removed", "damaged"])
def test_without_its_versions_an_engine_does_not_come_back(
    engine: Callable[..., Ended], place: Place, loss: str
) -> None:
    key = place.publish("first").key
    for entry in (place.folder / "engines" / "requests").rglob("*.json"):
        if loss == "removed":
            entry.unlink()
        else:
            entry.write_bytes(b"no entry")
    said = "error: no engine has answered this request; expected at least two versions."
    ended = engine("rollback", place.job, "--to", key)
    assert (ended.code, ended.err.splitlines()[-1]) == (1, said)
    ended = engine("rollback", place.job)
    assert ended.code == 1
    assert "no engine for what this job asks for on this device" in ended.err


def test_an_engine_of_another_model_comes_back_with_its_model_file(
    engine: Callable[..., Ended], place: Place
) -> None:
    old = place.publish("first")
    model = place.folder / "model.onnx"
    model.write_bytes(linear_graph(seed=1))
    new = place.publish("second")
    said = f"expected the job's model as it is now, {new.manifest.model_fingerprint[:12]}. Put the "
    check_refused(engine("rollback", place.job, "--to", old.key), 1, said)
    check_refused(engine("rollback", place.job), 1, "comes back with its model file")
    model.write_bytes(linear_graph())
    assert place.store.find(place.manifest("any").request_key) == old


def test_an_engine_of_another_gate_is_refused(engine: Callable[..., Ended], place: Place) -> None:
    key = place.publish("first").key
    place.publish("second")
    gate = ("--set", "engine.gate.min_agreement=0.9999")
    check_refused(engine("rollback", place.job, *gate), 1, "no engine for what this job asks")
    said = f"engine {key[:12]}: answers another request; expected the job's gate"
    check_refused(engine("rollback", place.job, "--to", key, *gate), 1, said)


def test_gc_says_what_it_removes(engine: Callable[..., Ended], place: Place) -> None:
    engines = [place.publish(name) for name in "abc"]
    left_over = place.folder / "engines" / "engines" / engines[2].key / f".x.{'0' * 32}.tmp"
    left_over.write_bytes(b"12345")
    for path in (place.folder / "engines").rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    num_bytes = 5 + sum(path.stat().st_size for path in Path(engines[0].folder).iterdir())
    planned = engine("gc", place.job, "--keep", 2, "--dry-run")
    assert f"would remove engine {engines[0].key[:12]}" in planned.out
    assert f"would remove 1 engines, 1 left-over files, {num_bytes:,} bytes" in planned.out
    assert left_over.exists()
    ended = engine("gc", place.job, "--keep", 2, "--json")
    assert ended.json["engines"] == [engines[0].key]
    assert ended.json["num_bytes"] == num_bytes
    assert not left_over.exists()
    assert not Path(engines[0].folder).exists()
    check_refused(engine("gc", place.job, "--keep", 0), 2, "--keep")


@pytest.mark.parametrize("command", ["list", "verify", "gc", "rollback"])
def test_a_store_of_an_unknown_kind_is_wrong_use(
    engine: Callable[..., Ended], place: Place, command: str
) -> None:
    ended = engine(command, place.job, "--set", "engine.store=ftp://x/y")
    check_refused(ended, 2, "ftp://x/y: unknown kind of storage")


def test_help_names_every_command(engine: Callable[..., Ended]) -> None:
    out = engine("--help").out
    for command in ("build", "list", "show", "verify", "rollback", "gc"):
        assert command in out


def test_an_engine_is_built_found_and_built_again(
    engine: Callable[..., Ended], features_job: Path, tmp_path: Path
) -> None:
    call = ("build", features_job, "--date", DATE, "--set", f"engine.store={tmp_path / 'engines'}")
    first = engine(*call, "--json")
    assert first.code == 0, first.err
    assert (first.json["built"], first.json["version"], first.json["current"]) == (True, 1, True)
    assert "measuring" in first.err
    found = engine(*call, "--json")
    assert (found.json["built"], found.json["key"]) == (False, first.json["key"])
    assert found.err == ""
    ended = engine(*call, "--force")
    assert ended.code == 0, ended.err
    check_narrow(ended.out)
    assert ended.out.startswith("built in ")
    assert "2, current" in ended.out
    check_refused(engine(*call[:2], "--date", "soon"), 2, "date: 'soon'")
