"""The lanes of a run: one for each GPU or MIG slice that NVML reports, or some on the CPU."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engines.devices import Gpu
from engines.gpu_runtimes import INSTALL_HINT, tensorrt_problem, torch_problem
from engines.nvml import FoundGpu, discover
from pipeline.config import Job
from pipeline.errors import ConfigError
from pipeline.lane import Lane, LaneDevice, modules_ahead
from pipeline.lane_spawn import end_ahead

if TYPE_CHECKING:
    from flows.lanes import Lanes, MapGroups

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPUS = Path("/sys/devices/system/cpu")
NUMA_NODES = Path("/sys/devices/system/node")


def num_cores() -> int:
    """Cores that this process may use; a container's CPU set counts."""
    return len(os.sched_getaffinity(0))


def lane_devices(job: Job) -> list[LaneDevice]:
    """The lanes of a run, all of one kind: scores of two engines never meet in one run.

    `lanes.threads` is the number of CPU threads of each lane; without it they share the cores.

    Raises:
        ConfigError: The job demands GPUs, and there is none or TensorRT cannot be used.
    """
    if job.lanes.device == "cpu":
        return _cpu_lanes(job)
    gpus, why_none = usable_gpus()
    gpus = _largest_kind(gpus)
    tensorrt = tensorrt_problem(gpus[0].gpu if gpus else None)
    if job.lanes.device == "gpu":
        _demand(why_none, tensorrt)
    elif not gpus:
        return _cpu_lanes(job)
    elif tensorrt:
        name = gpus[0].gpu.name
        if torch := no_torch_because(job, gpus[0].gpu):
            log.warning("%s: %s, and %s; the CPU is used. %s", name, tensorrt, torch, INSTALL_HINT)
            return _cpu_lanes(job)
        log.warning("%s: %s; torch in fp16 is used. %s", name, tensorrt, INSTALL_HINT)
    return _gpu_lanes(job, gpus)


def no_torch_because(job: Job | None, gpu: Gpu) -> str | None:
    """Why torch cannot score a job's rows on a GPU, as a clause; None: nothing speaks against it.

    Without a job: those of a job whose model is torch's.
    """
    if job is not None and job.model.source.endswith(".onnx"):
        return "torch runs no ONNX model"
    return torch_problem(gpu)


def start_lanes(job: Job, map_groups: MapGroups | None = None) -> Lanes:
    """The lanes of a run, whose processes begin to import; see `lane_devices`.

    Args:
        job: Where it says so they are on a cluster: see flows/on_ray/lanes.py.
        map_groups: How groups of shards are handed to those of this machine; by threads by default.
    """
    if job.lanes.runner == "ray":
        end_ahead()
        from flows.on_ray.lanes import RayLanes

        return RayLanes(job)
    lanes = [Lane(device, modules_ahead(job, device)) for device in lane_devices(job)]
    from flows.lanes import LocalLanes  # now that the lanes import, too

    return LocalLanes(lanes, map_groups)


def usable_gpus() -> tuple[list[FoundGpu], str | None]:
    """The GPUs and slices that this process may use, and why there is none."""
    discovery, setting = discover(), os.environ.get(VISIBLE)
    gpus = visible(discovery.gpus, setting)
    if discovery.gpus and not gpus:
        return [], f"{VISIBLE} is {setting!r} and hides all {len(discovery.gpus)}"
    return gpus, discovery.problem


