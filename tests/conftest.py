"""What several test folders share: an object store, engine stores, and the command as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.object_store import CREDENTIALS, object_store
from tests.processes import GROUP, alive_with, command_of

DATE = "2026-11-20"
SCORE = str(Path(sys.executable).with_name("score"))
COMMAND_TIMEOUT_S = 300.0
"""A hang; others may share the machine."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job has it, and every command that the tests stop would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real object store (SeaweedFS) on free ports of this machine; its address."""
    with object_store(tmp_path_factory.mktemp("weed")) as address:
        yield address


@pytest.fixture
def s3_folder(weed_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix of the object store, which this process and its children may use."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", weed_server)
    return f"s3://night/{uuid.uuid4().hex}"


@pytest.fixture
def s3_proxy(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A proxy that makes faults, which this process and its children take for the object store."""
    from tests.s3_fault_proxy import fault_proxy

    assert s3_folder
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        (line,) = self.out.splitlines()
        value: dict[str, Any] = json.loads(line)
        return value


class Running:
    """A `score` command in a process group of its own."""

    def __init__(self, arguments: tuple[str, ...], prefix: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, SCORE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        os.killpg(self.pid, number)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, timeout_s: float = COMMAND_TIMEOUT_S) -> Ended:
        """Wait for the end; a hang fails the test."""
        try:
            out, err = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_group()
            out, err = self._process.communicate()
            pytest.fail(f"hung for {timeout_s:.0f} s; stdout: {out[-1000:]}\nstderr: {err[-3000:]}")
        return Ended(self._process.returncode, out, err)

    def clean_up(self) -> None:
        """Kill what is alive, and read what nobody has read."""
        if self.members():
            self.kill_group()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._process.wait()

    def lingering(self, patience_s: float = 3.0) -> list[str]:
        """Command lines of its processes that do not end soon after it."""
        deadline = time.monotonic() + patience_s
        while (alive := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [command_of(pid) for pid in alive]

    def members(self) -> list[int]:
        """Processes of its group that are alive."""
        return alive_with(GROUP, self.pid)


@pytest.fixture
def start_score() -> Iterator[Callable[..., Running]]:
    """Starts the installed `score` command; what is still alive at the end is killed."""
    started: list[Running] = []

    def start(*arguments: object, prefix: tuple[str, ...] = ()) -> Running:
        started.append(Running(tuple(map(str, arguments)), prefix))
        return started[-1]

    yield start
    for command in started:
        command.clean_up()


@pytest.fixture
def score(start_score: Callable[..., Running]) -> Callable[..., Ended]:
    """Runs the installed `score` command to its end."""
    return lambda *arguments: start_score(*arguments).end()


@pytest.fixture(scope="session")
def features_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40,000 users of one date in small row groups, the demo's model, and an empty engine store."""
    import pyarrow.parquet as pq

    from engines.demo_models import write_ranking_onnx
    from flows.demo_data import write_users

    folder = tmp_path_factory.mktemp("features")
    write_users(folder / "users", DATE, num_rows=40_000)
    for file in folder.glob("users/*/*.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=100)
    write_ranking_onnx(folder / "ranking.onnx")
    return folder


@pytest.fixture
def features_job(features_folder: Path, tmp_path: Path) -> Path:
    """A job file for the features demo, with an output of its own and a shared engine store."""
    return write_job(
        tmp_path / "job.yaml",
        {
            "name": "users",
            "input": {
                "uri": str(features_folder / "users"),
                "passthrough": ["user_id"],
                "features": {"columns": ["f*"]},
            },
            "model": {"source": str(features_folder / "ranking.onnx"), "head": "scores"},
            "engine": {
                "store": str(features_folder / "engines"),
                "calibration": {"rows": 64},
                "gate": {"rows": 128, "min_agreement": 0.9},
            },
            "output": {"uri": str(tmp_path / "scores")},
            "lanes": {"shard_rows": 5_000},
            "cost": {"instance": "c6i.large"},
        },
    )


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 pictures of one date in two files, eight of them damaged, and an empty engine store."""
    from flows.demo_data import write_pictures

    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "pictures", DATE, num_rows=512, num_files=2, rows_per_group=64)
    return folder


@pytest.fixture
def pictures_job(pictures_folder: Path, tmp_path: Path) -> Path:
    """A job file for the pictures; all tests of a session share one engine."""
    return write_job(
        tmp_path / "pictures.yaml",
        {
            "name": "pictures",
            "input": {
                "uri": str(pictures_folder / "pictures"),
                "passthrough": ["picture_id", "photo"],
                "images": {"column": "image"},
            },
            "model": {
                "source": "engines.demo_models:efficientnet_lite0",
                "size": [224, 224],
                "mean": [127, 127, 127],
                "std": [128, 128, 128],
                "class_names": "engines.demo_models:imagenet_classes",
            },
            "engine": {
                "store": str(pictures_folder / "engines"),
                "calibration": {"rows": 64},
                # 128 rows say little about accuracy, and these tests are not about it.
                "gate": {"rows": 128, "min_agreement": 0.5},
            },
            "output": {"uri": str(tmp_path / "scores")},
            "limits": {"max_quarantined": 0.05},
            "cost": {"instance": "c6i.large"},
        },
    )


def write_job(path: Path, job: dict[str, Any]) -> Path:
    """A job file: JSON is YAML too."""
    path.write_text(json.dumps(job, indent=1))
    return path
