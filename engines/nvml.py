"""NVIDIA's management library: which GPUs and MIG slices there are, and what they are doing.

The only module that imports `pynvml`. Nothing here starts CUDA, so a process that looks may still
decide what CUDA will see. A machine without a driver has no GPUs, and what a GPU does not tell is
None: neither is an error.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from engines.devices import ARCHITECTURE, Gpu

log = logging.getLogger(__name__)

CORES_PER_SM = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}
"""CUDA cores of a multiprocessor by compute capability, where they are not 128.

NVML tells SMs of MIG slices only; of a whole GPU it tells cores, a multiple that is fixed for each
compute capability. Source: CUDA programming guide, arithmetic throughput by compute capability."""
MANY_CORES_PER_SM = 128
AFFINITY_WORDS = 128
"""64-bit words for a set of CPU cores: 8,192 cores, the most that Linux can have."""
MIB = 1024 * 1024
THROTTLE_REASONS = {
    0x002: "applications_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}
"""NVML's bits (nvmlClocksEventReason*) for clocks below what they could be; idle is not one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundGpu:
    """A GPU or slice, and where in the machine it is."""

    gpu: Gpu
    """Its `num_threads` is 1: nobody has been given to it yet."""
    index: int
    """Of the physical GPU, in the order of PCI addresses."""
    slice: int | None
    """Number of the MIG slice within it; None for a whole GPU."""
    physical_uuid: str
    cores: frozenset[int]
    """CPU cores of its NUMA node; empty: unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovery:
    """What NVML found."""

    gpus: tuple[FoundGpu, ...]
    problem: str | None
    """Why there is none, in NVML's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """What a GPU was doing at one moment; None where it does not tell.

    A MIG slice knows its own memory only: power, energy, clocks, temperature and throttling are
    those of the physical GPU, and its utilisation is unknown.
    """

    utilisation: float | None = None
    """Share of the last 1/6 to 1 s in which any kernel ran: not how full the GPU was."""
    memory_used_bytes: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    """Since the driver was loaded; the whole physical GPU. Volta and later."""
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    """Names from `THROTTLE_REASONS`."""
    jpeg_utilisation: float | None = None
    """Share of time in which the JPEG engines (NVJPG) worked."""


def discover() -> Discovery:
    """Every GPU, or each of its slices where MIG is on; none, with the reason, without a driver."""
    import pynvml

    try:
        with _session():
            gpus = tuple(_all_gpus())
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
        return Discovery(gpus=(), problem=f"no NVIDIA driver: {error}")
    except pynvml.NVMLError as error:
        log.warning("NVIDIA driver: %s; its GPUs are not used.", error)
        return Discovery(gpus=(), problem=f"NVIDIA driver: {error}")
    return Discovery(gpus=gpus, problem=None if gpus else "the NVIDIA driver sees no usable GPU")


class GpuSensors:
    """Reads what one GPU or slice is doing; a context manager that keeps NVML open.

    Args:
        uuid: `GPU-...` or `MIG-...`.
    """

    def __init__(self, uuid: str) -> None:
        self.physical_uuid: str | None = None
        """Whose power and energy are read; known once entered, None when it cannot be read."""
        self._uuid = uuid
        self._open = ExitStack()

    def __enter__(self) -> GpuSensors:
        import pynvml

        try:
            nvml = self._open.enter_context(_session())
            self._handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
            whole = _ask(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, self._handle)
            self._physical = self._handle if whole is None else whole
            self.physical_uuid = nvml.nvmlDeviceGetUUID(self._physical)
        except pynvml.NVMLError as error:
            log.warning("%s: %s; the report will say nothing of it.", self._uuid, error)
            self._open.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self) -> GpuReading:
        """What it is doing now."""
        if self.physical_uuid is None:
            return GpuReading()
        import pynvml as nvml

        physical = self._physical
        busy = _ask(nvml.nvmlDeviceGetUtilizationRates, self._handle)
        memory = _ask(nvml.nvmlDeviceGetMemoryInfo, self._handle)
        reasons = _ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, physical)
        jpeg = _ask(nvml.nvmlDeviceGetJpgUtilization, self._handle)
        return GpuReading(
            utilisation=None if busy is None else busy.gpu / 100,
            memory_used_bytes=None if memory is None else memory.used,
            power_w=_thousandth(_ask(nvml.nvmlDeviceGetPowerUsage, physical)),
            energy_j=_thousandth(_ask(nvml.nvmlDeviceGetTotalEnergyConsumption, physical)),
            sm_clock_mhz=_ask(nvml.nvmlDeviceGetClockInfo, physical, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=_ask(nvml.nvmlDeviceGetClockInfo, physical, nvml.NVML_CLOCK_MEM),
            temperature_c=_ask(nvml.nvmlDeviceGetTemperatureV, physical, nvml.NVML_TEMPERATURE_GPU),
            throttle_reasons=None if reasons is None else _names(reasons),
            jpeg_utilisation=None if jpeg is None else jpeg[0] / 100,
        )


@contextmanager
def _session() -> Iterator[Any]:
    """NVML, open; NVML counts how often."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):  # a driver that is gone need not be told
            pynvml.nvmlShutdown()


