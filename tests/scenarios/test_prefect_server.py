"""The deployment on a real Prefect server, run by a real worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DATE, free_port

pytestmark = pytest.mark.scenario
BIN = Path(sys.executable).parent


class Server:
    """A Prefect server and a process worker, with settings of their own."""

    def __init__(self, home: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        self.home = home
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        self.processes = [self.start("server", "start", "--host", "127.0.0.1", "--port", str(port))]
        self.wait_for_health()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{arguments[0]}.log").open("wb") as log:
            return subprocess.Popen(
                [str(BIN / "prefect"), *arguments],
                env=self.environment,
                cwd=self.home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for_health(self) -> None:
        deadline = time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.home / "server.log").read_text()[-2000:]
                time.sleep(0.3)

    def run(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / arguments[0]), *arguments[1:]],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def stop(self) -> None:
        for process in reversed(self.processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    try:
        yield running
    finally:
        running.stop()


def test_a_deployed_night_is_scored_by_a_worker_and_published_once(
    server: Server, features_job: Path
) -> None:
    deployed = server.run(
        *("score", "deploy", str(features_job), "--timezone", "Europe/Zurich", "--json")
    )
    assert deployed.returncode == 0, deployed.stderr
    again = server.run("score", "deploy", str(features_job), "--timezone", "Europe/Zurich")
    assert again.returncode == 0, again.stderr

    (deployment,) = server.post("/deployments/filter", {})  # updated, not made twice
    assert deployment["name"] == "nightly"
    assert deployment["entrypoint"] == "flows.nightly.score"
    assert deployment["parameters"]["job"] == str(features_job)
    (schedule,) = deployment["schedules"]
    assert schedule["schedule"]["cron"] == "30 0 * * *"
    assert schedule["schedule"]["timezone"] == "Europe/Zurich"
    assert set(deployment["parameter_openapi_schema"]["properties"]) >= {"job", "date"}

    worker = server.start("worker", "start", "--pool", "nightscore", "--type", "process")
    server.processes.append(worker)
    command = ("prefect", "deployment", "run", "score/nightly", "--param", f"date={DATE}")
    first = server.run(*command, "--watch")
    assert first.returncode == 0, first.stdout + (server.home / "worker.log").read_text()[-4000:]

    verified = server.run("score", "verify", str(features_job), "--date", DATE, "--json")
    assert verified.returncode == 0, verified.stderr
    rows = json.loads(verified.stdout)["rows"]
    (artifact,) = server.post("/artifacts/latest/filter", {})
    assert artifact["key"] == f"nightscore-users-{DATE}"
    assert f"{rows:,}" in artifact["data"]

    second = server.run(*command, "--watch")
    assert second.returncode == 0, second.stdout
    (flow_runs,) = [server.post("/flow_runs/filter", {"flow_runs": {"name": {"like_": DATE}}})]
    assert [run["state_type"] for run in flow_runs] == ["COMPLETED", "COMPLETED"]
    assert {run["name"] for run in flow_runs} == {f"job-{DATE}"}
