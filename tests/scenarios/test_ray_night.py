"""Nights over a real Ray cluster: nodes that score together, die, join and are left in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_job
from tests.scenarios.features_nights import (
    DATE,
    NUM_BAD,
    NUM_ROWS,
    NUM_SMALL_SHARDS,
    SMALL_SHARDS,
    commits,
    night,
    scores_in,
    wait_for_commits,
    wait_until,
)
from tests.scenarios.prefect_server import Server
from tests.scenarios.ray_nodes import RayNodes, on_ray, standing_still

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.scenario, pytest.mark.timeout(700)]

ONE_CPU = ("--set", "lanes.device=cpu", "--set", "lanes.threads=1")
AT_THE_END = 2 * NUM_ROWS // NUM_SMALL_SHARDS
"""Rows of shards that two lanes may begin, when there is nothing else left to hand out."""
PATIENT = ("--set", "lanes.hang_s=600")
"""For lanes that are stopped for a while."""
Begin = Callable[[str], tuple[Any, Path]]
"""Gives the command that runs, and where its output goes."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A cluster of a head and two nodes of one CPU."""
    running = RayNodes()
    try:
        running.add()
        running.add()
        with pytest.MonkeyPatch.context() as environment:
            for name, value in running.environment.items():
                environment.setenv(name, value)
            yield running
    finally:
        running.close()


@pytest.fixture
def alone(score: Callable[..., Any], features_job: Path, tmp_path: Path) -> dict[int, float]:
    """Scores of the night on one lane of this machine; it builds the engine."""
    ended = score(*night(features_job, tmp_path / "alone", *ONE_CPU))
    assert ended.code == 0, ended.err
    return scores_in(tmp_path / "alone")


@pytest.fixture
def begin(
    nodes: RayNodes, start_score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> Begin:
    """Starts a night of small shards over the cluster, or goes on with it, by the output's name."""

    def start(name: str) -> tuple[Any, Path]:
        output = tmp_path / name
        command = night(features_job, output, *SMALL_SHARDS, *ONE_CPU, *PATIENT, *on_ray(nodes))
        return start_score(*command), output

    return start


def wait_for_both(nodes: RayNodes, running: Any) -> None:
    """Until both nodes have a lane; the first one stands still meanwhile, or it would do all."""
    wait_until(nodes.at_work, running)
    with standing_still(nodes.at_work()[0]):
        wait_until(lambda: len(nodes.at_work()) > 1, running)


def check(ended: Any, output: Path, scores: dict[int, float]) -> dict[str, Any]:
    """Every row was scored once, as on one lane; the report."""
    assert ended.code == 0, ended.err
    report: dict[str, Any] = ended.json
    assert (report["status"], report["rows"]) == ("published", NUM_ROWS)
    assert report["quarantined"] == NUM_BAD
    assert scores_in(output) == scores
    return report


def test_a_cluster_scores_what_one_lane_scores_whoever_comes_and_goes(
    nodes: RayNodes, alone: dict[int, float], begin: Begin
) -> None:
    # Both nodes.
    running, output = begin("both")
    wait_for_both(nodes, running)
    report = check(running.end(), output, alone)
    assert report["num_lanes"] == 2
    assert report["rows_replayed"] <= AT_THE_END
    assert len({use["name"] for use in report["devices"]}) == 1
    assert len(report["devices"]) == 2, "what each node's processor did"

    # One node loses power.
    _, first, second = nodes.started
    running, output = begin("one-dies")
    wait_for_both(nodes, running)
    wait_for_commits(running, output, 20)
    nodes.end(second)
    num_committed = len(commits(output))
    assert num_committed < NUM_SMALL_SHARDS, "the night ended before the node"
    ended = running.end()
    report = check(ended, output, alone)
    assert "its lane is lost, and what it held goes to others" in ended.err
    assert report["rows_replayed"] <= 20 * NUM_ROWS // NUM_SMALL_SHARDS, "as many as it held"

    # Another one joins, while the only one that there is stands still.
    running, output = begin("one-joins")
    wait_for_commits(running, output, 20)
    with standing_still(nodes.lanes_on(first)):
        num_committed = len(commits(output))
        nodes.add()
        wait_until(lambda: len(commits(output)) > num_committed + 50, running)
    report = check(running.end(), output, alone)
    assert report["num_lanes"] == 2


def test_a_night_on_a_cluster_that_is_told_to_end_drains_and_goes_on(
    alone: dict[int, float], begin: Begin
) -> None:
    running, output = begin("out")
    wait_for_commits(running, output, 20)
    running.signal(signal.SIGTERM)
    ended = running.end(60)
    assert ended.code == 75, ended.err
    assert "SIGTERM received; committed shards are kept" in ended.json["error"]
    num_committed = len(commits(output))
    assert 20 <= num_committed < NUM_SMALL_SHARDS
    report = check(begin("out")[0].end(), output, alone)
    assert report["shards_reused"] == num_committed
    assert report["interruptions"] == 1
    assert report["rows_replayed"] <= AT_THE_END


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("prefect"))
    try:
        yield running
    finally:
        running.stop()


