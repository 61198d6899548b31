"""A night over nodes of unlike processors: each has an engine of its own, in one run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engines.devices import this_cpu
from tests.scenarios.features_nights import (
    DATE,
    NUM_BAD,
    NUM_ROWS,
    NUM_SMALL_SHARDS,
    PUBLISHED,
    SMALL_SHARDS,
    commits,
    night,
    scores_in,
    wait_for_commits,
    wait_until,
)
from tests.scenarios.ray_nodes import RayNodes, on_ray

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.scenario, pytest.mark.timeout(700)]

OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Makes an older processor of this one: OpenVINO compiles for it, and uses no more of it."""
ONE_CPU = ("--set", "lanes.device=cpu", "--set", "lanes.threads=1", "--set", "lanes.hang_s=600")
NEARLY = 0.05
"""Scores of two engines that passed one gate differ by less; they are about 1."""


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    """A cluster without a node that scores yet."""
    running = RayNodes()
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in running.environment.items():
                environment.setenv(name, value)
            yield running
    finally:
        running.close()


def engines_of(output: Path) -> list[str]:
    """Of each commit record its engine."""
    return [json.loads(path.read_text())["engine"] for path in commits(output)]


def stored(engines: Path) -> dict[str, str]:
    """The engines of a store: key -> name of the device."""
    manifests = [json.loads(path.read_text()) for path in engines.glob("engines/*/manifest.json")]
    return {manifest["key"]: manifest["device"]["name"] for manifest in manifests}


def test_unlike_nodes_score_one_night_and_a_resume_may_begin_on_either(
    nodes: RayNodes,
    score: Callable[..., Any],
    start_score: Callable[..., Any],
    features_job: Path,
    tmp_path: Path,
) -> None:
    store = ("--set", f"engine.store={tmp_path / 'engines'}")
    ended = score(*night(features_job, tmp_path / "alone", *ONE_CPU, *store))
    assert ended.code == 0, ended.err
    alone = scores_in(tmp_path / "alone")
    (newer,) = stored(tmp_path / "engines")

    # The newer node has its engine, and scores; the older one comes, and builds its own.
    output = tmp_path / "out"
    command = night(features_job, output, *SMALL_SHARDS, *ONE_CPU, *store, *on_ray(nodes))
    new = nodes.add()
    running = start_score(*command)
    wait_for_commits(running, output, 20)
    stopped = nodes.lanes_on(new)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert set(engines_of(output)) == {newer}
    old = nodes.add(**OLDER)
    wait_until(lambda: len(set(engines_of(output))) == 2, running)
    names = stored(tmp_path / "engines")
    (older,) = set(names) - {newer}
    assert names[older] == f"{this_cpu(1).name}, at most AVX2"

    # The driver dies, and the newer node with it: the older one goes on with the same run.
    running.kill_group()
    running.end()
    nodes.end(new)
    while nodes.lanes_on(old):  # it may commit until it sees that the driver is gone
        time.sleep(0.05)
    before = {path.name: path.read_text() for path in commits(output)}
    running = start_score(*command)
    wait_until(lambda: len(commits(output)) > len(before), running)
    added = [path for path in commits(output) if path.name not in before]
    assert {json.loads(path.read_text())["engine"] for path in added} == {older}
    ended = running.end()
    assert ended.code == 0, ended.err

    report = ended.json
    assert (report["rows"], report["quarantined"]) == (NUM_ROWS, NUM_BAD)
    assert report["shards_reused"] == len(before)
    assert report["run_id"] == commits(output)[0].parent.parent.name
    assert len(list(output.glob("users/_runs/*"))) == 1
    rows = dict.fromkeys(names, 0)
    scores = scores_in(output)
    assert scores.keys() == alone.keys()
    for path in (output / PUBLISHED).glob("*.parquet"):
        part = pq.read_table(path)
        engine = part.schema.metadata[b"nightscore.engine_key"].decode()
        shard = path.name.split("-")[1]
        assert json.loads(commits_by(output)[shard].read_text())["engine"] == engine
        rows[engine] += NUM_ROWS // NUM_SMALL_SHARDS
        ids = part["user_id"].to_pylist()
        exact = 0.0 if engine == newer else NEARLY
        assert [scores[user] for user in ids] == pytest.approx(
            [alone[user] for user in ids], rel=0, abs=exact
        )
    told = {engine["key"]: (engine["device"], engine["rows"]) for engine in report["engines"]}
    assert told == {key: (names[key], rows[key]) for key in names}
    assert report["engine"]["key"] == max(rows, key=lambda key: rows[key])
    verified = score("verify", str(features_job), "--date", DATE, "--set", f"output.uri={output}")
    assert verified.code == 0, verified.err
    nodes.end(old)


def commits_by(output: Path) -> dict[str, Path]:
    """By the name of the shard."""
    return {path.stem: path for path in commits(output)}
