"""Where and with what a benchmark ran: whoever doubts a number must be able to repeat it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from engines.devices import Cpu, Gpu
from engines.keys import installed_version
from flows.devices import num_cores

Facts = dict[str, Any]
PACKAGES = (
    *("nightscore", "torch", "onnx", "onnxruntime", "openvino", "numpy"),
    *("tensorrt", "cuda-bindings", "nvidia-cuda-runtime", "nvidia-dali-cuda130"),
)
CPUS = Path("/sys/devices/system/cpu")


def machine_facts(cpu: Cpu, gpu: Gpu | None) -> Facts:
    """Hardware, versions, threads, and which code; None where the machine does not tell."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "cpu": cpu.name,
        "cores": num_cores(),
        "instructions": list(cpu.instructions),
        "threads": cpu.num_threads,
        "governor": _text(CPUS / "cpu0/cpufreq/scaling_governor"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu and _describe(gpu),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "KMP_", "TORCH", "OV_", "CUDA_", "MALLOC_"))
            or name == "LD_PRELOAD"
        },
        "git_revision": _git_revision(),
    }


def _describe(gpu: Gpu) -> str:
    capability, cuda = (".".join(map(str, pair)) for pair in (gpu.compute_capability, gpu.cuda))
    mig = f"MIG {gpu.mig_profile}, " if gpu.mig_profile else ""
    return (
        f"{gpu.name}, {mig}compute capability {capability}, {gpu.num_sms} SMs, "
        f"{gpu.memory_bytes / 2**30:.0f} GiB, driver {gpu.driver}, CUDA {cuda}"
    )


def load_facts() -> Facts:
    """How busy the machine is, and its clock now."""
    one, five, fifteen = os.getloadavg()
    return {"loadavg": [one, five, fifteen], "cpu_mhz": median(_clocks_mhz() or [0.0]) or None}


def _clocks_mhz() -> list[float]:
    return [float(line.partition(":")[2]) for line in _cpuinfo() if line.startswith("cpu MHz")]


def _cpuinfo() -> Iterator[str]:
    yield from (_text(Path("/proc/cpuinfo")) or "").splitlines()


def _text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8").strip()
    return None


def _git_revision() -> str | None:
    """Of the checkout that the code runs from, with `-dirty` when it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
