"""`score doctor`: what this machine can run, and what is missing for more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.devices import list_gpus, num_cores

Facts = dict[str, Any]
PACKAGES = {
    "torch": "loads and exports models",
    "onnxruntime": "CPU engines, and the fp32 reference",
    "openvino": "CPU engines",
    "nvidia-dali-cuda130": "decodes images",
    "tensorrt": "GPU engines: pip install 'nightscore[gpu]'",
    "pyarrow": "reads and writes Parquet",
    "prefect": "schedules the nightly deployment",
    "s3fs": "S3 input and output",
    "scikit-image": "pictures for the demo: pip install 'nightscore[demo]'",
}
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")


def doctor_facts() -> Facts:
    """Device, packages and settings, read without starting anything."""
    cpu = _cpu_info()
    return {
        "nightscore": importlib.metadata.version("nightscore"),
        "python": platform.python_version(),
        "cpu": cpu["name"],
        "cores": num_cores(),
        "int8_instructions": [flag for flag in INT8_FLAGS if flag in cpu["flags"]],
        "gpus": [f"{gpu.name}, driver {gpu.driver}" for gpu in list_gpus()],
        "packages": {name: _version(name) for name in PACKAGES},
        "prefect_api_url": os.environ.get("PREFECT_API_URL"),
        "s3_endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
    }


def _cpu_info() -> Facts:
    name, flags = platform.processor() or platform.machine(), ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return {"name": name, "flags": []}
    stripped = {key.strip(): value.strip() for key, value in fields.items()}
    flags = stripped.get("flags", "")
    return {"name": stripped.get("model name", name), "flags": flags.split()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def render_doctor(facts: Facts) -> RenderableType:
    """What is there, then what to do about what is not."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("nightscore", f"{facts['nightscore']}, Python {facts['python']}")
    int8 = ", ".join(facts["int8_instructions"]) or "none: int8 engines will gain little"
    table.add_row("cpu", f"{facts['cpu']}, {facts['cores']} cores, int8 instructions: {int8}")
    table.add_row("gpu", "; ".join(facts["gpus"]) or "none: CPU engines are used")
    for name, version in facts["packages"].items():
        table.add_row(name, Text(version or f"missing ({PACKAGES[name]})"))
    server = (
        facts["prefect_api_url"] or "PREFECT_API_URL is not set: needed for `score deploy` only"
    )
    table.add_row("prefect server", server)
    table.add_row(
        "s3 endpoint", facts["s3_endpoint"] or "the provider's own (AWS_ENDPOINT_URL unset)"
    )
    return Group(table, Text("`make demo` scores real pictures on what is here.", style="dim"))
