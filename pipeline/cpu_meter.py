"""What the CPU does during a run, from /proc and, where it may be read, RAPL's energy counters."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engines.devices import this_cpu
from pipeline.report import DeviceUse

PROC = Path("/proc")
POWERCAP = Path("/sys/class/powercap")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MIN_TICKS = 20
"""Core ticks that an interval must have for its utilisation to mean something."""
NUM_BUSY_FIELDS, IDLE_FIELDS = 8, (3, 4)
"""Of a cpu line: user nice system idle iowait irq softirq steal; guest time is in user already."""
RAPL = "CPU packages"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    at_s: float
    busy_ticks: int
    all_ticks: int
    energy_uj: tuple[int, ...] | None
    """One counter for each package."""


class CpuMeter:
    """Samples the cores that this process may use, and its descendants' CPU time."""

    def __init__(self) -> None:
        self._name = this_cpu(1).name
        self._packages = _packages()
        self._samples: list[_Sample] = []
        self._cpu_s: list[float | None] = []

    def __enter__(self) -> CpuMeter:
        self._cpu_s.append(tree_cpu_s(os.getpid()))
        return self

    def __exit__(self, *_: object) -> None:
        self._cpu_s.append(tree_cpu_s(os.getpid()))

    def read(self) -> None:
        """Take a sample."""
        busy, total = _core_ticks()
        self._samples.append(
            _Sample(
                at_s=time.monotonic(),
                busy_ticks=busy,
                all_ticks=total,
                energy_uj=_energy(self._packages),
            )
        )

    def use(self) -> DeviceUse:
        """What was done between the first and the last sample."""
        samples = self._samples
        duration_s = samples[-1].at_s - samples[0].at_s
        mean = _utilisation(samples[0], samples[-1], min_ticks=1)
        shares = [_utilisation(*pair) for pair in itertools.pairwise(samples)]
        energy_j = self._energy_j()
        return DeviceUse(
            name=self._name,
            kind="cpu",
            num_samples=len(samples),
            duration_s=duration_s,
            utilisation_mean=mean,
            utilisation_max=max((s for s in (mean, *shares) if s is not None), default=None),
            cpu_s=self._tree_s(),
            power_mean_w=energy_j / duration_s if energy_j and duration_s else None,
            energy_j=energy_j,
            energy_meter=None if energy_j is None else RAPL,
        )

    def _tree_s(self) -> float | None:
        begin, end = self._cpu_s[0], self._cpu_s[-1]
        return None if begin is None or end is None else max(end - begin, 0.0)

    def _energy_j(self) -> float | None:
        """Sum over packages; the counters are small and wrap every few minutes."""
        if not self._packages:
            return None
        total_uj = 0
        for before, after in itertools.pairwise(self._samples):
            if before.energy_uj is None or after.energy_uj is None:
                return None
            ranges = self._packages.values()
            for begin, end, wraps_at in zip(before.energy_uj, after.energy_uj, ranges, strict=True):
                total_uj += end - begin if end >= begin else end - begin + wraps_at
        return total_uj / 1e6


def _utilisation(before: _Sample, after: _Sample, min_ticks: int = MIN_TICKS) -> float | None:
    ticks = after.all_ticks - before.all_ticks
    if ticks < min_ticks:
        return None
    return min(max((after.busy_ticks - before.busy_ticks) / ticks, 0.0), 1.0)


def _core_ticks() -> tuple[int, int]:
    """Busy ticks and all ticks since boot, over the cores that this process may use."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy = total = 0
    with suppress(OSError, ValueError):
        for line in (PROC / "stat").read_text(encoding="utf-8").splitlines():
            name, *fields = line.split()
            if name in names:
                ticks = [int(field) for field in fields[:NUM_BUSY_FIELDS]]
                total += sum(ticks)
                busy += sum(ticks) - sum(ticks[field] for field in IDLE_FIELDS)
    return busy, total


def tree_cpu_s(root: int) -> float | None:
    """CPU seconds of a process and its descendants until now, ended ones included.

    An ended child counts from when its parent has waited for it. None without /proc.
    """
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    with suppress(OSError):
        for folder in PROC.iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError, ValueError, IndexError):  # it ended while we looked
                fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                pid = int(folder.name)
                children.setdefault(int(fields[1]), []).append(pid)
                ticks[pid] = sum(int(field) for field in fields[11:15])
    if root not in ticks:
        return None
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        total += ticks[pid]
        waiting += children.get(pid, [])
    return total / TICKS_PER_S


def _packages() -> dict[Path, int]:
    """Energy counters of the CPU packages, with the value at which each wraps.

    Their parts (cores, memory) and the whole board are other zones, and are not added.
    """
    packages = {}
    with suppress(OSError, ValueError):
        for zone in sorted(POWERCAP.glob("intel-rapl:*")):
            if (zone / "name").read_text(encoding="utf-8").startswith("package"):
                wraps_at = int((zone / "max_energy_range_uj").read_text(encoding="utf-8"))
                packages[zone / "energy_uj"] = wraps_at
    return packages


def _energy(packages: dict[Path, int]) -> tuple[int, ...] | None:
    try:
        return tuple(int(counter.read_text(encoding="utf-8")) for counter in packages)
    except (OSError, ValueError):  # since 2020 kernels let only root read it
        return None
