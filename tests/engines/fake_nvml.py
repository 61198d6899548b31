"""NVML as `pynvml` gives it, for machines that do not exist here.

Constants and error classes are those of the installed `pynvml`; `tests/engines/test_nvml.py` holds
the functions' signatures against it. A value that is an error is raised, and of a list of values
each call takes the next; the last one stays.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
GIB = 1024**3


@dataclass
class FakeGpu:
    """A GPU or slice; `values` are by the name of the NVML function that asks for them."""

    uuid: str
    name: str = "NVIDIA H200"
    slices: dict[int, FakeGpu | Exception] | None = None
    """By number, where MIG is on; an error is what NVML answers for that number."""
    cores: tuple[int, ...] | None = None
    """Near to it; None: NVML does not tell."""
    values: dict[str, Any] = field(default_factory=dict)
    parent: FakeGpu | None = None

    def __post_init__(self) -> None:
        for slice_ in (self.slices or {}).values():
            if isinstance(slice_, FakeGpu):
                slice_.parent = self


def a_gpu(number: int = 0, **changes: Any) -> FakeGpu:
    """An H200 that tells everything."""
    values = {
        "CudaComputeCapability": (9, 0),
        "MemoryInfo": memory(used=GIB),
        "NumGpuCores": 132 * 128,
        "UtilizationRates": types.SimpleNamespace(gpu=50, memory=10),
        "PowerUsage": 400_000,
        "TotalEnergyConsumption": [1_000_000, 1_500_000],
        f"ClockInfo {pynvml.NVML_CLOCK_SM}": 1980,
        f"ClockInfo {pynvml.NVML_CLOCK_MEM}": 3201,
        "TemperatureV": 55,
        "CurrentClocksEventReasons": 0,
        "JpgUtilization": [20, 100_000],
    }
    return FakeGpu(
        uuid=f"GPU-{number:08x}-aaaa", values={**values, **changes.pop("values", {})}, **changes
    )


def a_slice(number: int, profile: str = "1g.18gb", num_sms: int = 16) -> FakeGpu:
    """A slice of an H200; it does not tell its utilisation."""
    attributes = pynvml.c_nvmlDeviceAttributes(
        multiprocessorCount=num_sms, gpuInstanceSliceCount=1, memorySizeMB=16_384
    )
    return FakeGpu(
        uuid=f"MIG-{number:08x}-bbbb",
        name=f"NVIDIA H200 MIG {profile}",
        values={"Attributes_v2": attributes, "MemoryInfo": memory(used=2 * GIB)},
    )


def memory(used: int) -> Any:
    return pynvml.c_nvmlMemory_t(total=140 * GIB, free=140 * GIB - used, used=used)


class FakeNvml(types.ModuleType):
    """Stands in for the module `pynvml`."""

    def __init__(self, gpus: list[FakeGpu] | None) -> None:
        super().__init__("pynvml")
        self._gpus = gpus or []
        self._has_driver = gpus is not None
        self.num_open = 0
        self.cuda_version = 13_000
        for name in dir(pynvml):
            if name.startswith(("NVML", "nvmlTemperature")):
                setattr(self, name, getattr(pynvml, name))

    def nvmlInit(self):
        if not self._has_driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.num_open += 1

    def nvmlShutdown(self):
        self._check()
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self):
        self._check()
        return "580.159.04"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        self._check()
        return self.cuda_version

    def nvmlDeviceGetCount(self):
        self._check()
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        self._check()
        return self._gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self._check()
        slices = [s for gpu in self._gpus for s in (gpu.slices or {}).values()]
        for device in (*self._gpus, *slices):
            if isinstance(device, FakeGpu) and device.uuid == uuid:
                return device
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice):
        self._check()
        if migDevice.parent is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return migDevice.parent

    def nvmlDeviceGetUUID(self, handle):
        self._check()
        return handle.uuid

    def nvmlDeviceGetName(self, handle):
        self._check()
        return handle.name

    def nvmlDeviceGetMigMode(self, device):
        self._check()
        if device.slices is None:
            raise NOT_SUPPORTED
        return [pynvml.NVML_DEVICE_MIG_ENABLE] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device):
        self._check()
        if device.slices is None:
            raise NOT_SUPPORTED
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device, index):
        self._check()
        if index not in device.slices:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return _given(device.slices[index])

    def nvmlDeviceGetCpuAffinity(self, handle, cpuSetSize):
        self._check()
        if handle.cores is None:
            raise NOT_SUPPORTED
        words = [0] * cpuSetSize
        for core in handle.cores:
            words[core // 64] |= 1 << core % 64
        return words

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self._answer(handle, "CudaComputeCapability")

    def nvmlDeviceGetNumGpuCores(self, device):
        return self._answer(device, "NumGpuCores")

    def nvmlDeviceGetAttributes_v2(self, device):
        return self._answer(device, "Attributes_v2")

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        assert version is None
        return self._answer(handle, "MemoryInfo")

    def nvmlDeviceGetUtilizationRates(self, handle):
        return self._answer(handle, "UtilizationRates")

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._answer(handle, "PowerUsage")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._answer(handle, "TotalEnergyConsumption")

    def nvmlDeviceGetClockInfo(self, handle, type):
        return self._answer(handle, f"ClockInfo {type}")

    def nvmlDeviceGetTemperatureV(self, handle, sensor, version=pynvml.nvmlTemperature_v1):
        assert (sensor, version) == (pynvml.NVML_TEMPERATURE_GPU, pynvml.nvmlTemperature_v1)
        return self._answer(handle, "TemperatureV")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._answer(handle, "CurrentClocksEventReasons")

    def nvmlDeviceGetJpgUtilization(self, handle):
        return self._answer(handle, "JpgUtilization")

    def _check(self) -> None:
        if self.num_open < 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def _answer(self, device: FakeGpu, question: str) -> Any:
        self._check()
        answer = device.values.get(question, NOT_SUPPORTED)
        if isinstance(answer, list) and question != "JpgUtilization":
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return _given(answer)


def _given(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def use_nvml(monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu, driver: bool = True) -> FakeNvml:
    """For one test, a driver with these GPUs; or none."""
    fake = FakeNvml(list(gpus) if driver else None)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake
