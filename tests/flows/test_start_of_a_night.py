"""How a night starts: who imports what, and that nobody waits for what is not needed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from flows.cli import lane_ahead
from pipeline.job_file import load_job
from pipeline.lane import Lane, LaneDevice, modules_ahead
from tests.conftest import DATE, SCORE
from tests.engines.small_devices import H200

HEAVY = {"nvidia.dali", "onnx", "torch", "prefect", "polars", "fsspec", "openvino_telemetry"}


def imported(*arguments: str) -> set[str]:
    """Modules that a Python process and its children import."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return set(re.findall(r"^import time:[\d |]+\| +(\S+)$", ended.stderr, re.MULTILINE))


@pytest.mark.timeout(300)
def test_a_night_with_its_engine_stored_imports_nothing_heavy_in_any_process(
    features_job: Path, tmp_path: Path
) -> None:
    def night(output: str) -> set[str]:
        moved = f"output.uri={tmp_path / output}"
        set_ = ("--set", moved, "--set", "lanes.device=cpu")
        return imported("-m", "flows.cli", "run", str(features_job), "--date", DATE, *set_)

    night("builds")
    modules = night("finds")
    assert {"pipeline.lane_child", "pipeline.run", "pyarrow.parquet"} <= modules
    assert modules & HEAVY == set()


def test_a_lane_can_be_started_before_arrow_numpy_and_runtimes_are_imported() -> None:
    modules = imported("-c", "import flows.devices, pipeline.lane")
    assert modules.isdisjoint({"pyarrow", "numpy", "openvino", *HEAVY})


def test_the_commands_main_module_is_light_for_lanes_import_it_too() -> None:
    modules = imported("-c", "import flows.cli")
    assert modules.isdisjoint({"typer", "rich", "pydantic", "numpy", *HEAVY})


def test_a_lane_can_begin_before_the_command_is_imported() -> None:
    modules = imported("-c", "import flows.cli, pipeline.lane_spawn")
    assert modules.isdisjoint({"typer", "rich", "pydantic", "numpy", "pyarrow", *HEAVY})


@pytest.mark.parametrize(
    ("arguments", "is_wanted"),
    [
        (["run", "job.yaml"], True),
        (["requeue", "job.yaml"], True),
        (["backfill", "job.yaml"], True),
        (["backfill", "job.yaml", "--dry-run"], False),
        (["run", "--help"], False),
        (["status", "run"], False),
        ([], False),
    ],
)
def test_only_a_command_that_scores_begins_a_process_ahead(
    arguments: list[str], is_wanted: bool
) -> None:
    assert isinstance(lane_ahead(arguments), nullcontext) != is_wanted


def test_a_command_that_comes_to_no_lane_leaves_no_process(
    start_score: Callable[..., Any], tmp_path: Path
) -> None:
    command = start_score("run", tmp_path / "none.yaml", "--date", DATE)
    assert command.end().code == 2
    assert command.lingering() == []


@pytest.mark.timeout(100)
def test_a_process_that_cannot_be_made_is_told_in_a_sentence_and_an_object(
    features_job: Path,
) -> None:
    command = f"ulimit -f 8; exec {SCORE} run {features_job} --date {DATE} --json"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "File too large" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_at_its_beginning_leaves_no_process(
    start_score: Callable[..., Any], features_job: Path, number: int
) -> None:
    command = start_score("run", features_job, "--date", DATE)
    while not any("multiprocessing-fork" in line for line in command.lingering(0.0)):
        assert command.is_running()
    command.signal(number)
    ended = command.end()
    # Killed before the first byte for its child, nobody can keep Python's start of one from
    # saying so.
    unheard = number == signal.SIGKILL and "pickle.load(from_parent)" in ended.err
    assert unheard or "Traceback" not in ended.err
    assert command.lingering() == []


@pytest.mark.parametrize("sets", [[], ["--json"]])
def test_ctrl_c_while_the_job_is_read_says_that_it_was_one(
    start_score: Callable[..., Any], tmp_path: Path, sets: list[str]
) -> None:
    os.mkfifo(tmp_path / "job.yaml")
    command = start_score("run", tmp_path / "job.yaml", "--date", DATE, *sets)
    with (tmp_path / "job.yaml").open("w"):  # once the command reads it
        command.signal(signal.SIGINT)
        ended = command.end()
    assert ended.code == 75
    assert "interrupted: SIGINT received" in ended.err
    assert ("interrupted" in ended.out) == bool(sets)


def test_the_decoder_of_a_cpu_lane_does_without_dali() -> None:
    modules = imported("-c", "import pipeline.decode_windows")
    assert "nvidia.nvimgcodec" in modules
    assert modules & HEAVY == set()


@pytest.mark.parametrize(
    ("sets", "on_gpu", "expected"),
    [
        ([], False, ("pipeline.decode_windows", "engines.ovino:the_core")),
        (["lanes.cpu_decoder=dali"], False, ("pipeline.decode_images", "engines.ovino:the_core")),
        ([], True, ("pipeline.decode_images_gpu",)),
        (["lanes.gpu_decode.enabled=false"], True, ("pipeline.decode_images",)),
    ],
)
def test_a_lane_of_pictures_imports_its_decoder_ahead(
    pictures_job: Path, sets: list[str], on_gpu: bool, expected: tuple[str, ...]
) -> None:
    device = LaneDevice(name="lane", num_threads=1, gpu=H200 if on_gpu else None)
    assert modules_ahead(load_job(str(pictures_job), sets), device) == expected


def test_a_lane_of_features_imports_no_decoder_of_pictures(features_job: Path) -> None:
    for gpu in (None, H200):
        device = LaneDevice(name="lane", num_threads=1, gpu=gpu)
        assert modules_ahead(load_job(str(features_job), []), device) == ()


@pytest.mark.timeout(30)
def test_a_lane_that_was_given_nothing_is_closed_without_waiting_for_its_imports() -> None:
    lane = Lane(LaneDevice(name="cpu", num_threads=1))
    lane.close()
    assert not lane._process.is_alive()
    assert lane._process.exitcode == -9
