"""Devices as engines see them: what of a processor or GPU decides whether an engine is valid."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WeightBits = Literal[7, 8]
INT8_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instruction sets that decide which int8 kernels run, and how their sums may saturate."""
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables by which oneDNN, and so OpenVINO, uses fewer instructions than there are. Source:
oneDNN's developer guide, CPU Dispatcher Control."""
UNTIL_VNNI = {
    "SSE41": (),
    "AVX": (),
    "AVX2": ("avx2",),
    "AVX512_CORE": ("avx2", "avx512f"),
}
"""Limit without VNNI -> the instruction sets of `INT8_FLAGS` that it leaves; others leave all that
matters here."""
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Instruction sets of x86 that add products of int8 in 32 bits."""
ARCHITECTURE = f"{platform.system()}-{platform.machine()}"
"""Operating system and machine, such as `Linux-x86_64`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    """What an engine is bound to on a CPU."""

    name: str
    architecture: str
    instructions: tuple[str, ...]
    num_threads: int

    @property
    def kind(self) -> str:
        """`cpu`."""
        return "cpu"

    @property
    def weight_bits(self) -> WeightBits:
        """Bits of int8 weights that kernels multiply without a wrong sum.

        Without VNNI, x86 adds two products of uint8 and int8 in 16 bits, where larger sums are cut
        off (vpmaddubsw): EfficientNet-Lite0 agreed with fp32 on 88 % of rows with weights of 8 bits
        and on 98 % with 7. Source: ONNX Runtime's "Quantize ONNX models", on U8S8 and
        `reduce_range`; oneDNN's developer guide, "Nuances of int8 Computations".
        """
        is_x86 = self.architecture.endswith(("x86_64", "AMD64"))
        return 7 if is_x86 and not set(VNNI) & set(self.instructions) else 8

    @property
    def identity(self) -> Cpu:
        """What goes into keys."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One NVIDIA GPU, or one MIG slice of it, as the driver describes it."""

    uuid: str
    """`GPU-...` or `MIG-...`; what CUDA_VISIBLE_DEVICES takes."""
    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    memory_bytes: int
    mig_profile: str | None
    """Such as `1g.18gb`; None for a whole GPU."""
    driver: str
    """Full version, such as `580.95.05`."""
    cuda: tuple[int, int]
    """The newest CUDA that the driver knows."""
    architecture: str
    num_threads: int
    """CPU threads that feed it; no part of its identity."""

    @property
    def kind(self) -> str:
        """`gpu`."""
        return "gpu"

    @property
    def weight_bits(self) -> WeightBits:
        """Bits of int8 weights: all, as sums have 32."""
        return 8

    @property
    def identity(self) -> dict[str, object]:
        """What goes into keys: two GPUs of one kind share engines, a driver's minor does not count.

        Source: the messages of libnvinfer_lean 11.4 that name what binds a plan.
        """
        return {
            "name": self.name,
            "compute_capability": self.compute_capability,
            "num_sms": self.num_sms,
            "memory_bytes": self.memory_bytes,
            "mig_profile": self.mig_profile,
            "driver_major": self.driver.partition(".")[0],
            "cuda": self.cuda,
            "architecture": self.architecture,
        }


Device = Cpu | Gpu


def show_only(gpu_uuid: str | None) -> None:
    """Let this process see one GPU or slice, by its `Gpu.uuid`; None leaves everything as it is.

    Before CUDA is used: later it has no effect. Runtimes then find the device as their first one.
    """
    if gpu_uuid:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_uuid


def this_cpu(num_threads: int) -> Cpu:
    """The processor of this machine, with the threads that a lane may use."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip() == "model name":
            name = value.strip()
        elif field.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    limit = next((found for name in LIMITS if (found := os.environ.get(name))), None)
    return Cpu(
        # An engine that was made with fewer instructions is another one, and so is the device.
        name=f"{name}, at most {limit}" if limit else name,
        architecture=ARCHITECTURE,
        instructions=tuple(
            flag for flag in UNTIL_VNNI.get((limit or "").upper(), INT8_FLAGS) if flag in flags
        ),
        num_threads=num_threads,
    )
