"""Keys: sha256 over canonical JSON, and the versions of runtimes that go into them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from typing import Any

BUILDER_REVISION = 14
"""Raised when the builder's code changes what it makes of the same input."""
RUNTIMES = {"cpu": ("openvino", "onnxruntime"), "gpu": ("tensorrt", "torch")}
"""Kind of device -> what may run an engine there; each is a distribution's name too."""
KEYED_PACKAGES = {
    "cpu": RUNTIMES["cpu"],
    # TensorRT's full version fixes its parser; ONNX Runtime computes the scales.
    "gpu": (*RUNTIMES["gpu"], "onnxruntime", "cuda-bindings", "nvidia-cuda-runtime"),
}
"""Kind of device -> distributions whose versions decide what an engine is and where it is valid."""


def installed_version(distribution: str) -> str | None:
    """Full version of a distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def runtime_version(runtime: str) -> str:
    """Full version of a runtime as keys and manifests have it: `none` where there is none."""
    return installed_version(runtime) or "none"


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
