"""A real GPU: what NVML says agrees with CUDA, and its sensors move when it works."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from engines.devices import Gpu
from engines.gpu_runtimes import torch_problem
from engines.nvml import FoundGpu, GpuSensors
from flows.devices import share_cores, usable_gpus
from flows.doctor import doctor_facts
from pipeline.telemetry import Sampler

GPUS, WHY_NONE = usable_gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason=WHY_NONE or "")]
ASK_TORCH = """
import torch
p = torch.cuda.get_device_properties(0)
print(torch.cuda.device_count(), p.multi_processor_count, p.major, p.minor, sep="|", end="|")
print(p.total_memory, p.name, sep="|")
"""
WORK = """
import time, torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
end = time.monotonic() + 4
while time.monotonic() < end:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""


@pytest.fixture(params=GPUS, ids=lambda found: found.gpu.uuid)
def found(request: pytest.FixtureRequest) -> FoundGpu:
    value: FoundGpu = request.param
    return value


@pytest.fixture
def gpu(found: FoundGpu) -> Gpu:
    if problem := torch_problem(found.gpu):
        pytest.skip(problem)
    return found.gpu


def on_gpu(gpu: Gpu, code: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=200
    ).stdout


def test_nvml_and_cuda_agree_on_what_the_gpu_is(gpu: Gpu) -> None:
    count, num_sms, major, minor, num_bytes, name = on_gpu(gpu, ASK_TORCH).strip().split("|")
    assert int(count) == 1, "its UUID names one device for CUDA"
    assert int(num_sms) == gpu.num_sms
    assert (int(major), int(minor)) == gpu.compute_capability
    assert gpu.name in name
    # CUDA keeps some of it for itself.
    assert 0.9 * gpu.memory_bytes <= int(num_bytes) <= gpu.memory_bytes


def test_it_is_described_in_full(found: FoundGpu) -> None:
    gpu = found.gpu
    assert gpu.uuid.startswith(("GPU-", "MIG-"))
    assert gpu.num_sms > 0
    assert gpu.memory_bytes > 1024**3
    assert gpu.cuda >= (12, 0)
    (cores,) = share_cores([found.cores], os.sched_getaffinity(0))
    assert cores <= os.sched_getaffinity(0)
    with GpuSensors(gpu.uuid) as sensors:
        assert sensors.physical_uuid == found.physical_uuid
        print(found, sensors.read())


def test_the_sensors_move_when_it_works(gpu: Gpu) -> None:
    with Sampler([gpu], period_s=0.25) as idle:
        time.sleep(1)
    with Sampler([gpu], period_s=0.25) as busy:
        on_gpu(gpu, WORK)
    before, during = idle.use()[0], busy.use()[0]
    print(before, during, sep="\n")
    assert during.num_samples > 10
    assert during.memory_peak_bytes is not None
    assert during.memory_peak_bytes > 128 * 1024**2
    if gpu.mig_profile is None:
        assert during.utilisation_max is not None
        assert during.utilisation_max > 0.5
    if during.power_mean_w is not None and before.power_mean_w is not None:
        assert during.power_mean_w > before.power_mean_w
    if during.energy_j is not None and during.power_mean_w is not None:
        average_w = during.energy_j / during.duration_s
        assert average_w == pytest.approx(during.power_mean_w, rel=0.35)


def test_the_doctor_lists_it() -> None:
    facts = doctor_facts()
    assert [gpu["uuid"] for gpu in facts["gpus"]] == [found.gpu.uuid for found in GPUS]
