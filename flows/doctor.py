"""`score doctor`: what this machine can run, and what is missing for more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engines.devices import VNNI, this_cpu
from engines.gpu_runtimes import INSTALL_HINT, tensorrt_problem
from engines.keys import installed_version
from engines.masking import masked
from engines.nvml import FoundGpu
from flows.devices import NUMA_NODES, no_torch_because, num_cores, usable_gpus
from flows.doctor_checks import job_checks, machine_checks
from pipeline.config import Job
from pipeline.report_words import plain
from pipeline.storage import s3_endpoint

Facts = dict[str, Any]
PACKAGES = {
    "torch": "loads and exports models",
    "onnxruntime": "CPU engines, and the fp32 reference",
    "openvino": "CPU engines",
    "nvidia-dali-cuda130": "decodes images",
    "tensorrt": f"GPU engines: {INSTALL_HINT}",
    "cuda-bindings": f"GPU engines: {INSTALL_HINT}",
    "pyarrow": "reads and writes Parquet",
    "prefect": "schedules the nightly deployment",
    "s3fs": "S3 input and output",
    "scikit-image": "pictures for the demo: pip install 'nightscore[demo]'",
}


def doctor_facts(job: Job | None = None) -> Facts:
    """Device, packages and settings, and whether what a job needs is there and answers.

    Args:
        job: Its input, output, model, price and mail are tried too; without one nothing is written.
    """
    cpu = this_cpu(num_cores())
    gpus, why_none = usable_gpus()
    return {
        "nightscore": importlib.metadata.version("nightscore"),
        "python": platform.python_version(),
        "job": job.name if job else None,
        "cpu": cpu.name,
        "cores": cpu.num_threads,
        "int8_instructions": [flag for flag in VNNI if flag in cpu.instructions],
        "numa_nodes": _numa_nodes(),
        "gpus": [_gpu_info(found) for found in gpus],
        "no_gpu_because": why_none,
        "no_tensorrt_because": why_none or tensorrt_problem(gpus[0].gpu),
        "no_torch_on_gpu_because": why_none or no_torch_because(job, gpus[0].gpu),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "checks": [
            asdict(check) for check in (*machine_checks(), *(job_checks(job) if job else ()))
        ],
        "prefect_api_url": _masked(os.environ.get("PREFECT_API_URL")),
        "s3_endpoint": _masked(s3_endpoint()),
    }


def _masked(address: str | None) -> str | None:
    """Without what it may say beside a place."""
    return address and masked(address)


def _gpu_info(found: FoundGpu) -> Facts:
    gpu = found.gpu
    return {
        "index": found.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "mig_profile": gpu.mig_profile,
        "memory_bytes": gpu.memory_bytes,
        "compute_capability": ".".join(map(str, gpu.compute_capability)),
        "sms": gpu.num_sms,
        "driver": gpu.driver,
        "cuda": ".".join(map(str, gpu.cuda)),
        "near_cores": len(found.cores),
    }


def _numa_nodes() -> dict[str, str]:
    """Cores of each NUMA node, as Linux writes them."""
    nodes = sorted(NUMA_NODES.glob("node[0-9]*/cpulist"))
    return {path.parent.name: path.read_text(encoding="utf-8").strip() for path in nodes}


def _gpu_engines(facts: Facts) -> str:
    if not facts["gpus"]:
        return f"none, CPU engines are used: {facts['no_gpu_because']}"
    tensorrt, torch = facts["no_tensorrt_because"], facts["no_torch_on_gpu_because"]
    if not tensorrt:
        return "TensorRT"
    return f"torch in fp16: {tensorrt}" if not torch else f"none: {tensorrt}, and {torch}"


def _gpu_line(gpu: Facts) -> Text:
    memory = f"{gpu['memory_bytes'] / 1024**3:,.1f} GiB" if gpu["memory_bytes"] else "memory shared"
    slice_of = f"MIG slice {gpu['mig_profile']}, " if gpu["mig_profile"] else ""
    near = f", {gpu['near_cores']} cores near it" if gpu["near_cores"] else ""
    return Text(
        f"{gpu['index']}: {gpu['name']}, {slice_of}{memory}, {gpu['sms']} SMs, compute capability "
        f"{gpu['compute_capability']}, driver {gpu['driver']} (CUDA {gpu['cuda']}){near}"
    )


def render_doctor(facts: Facts) -> RenderableType:
    """What is there, then what to do about what is not."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("nightscore", f"{facts['nightscore']}, Python {facts['python']}")
    int8 = ", ".join(facts["int8_instructions"]) or "none: int8 engines gain less here"
    table.add_row("cpu", f"{facts['cpu']}, {facts['cores']} cores, int8 instructions: {int8}")
    nodes = ", ".join(f"{node}: cores {cores}" for node, cores in facts["numa_nodes"].items())
    table.add_row("numa nodes", nodes or "unknown")
    for gpu in facts["gpus"]:
        table.add_row("gpu", _gpu_line(gpu))
    table.add_row("gpu engines", Text(_gpu_engines(facts)))
    for name, version in facts["packages"].items():
        table.add_row(name, Text(version or f"missing ({PACKAGES[name]})"))
    table.add_row(
        "s3 endpoint", facts["s3_endpoint"] or "the provider's own (AWS_ENDPOINT_URL unset)"
    )
    checks = Table(show_header=False, box=None, pad_edge=False)
    for check in facts["checks"]:
        mend = f"  ->  {plain(check['mend'])}" if check["mend"] else ""
        mark = Text("ok", style="green") if check["ok"] else Text("--", style="yellow")
        checks.add_row(mark, Text(check["name"]), Text(f"{plain(check['found'])}{mend}"))
    if facts["job"]:
        return Group(table, Text(), checks)
    hint = Text("`score doctor JOB` tries what a job needs, too.", style="dim")
    return Group(table, Text(), checks, hint)
