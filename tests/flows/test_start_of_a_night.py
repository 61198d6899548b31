"""How a night starts: who imports what, and that nobody waits for what is not needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.job_file import load_job
from pipeline.lane import Lane, LaneDevice, modules_ahead
from tests.conftest import DATE
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


def test_the_decoder_of_a_cpu_lane_does_without_dali() -> None:
    modules = imported("-c", "import pipeline.decode_windows")
    assert "nvidia.nvimgcodec" in modules
    assert modules & HEAVY == set()


@pytest.mark.parametrize(
    ("sets", "on_gpu", "expected"),
    [
        ([], False, ("pipeline.decode_windows",)),
        (["lanes.cpu_decoder=dali"], False, ("pipeline.decode_images",)),
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
