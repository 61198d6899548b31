"""A lane on a node of a cluster begins: its process imports while the rest does so, too.

Light, as `pipeline/lane.py` is, for that very reason.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from engines.devices import this_cpu
from flows.devices import VISIBLE, lane_devices
from flows.on_ray.line import Line
from pipeline import start_up
from pipeline.config import Job
from pipeline.lane import Lane, LaneDevice, modules_ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a lane takes of a node."""

    num_cpus: int
    num_gpus: int
    num_threads: int | None
    """CPU threads of its engine; None: its share of the node's, beside a GPU."""

    def fit(self, node: Mapping[str, float]) -> int:
        """How many lanes such resources hold."""
        by_cpu = int(node.get("CPU", 0) // self.num_cpus)
        return min(by_cpu, int(node.get("GPU", 0))) if self.num_gpus else by_cpu

    def __str__(self) -> str:
        cpus = f"{self.num_cpus} CPU{'s' if self.num_cpus > 1 else ''}"
        return f"a GPU and {cpus}" if self.num_gpus else cpus


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneCall:
    """What the driver asks of a cluster: a lane."""

    desk: Line
    """To the desk."""
    lane: str
    """Its own name, such as `lane3`."""
    job: Job
    folder: str
    """Where the driver works: relative paths of the job begin there."""
    need: Need


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """Where a lane finds itself."""

    name: str
    num_cpus: int
    gpus: str
    """What it may see, as in CUDA_VISIBLE_DEVICES; empty: none."""
    num_lanes: int
    """That fit on the node, with which it shares memory and cores."""


def start_lane(call: LaneCall, node: Node) -> Lane:
    """Start the lane's process where the driver works, if there is such a folder here."""
    start_up.begin()
    with suppress(OSError):  # what is not shared is found out, and said, when it is opened
        os.chdir(call.folder)
    # A lane's process imports its parent's main module. That is Ray's, and takes a second.
    vars(sys.modules["__main__"]).pop("__file__", None)
    device = device_of(call, node)
    return Lane(device, modules_ahead(call.job, device))


def device_of(call: LaneCall, node: Node) -> LaneDevice:
    """What the lane is bound to: the GPU that the cluster gave it, or so many threads."""
    num_threads = call.need.num_threads
    if num_threads is not None and not node.gpus:
        cpu = this_cpu(num_threads)  # what the driver cannot see from where it is
        return LaneDevice(name=f"{node.name}-cpu", num_threads=num_threads, cpu=cpu)
    os.environ[VISIBLE] = node.gpus
    found = lane_devices(call.job)[0]
    num_threads = call.job.lanes.threads or max(1, node.num_cpus // node.num_lanes)
    gpu = found.gpu and dataclasses.replace(found.gpu, num_threads=num_threads)
    name = f"{node.name}-{found.name}"
    return LaneDevice(name=name, num_threads=num_threads, gpu=gpu, cores=found.cores)
