"""A lane's process sees one GPU and runs on the cores that it was given."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from engines.nvml import discover
from pipeline.lane import Lane, LaneDevice
from tests.engines.fake_nvml import a_gpu, use_nvml

SHOW = """
import os, sys
from pipeline.lane_process import bind_process
import pipeline.lane_child
loaded = {"torch", "cuda", "tensorrt", "cupy", "nvidia", "openvino"} & set(sys.modules)
bind_process(GPU, frozenset(CORES))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), sorted(os.sched_getaffinity(0)), sorted(loaded))
"""


def bound(gpu: str | None, cores: list[int]) -> str:
    code = SHOW.replace("GPU,", f"{gpu!r},").replace("CORES", repr(cores))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "7"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_a_gpu_lane_sees_its_gpu_and_its_cores_before_cuda_is_loaded() -> None:
    core = min(os.sched_getaffinity(0))
    assert bound("MIG-1-2", [core]) == f"MIG-1-2 [{core}] []"


def test_a_cpu_lane_is_left_as_it_is() -> None:
    assert bound(None, []) == f"7 {sorted(os.sched_getaffinity(0))} []"


def test_cores_that_are_not_there_are_no_error() -> None:
    assert bound("GPU-1", [8190]) == f"GPU-1 {sorted(os.sched_getaffinity(0))} []"


def test_a_lane_hands_its_binding_to_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu())
    core = max(os.sched_getaffinity(0))
    gpu = discover().gpus[0].gpu
    lane = Lane(LaneDevice(name="gpu0", num_threads=1, gpu=gpu, cores=frozenset({core})))
    try:
        pid = lane._process.pid
        assert pid is not None
        deadline = time.monotonic() + 30
        while os.sched_getaffinity(pid) != {core}:
            assert time.monotonic() < deadline, "the process is not bound"
            time.sleep(0.02)
    finally:
        lane.abort()