def _ask(function: Callable[..., Any], *arguments: object) -> Any:
    """A function's answer, or None when this GPU or driver does not tell."""
    import pynvml

    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _all_gpus() -> Iterator[FoundGpu]:
    import pynvml as nvml

    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            yield from _slices_or_whole(index, handle)
        except nvml.NVMLError as error:
            log.warning("GPU %d: %s; it is not used.", index, error)


def _slices_or_whole(index: int, handle: Any) -> Iterator[FoundGpu]:
    import pynvml as nvml

    whole = _whole_gpu(handle)
    found = FoundGpu(
        gpu=whole, index=index, slice=None, physical_uuid=whole.uuid, cores=_near_cores(handle)
    )
    mode = _ask(nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        yield found
        return
    slices = list(_slices(handle))
    if not slices:
        log.warning("GPU %d: MIG is on and it has no slice; it cannot be used.", index)
    for number, slice_handle in slices:
        gpu = _slice_of(whole, slice_handle)
        yield dataclasses.replace(found, gpu=gpu, slice=number)


def _slices(handle: Any) -> Iterator[tuple[int, Any]]:
    """Slices by number; the numbers have holes, and a container may be given a few of them."""
    import pynvml as nvml

    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield number, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_NoPermission):
            continue


def _whole_gpu(handle: Any) -> Gpu:
    import pynvml as nvml

    memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    num_cores = _ask(nvml.nvmlDeviceGetNumGpuCores, handle) or 0
    cuda = _ask(nvml.nvmlSystemGetCudaDriverVersion_v2) or 0
    return Gpu(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        compute_capability=capability,
        num_sms=num_cores // CORES_PER_SM.get(capability, MANY_CORES_PER_SM),
        memory_bytes=memory.total if memory else 0,
        mig_profile=None,
        driver=nvml.nvmlSystemGetDriverVersion(),
        cuda=(cuda // 1000, cuda % 1000 // 10),
        architecture=ARCHITECTURE,
        num_threads=1,
    )


def _slice_of(whole: Gpu, handle: Any) -> Gpu:
    """A slice's own size; what it shares with its GPU is taken from that."""
    import pynvml as nvml

    attributes = nvml.nvmlDeviceGetAttributes_v2(handle)
    # NVML calls a slice `NVIDIA H200 MIG 1g.18gb`.
    _, _, profile = nvml.nvmlDeviceGetName(handle).partition(" MIG ")
    return dataclasses.replace(
        whole,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        num_sms=attributes.multiprocessorCount,
        memory_bytes=attributes.memorySizeMB * MIB,
        mig_profile=profile or f"{attributes.gpuInstanceSliceCount}g",
    )


def _near_cores(handle: Any) -> frozenset[int]:
    import pynvml as nvml

    words = _ask(nvml.nvmlDeviceGetCpuAffinity, handle, AFFINITY_WORDS)
    if words is None:
        return frozenset()
    return frozenset(
        number * 64 + bit
        for number, word in enumerate(words)
        for bit in range(64)
        if word >> bit & 1
    )


def _names(reasons: int) -> tuple[str, ...]:
    return tuple(name for bit, name in THROTTLE_REASONS.items() if reasons & bit)


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000