FLOW = "import sys; from flows.nightly import score; score(sys.argv[1], date=sys.argv[2])"


def test_the_flow_hands_its_lanes_to_ray_as_task_runs(
    nodes: RayNodes, server: Server, alone: dict[int, float], features_job: Path, tmp_path: Path
) -> None:
    job = json.loads(features_job.read_text())
    lanes = {"runner": "ray", "ray_address": nodes.address, "device": "cpu", "threads": 1}
    write_job(features_job, {**job, "lanes": {**lanes, "hang_s": 600}})
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(features_job), DATE],
        env={**server.environment, **nodes.environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    # The first lane waits for the other one, or does all by itself.
    stopped: list[int] = []
    while flow.poll() is None and not commits(tmp_path / "scores"):
        if not stopped and (at_work := nodes.at_work()):
            stopped = at_work[0]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        time.sleep(0.01)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    _, said = flow.communicate(timeout=300)
    assert flow.returncode == 0, said
    assert scores_in(tmp_path / "scores") == alone
    # A third lane waited for room, which there was when the night was over: it is no task run.
    expected = {f"users {DATE}: lane1": "COMPLETED", f"users {DATE}: lane2": "COMPLETED"}

    def states() -> dict[str, str]:
        return {run["name"]: run["state_type"] for run in server.post("/task_runs/filter", {})}

    # The server takes states in when it comes to it.
    server.wait_for("both lanes", lambda: expected.items() <= states().items(), 20)
    assert states() == expected


def test_a_node_that_is_told_to_leave_commits_what_it_is_at_and_the_night_goes_on_elsewhere(
    nodes: RayNodes, alone: dict[int, float], begin: Begin
) -> None:

    def leave(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.on_ray.leave", "60", *options],
            env={**os.environ, "RAY_ADDRESS": nodes.address},
            capture_output=True,
            text=True,
            timeout=120,
        )

    which = leave()
    assert which.returncode == 1
    assert "not given, and 2 nodes are at" in which.stderr, "here nodes share a machine"
    stays, leaves = re.findall(r"[0-9a-f]{56}", which.stderr)
    running, output = begin("out")
    wait_for_both(nodes, running)
    wait_for_commits(running, output, 20)
    with standing_still(nodes.lanes_on(nodes.called(stays))):  # or the night ends first
        left = leave("--node", leaves)
        num_committed = len(commits(output))
    assert left.returncode == 0, left.stderr
    assert num_committed < NUM_SMALL_SHARDS, "the night ended before the node was free"
    ended = running.end()
    report = check(ended, output, alone)
    assert "about to be taken away; its lane finishes what is in work" in ended.err
    assert report["rows_replayed"] <= AT_THE_END
