"""docs/first-job.md, as a new user types it: from a model and data to a night by a worker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DATE
from tests.ports import free_port
from tests.scenarios.prefect_server import ask

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(700, func_only=True)]
BIN = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "first-job.md"
PATIENCE_S = 600.0
"""A minute where nothing else runs."""
TESTED = re.compile(r"^<!-- tested -->\n```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def flow_runs(api: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(f"{api}/flow_runs/filter", {})
    return [run for run in found if run["parameters"].get("date") == DATE]


def wait_for_the_night(api: str, said: Path, deadline: float) -> None:
    while [run["state_type"] for run in flow_runs(api)] != ["COMPLETED"]:
        assert time.monotonic() < deadline, (flow_runs(api), said.read_text()[-3000:])
        time.sleep(0.5)


def test_the_commands_of_the_page_end_with_a_night_by_a_worker(
    features_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "my-data"
    shutil.copytree(features_folder / "users", data / "users")
    shutil.copy(features_folder / "ranking.onnx", tmp_path / "my-model.onnx")
    (data / "engines").symlink_to(features_folder / "engines")
    (features_folder / "engines").mkdir(exist_ok=True)

    port, said = str(free_port()), tmp_path / "said"
    script = "".join(TESTED.findall(PAGE.read_text())).replace("4200", port)
    script = script.replace("--wait-s 60", "--wait-s 200")  # busy machines have busy neighbours
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    with said.open("wb") as log:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", f"{script}wait\n"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        output = data / "scores/users"
        deadline = time.monotonic() + PATIENCE_S
        while "ok  Prefect server" not in said.read_text():  # by the doctor, which is the last
            assert shell.poll() is None, said.read_text()[-3000:]
            assert time.monotonic() < deadline, said.read_text()[-3000:]
            time.sleep(0.2)
        wait_for_the_night(f"http://127.0.0.1:{port}/api", said, deadline)
        assert (output / f"dt={DATE}/_SUCCESS").exists()
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        stopped = [str(BIN / "prefect"), "server", "stop"]
        subprocess.run(stopped, env=environment, capture_output=True, timeout=60, check=False)
