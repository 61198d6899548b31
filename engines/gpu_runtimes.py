"""Whether the runtimes for GPUs can be used here, told without importing them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from engines.devices import Gpu
from engines.keys import installed_version

INSTALL_HINT = "pip install 'nightscore[gpu]'"
MIN_COMPUTE_CAPABILITY = (7, 5)
"""Turing: what CUDA 13, and so TensorRT 11, begins with."""


def tensorrt_problem(gpu: Gpu | None) -> str | None:
    """Why TensorRT cannot be used on a GPU, as a clause; None when nothing speaks against it.

    Args:
        gpu: The GPU; None: there is none, and only what is installed is looked at.
    """
    if installed_version("tensorrt") is None:
        return "TensorRT is not installed"
    bindings = installed_version("cuda-bindings")
    if bindings is None:
        return "TensorRT is installed without cuda-bindings"
    return _driver_problem("TensorRT", bindings, gpu) if gpu else None


def torch_problem(gpu: Gpu) -> str | None:
    """Why torch cannot be used on a GPU, as a clause; None when nothing speaks against it."""
    cuda = torch_cuda()
    if cuda is None:
        return "the installed torch has no CUDA"
    bindings = installed_version("cuda-bindings")
    if bindings is None:
        return "torch is installed without cuda-bindings"
    problem = _driver_problem("torch", cuda, gpu)
    return problem or _driver_problem("cuda-bindings", bindings, gpu)


def torch_cuda() -> str | None:
    """The CUDA that torch was built with, such as `13.0`; None for a build without.

    It stands in torch/version.py, which can be read without the seconds that importing torch takes.
    The version's tag does not tell: builds from PyPI have none, with CUDA or without.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b.*=\s*['\"](\d+[\d.]*)['\"]", text, re.MULTILINE)
    return found and found[1]


def _driver_problem(runtime: str, cuda: str, gpu: Gpu) -> str | None:
    major = int(cuda.partition(".")[0])
    if gpu.cuda[0] < major:
        known = ".".join(map(str, gpu.cuda))
        return f"{runtime} is for CUDA {major} and driver {gpu.driver} knows CUDA {known} at most"
    if gpu.compute_capability < MIN_COMPUTE_CAPABILITY:
        has = ".".join(map(str, gpu.compute_capability))
        return f"{runtime} needs compute capability 7.5 or later and {gpu.name} has {has}"
    return None