def visible(gpus: Sequence[FoundGpu], setting: str | None) -> list[FoundGpu]:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES leaves, in its order; None leaves all.

    As in CUDA, entries are indices or beginnings of UUIDs, and the first entry that names nothing
    ends the list. Two things differ: indices count in the order of PCI addresses (CUDA's own order
    with CUDA_DEVICE_ORDER=PCI_BUS_ID, and always that among GPUs of one kind), and a GPU with MIG
    stands for all its slices. Source: CUDA programming guide, CUDA environment variables.
    """
    if setting is None:
        return list(gpus)
    chosen: dict[str, FoundGpu] = {}
    for entry in (part.strip() for part in setting.split(",")):
        named = [found for found in gpus if _is_named(found, entry)]
        if not named:
            break
        chosen |= {found.gpu.uuid: found for found in named}
    return list(chosen.values())


def _is_named(found: FoundGpu, entry: str) -> bool:
    if entry.isdecimal():
        return found.index == int(entry)
    return entry.startswith(("GPU-", "MIG-")) and any(
        uuid.startswith(entry) for uuid in (found.gpu.uuid, found.physical_uuid)
    )


def _demand(why_none: str | None, tensorrt: str | None) -> None:
    """ConfigError when there is no GPU, or no TensorRT for it: both in one sentence."""
    problems = [f"no GPU can be used ({why_none})"] if why_none else []
    problems += [tensorrt] if tensorrt else []
    if problems:
        hint = f"{INSTALL_HINT}, or " if tensorrt and "install" in tensorrt else ""
        raise ConfigError(
            f"lanes.device: gpu, but {' and '.join(problems)}; expected a GPU with TensorRT. "
            f"On a machine with a GPU: {hint}set `lanes.device: auto` to use what is there."
        )


def _largest_kind(gpus: Sequence[FoundGpu]) -> list[FoundGpu]:
    """The GPUs that share engines and have the most multiprocessors together."""
    kinds: dict[str, list[FoundGpu]] = defaultdict(list)
    for found in gpus:
        kinds[str(found.gpu.identity)].append(found)
    if len(kinds) < 2:
        return list(gpus)
    chosen = max(kinds.values(), key=lambda kind: sum(found.gpu.num_sms for found in kind))
    log.warning(
        "GPUs of %d kinds: a run uses one kind, here %d x %s; name others in %s.",
        len(kinds),
        len(chosen),
        _title(chosen[0]),
        VISIBLE,
    )
    return chosen


def _title(found: FoundGpu) -> str:
    return f"{found.gpu.name} {found.gpu.mig_profile or ''}".strip()


def _cpu_lanes(job: Job) -> list[LaneDevice]:
    count = job.lanes.count
    if count == 1:
        return [LaneDevice(name="cpu", num_threads=job.lanes.threads or num_cores())]
    shares = share_cores([()] * count, os.sched_getaffinity(0))
    num_threads = [job.lanes.threads or len(cores) for cores in shares]
    return [
        LaneDevice(
            name=f"cpu{index}",
            num_threads=num_threads[index],
            cores=cores,
            machine_threads=sum(num_threads),
        )
        for index, cores in enumerate(shares)
    ]


def _gpu_lanes(job: Job, gpus: Sequence[FoundGpu]) -> list[LaneDevice]:
    shares = share_cores([found.cores for found in gpus], os.sched_getaffinity(0))
    lanes = []
    for found, cores in zip(gpus, shares, strict=True):
        num_threads = job.lanes.threads or len(cores)
        part = "" if found.slice is None else f"-slice{found.slice}"
        lanes.append(
            LaneDevice(
                name=f"gpu{found.index}{part}",
                num_threads=num_threads,
                gpu=dataclasses.replace(found.gpu, num_threads=num_threads),
                cores=cores,
            )
        )
    return lanes


def share_cores(near: Sequence[Collection[int]], allowed: Collection[int]) -> list[frozenset[int]]:
    """Cores for each lane: those of its GPU's NUMA node, divided among the lanes of that node.

    One on the CPU, or whose node is unknown or has no core that is allowed, shares all that are.
    Threads of one physical core stay together. With fewer cores than lanes, a core serves several.

    Args:
        near: Cores of each GPU's NUMA node; empty: unknown, or no GPU.
        allowed: Cores that this process may use.
    """
    nodes: dict[frozenset[int], list[int]] = defaultdict(list)
    for index, cores in enumerate(near):
        nodes[frozenset(cores) & frozenset(allowed) or frozenset(allowed)].append(index)
    shares: dict[int, frozenset[int]] = {}
    for cores, members in nodes.items():
        ordered = sorted(cores, key=lambda core: (_first_sibling(core), core))
        for place, index in enumerate(members):
            begin = place * len(ordered) // len(members)
            end = max((place + 1) * len(ordered) // len(members), begin + 1)
            shares[index] = frozenset(ordered[begin:end])
    return [shares[index] for index in range(len(near))]


def _first_sibling(core: int) -> int:
    """The lowest of the hardware threads that share a physical core."""
    with suppress(OSError, ValueError):
        siblings = (CPUS / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        return int(siblings.replace("-", ",").split(",")[0])
    return core
