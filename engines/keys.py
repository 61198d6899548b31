"""Keys: sha256 over canonical JSON, and what of this machine decides whether an engine is valid."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BUILDER_REVISION = 1
"""Raised when the builder's code changes what it makes of the same input."""
RUNTIME_PACKAGES = {"openvino": "openvino", "onnxruntime": "onnxruntime"}
"""Runtime -> distribution whose version it has."""
INT8_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instruction sets that decide which int8 kernels run, and how their sums may saturate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What an engine is bound to on a CPU."""

    name: str
    architecture: str
    """Operating system and machine, such as `Linux-x86_64`."""
    instructions: tuple[str, ...]
    num_threads: int


def this_cpu(num_threads: int) -> Device:
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
    return Device(
        name=name,
        architecture=f"{platform.system()}-{platform.machine()}",
        instructions=tuple(flag for flag in INT8_FLAGS if flag in flags),
        num_threads=num_threads,
    )


def runtime_version(runtime: str) -> str:
    """Full version of a runtime, without importing it."""
    return importlib.metadata.version(RUNTIME_PACKAGES[runtime])


def digest(value: Any) -> str:
    """sha256, hexadecimal, over the canonical JSON of plain values or dataclasses."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_bytes(data: bytes | memoryview) -> str:
    """sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _plain(value: Any) -> Any:
    """Dataclasses as tagged mappings: two kinds with the same fields must differ."""
    return {"kind": type(value).__name__, **asdict(value)}
