"""Samples the devices while something runs: how busy they were, and what energy it took."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Protocol, Self, TypeVar

from engines.devices import Device, Gpu
from engines.nvml import GpuReading, GpuSensors
from pipeline.cpu_meter import CpuMeter
from pipeline.report import DeviceUse

log = logging.getLogger(__name__)
T = TypeVar("T")

PERIOD_S = 1.0
PATIENCE_S = 10.0
"""How long the work waits for a driver to answer; one that lost its GPU may never."""


class Meter(Protocol):
    """Samples one device."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self) -> None:
        """Take a sample."""

    def use(self) -> DeviceUse:
        """What the samples say; there are two at least."""


class Sampler:
    """Samples GPUs and the CPU while a `with` block runs, from a thread of its own.

        with Sampler(devices) as sampler:
            ...
        sampler.use()

    The CPU of this machine is always sampled. What cannot be read is None, and never an error.

    Args:
        devices: GPUs or slices to sample; CPUs among them change nothing.
        period_s: Seconds between two samples.
    """

    def __init__(self, devices: Iterable[Device], period_s: float = PERIOD_S) -> None:
        gpus = {device.uuid: device for device in devices if isinstance(device, Gpu)}
        self._meters: list[Meter] = [*map(GpuMeter, gpus.values()), CpuMeter()]
        self._period_s = period_s
        self._begun = threading.Event()
        self._stop = threading.Event()
        self._use: tuple[DeviceUse, ...] = ()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        self._begun.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)

    def use(self) -> tuple[DeviceUse, ...]:
        """What each device did in the block, GPUs first; call it after the block.

        Empty when a driver did not answer.
        """
        return self._use

    def _sample(self) -> None:
        try:
            with ExitStack() as opened:
                meters = [opened.enter_context(meter) for meter in self._meters]
                _read(meters)
                self._begun.set()
                while not self._stop.wait(self._period_s):
                    _read(meters)
                _read(meters)
            self._use = tuple(meter.use() for meter in self._meters)
        except Exception:  # the work goes on, and its report says nothing of the devices
            log.warning("the devices could not be sampled", exc_info=True)
            self._begun.set()


def joules_per_1000(uses: Iterable[DeviceUse], num_rows: int) -> float | None:
    """Energy of all meters for each 1,000 rows.

    None when a GPU was used whose energy is unknown: the rest would look like the whole. The CPU's
    is left out where it cannot be read; `energy_meter` of each use tells.
    """
    known: dict[str, float] = {}
    for use in uses:
        if use.energy_j is not None and use.energy_meter is not None:
            known[use.energy_meter] = use.energy_j
        elif use.kind == "gpu":
            return None
    return sum(known.values()) / num_rows * 1000 if known and num_rows else None


def _read(meters: Iterable[Meter]) -> None:
    for meter in meters:
        meter.read()


class GpuMeter:
    """Samples one GPU or MIG slice."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._sensors = GpuSensors(gpu.uuid)
        self._times_s: list[float] = []
        self._readings: list[GpuReading] = []

    def __enter__(self) -> GpuMeter:
        self._sensors.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._sensors.__exit__()

    def read(self) -> None:
        """Take a sample."""
        self._times_s.append(time.monotonic())
        self._readings.append(self._sensors.read())

    def use(self) -> DeviceUse:
        """What was done between the first and the last sample."""
        # The first says what the GPU did before; it only tells where its counters began.
        first, *readings = self._readings
        busy = _known(reading.utilisation for reading in readings)
        clocks = _known(reading.sm_clock_mhz for reading in readings)
        energy_j = _difference(first.energy_j, readings[-1].energy_j)
        power_w = _mean(_known(reading.power_w for reading in readings))
        memory = _known(reading.memory_used_bytes for reading in self._readings)
        is_metered = energy_j is not None or power_w is not None
        return DeviceUse(
            name=" MIG ".join(filter(None, (self._gpu.name, self._gpu.mig_profile))),
            kind="gpu",
            uuid=self._gpu.uuid,
            num_samples=len(self._readings),
            duration_s=self._times_s[-1] - self._times_s[0],
            utilisation_mean=_mean(busy),
            utilisation_max=max(busy, default=None),
            memory_peak_bytes=max(memory, default=None),
            power_mean_w=power_w,
            energy_j=energy_j,
            energy_meter=self._sensors.physical_uuid if is_metered else None,
            sm_clock_mean_mhz=_mean(clocks),
            sm_clock_min_mhz=min(clocks, default=None),
            memory_clock_mean_mhz=_mean(_known(r.memory_clock_mhz for r in readings)),
            temperature_max_c=max(_known(r.temperature_c for r in readings), default=None),
            throttled=_shares(_known(r.throttle_reasons for r in readings)),
            jpeg_utilisation_mean=_mean(_known(r.jpeg_utilisation for r in readings)),
        )


def _known(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _difference(begin: float | None, end: float | None) -> float | None:
    """None as well when the counter began anew: the driver was loaded again."""
    if begin is None or end is None or end < begin:
        return None
    return end - begin


def _shares(reasons: Sequence[tuple[str, ...]]) -> dict[str, float]:
    counts = Counter(name for names in reasons for name in names)
    return {name: count / len(reasons) for name, count in counts.most_common()}
