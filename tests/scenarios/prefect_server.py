"""A Prefect server and a process worker, with settings of their own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ports import free_port

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 150.0
"""A few seconds, and a minute where other tests have the cores."""


def ask(
    url: str,
    body: dict[str, Any] | list[dict[str, Any]] | None = None,
    patience_s: float = 60.0,
    method: str | None = None,
) -> Any:
    """What Prefect's API answers; asked again as its clients do: SQLite may be locked (503)."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                if error.code < 500 or time.monotonic() > deadline:
                    raise
        except (OSError, http.client.HTTPException):  # no answer in time, or half of one
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


class Server:
    """A server on a free port; workers and commands that talk to it.

    Args:
        home: Its database and logs.
        settings: Variables of Prefect besides.
    """

    def __init__(self, home: Path, **settings: str) -> None:
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
            **settings,
        }
        self.processes = [self.start("server", "start", "--host", "127.0.0.1", "--port", str(port))]
        try:
            self.wait_for_health()
        except BaseException:
            self.stop()
            raise

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
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.home / "server.log").read_text()[-2000:]
                time.sleep(0.3)

    def run(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / arguments[0]), *arguments[1:]],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start_worker(self) -> subprocess.Popen[bytes]:
        """A worker of the pool that `score deploy` makes; it looks for runs every second."""
        worker = self.start("worker", "start", "--pool", "nightscore", "--type", "process")
        self.processes.append(worker)
        return worker

    def begin_run(self, deployment: str, at: str | None = None, **parameters: str) -> str:
        """Have a deployment run, now or at some time; the id of the flow run."""
        identity = ask(f"{self.url}/deployments/name/{deployment}")["id"]
        scheduled = {"type": "SCHEDULED", "state_details": {"scheduled_time": at}}
        body = {"parameters": parameters, "state": scheduled}
        made: str = self.post(f"/deployments/{identity}/create_flow_run", body)["id"]
        return made

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """The flow runs of a deployment that were made on purpose, oldest first."""
        where = {
            "deployments": {"name": {"any_": [deployment]}},
            "flow_runs": {"tags": {"all_": ["nightscore"]}},
        }
        found = self.post("/flow_runs/filter", {**where, "sort": "START_TIME_ASC"})
        return [run for run in found if not run["auto_scheduled"]]

    def wait_for(self, what: str, condition: Callable[[], Any], timeout_s: float = 200.0) -> Any:
        """What the condition returns once it is true."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            logs = (file.read_text()[-3000:] for file in self.home.glob("*.log"))
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s; " + "\n".join(
                logs
            )
            time.sleep(0.3)
        return found

    def state_of(self, run: str) -> str:
        """`PENDING`, `RUNNING`, `COMPLETED`, ..."""
        state: str = ask(f"{self.url}/flow_runs/{run}")["state_type"]
        return state

    def post(self, path: str, body: dict[str, Any] | list[dict[str, Any]]) -> Any:
        return ask(f"{self.url}{path}", body)

    def stop(self) -> None:
        for process in reversed(self.processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
