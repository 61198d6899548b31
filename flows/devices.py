"""What this machine has to score with: CPU cores, and GPUs as NVML reports them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.config import Job
from pipeline.lane import LaneDevice


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One NVIDIA GPU as the driver describes it."""

    name: str
    memory_bytes: int
    driver: str


def list_gpus() -> list[Gpu]:
    """GPUs that the NVIDIA driver sees; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [
            Gpu(
                name=pynvml.nvmlDeviceGetName(handle),
                memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                driver=driver,
            )
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def num_cores() -> int:
    """Cores that this process may use; a container's CPU set counts."""
    return len(os.sched_getaffinity(0))


def lane_devices(job: Job) -> list[LaneDevice]:
    """The lanes of a run: one over all cores, or over `lanes.threads` of them."""
    return [LaneDevice(name="cpu", num_threads=job.lanes.threads or num_cores())]
