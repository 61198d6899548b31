"""Compile a graph for OpenVINO, with the kernels of its convolutions that are faster here."""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Any

from engines.ovino import settings, the_core

log = logging.getLogger(__name__)

OLDER_KERNELS = {
    "Convolution": "cpu:jit_avx512_1x1,cpu:jit_avx512",
    "GroupConvolution": "cpu:jit_avx512_dw,cpu:jit_avx512",
}
"""Type of a layer -> the kernels to try first; those that a processor lacks are passed over.

OpenVINO takes oneDNN's newer ones (brgconv), made of small matrix products. Those written for one
shape each are faster for narrow 1 x 1 and for most depthwise layers: on a Xeon with AVX512-VNNI,
EfficientNet-Lite0 int8 took 5 % fewer CPU seconds, and its scores are the same to the bit. With AMX
the newer ones win by far, so both are tried."""
PRIORITY = "PrimitivesPriority"
"""Runtime attribute of a layer. Written into a compiled graph it counts where that is opened.
Source: transformations/fix_rt_info.cpp and primitives_priority_attribute.hpp of OpenVINO."""
CLEARLY_FASTER = 0.97
"""Share of the time below which the older kernels are taken: less is noise."""
MIN_PAIRS, MAX_PAIRS, MAX_TRIAL_S = 3, 20, 2.0
"""Of batches, by which the two are compared until the seconds are over. Eight times 20 pairs on a
busy machine said 0.88 to 0.95; medians of seconds 0.78 to 0.99, and least seconds 0.73 to 1.21."""


def compile_graph(graph: Path) -> bytes:
    """Compile an ONNX graph for this machine; the number of threads is chosen where it is opened.

    Two processes get the same bytes, unless they find other kernels faster; a second time in one
    process, the names of layers differ.

    Returns:
        What `OpenVinoRunner` opens from a file `*.blob`; it answers as the graph does, bit for bit.
    """
    newer = _blob(the_core().read_model(graph))
    model = the_core().read_model(graph)
    if not _prefer_older_kernels(model):
        return newer
    older = _blob(model)
    share = time_share(older, newer)
    log.info("%s: older kernels take %.0f %% of the newer ones' time", graph.name, 100 * share)
    return older if share < CLEARLY_FASTER else newer


def _blob(model: Any) -> bytes:
    compiled = the_core().compile_model(model, "CPU", settings(num_threads=1))
    blob: bytes = compiled.export_model().getvalue()
    return blob


def _prefer_older_kernels(model: Any) -> bool:
    """Whether the model has layers for which there are some."""
    layers = [layer for layer in model.get_ops() if layer.get_type_name() in OLDER_KERNELS]
    for layer in layers:
        layer.get_rt_info()[PRIORITY] = OLDER_KERNELS[layer.get_type_name()]
    return bool(layers)


def time_share(older: bytes, newer: bytes) -> float:
    """CPU seconds of a batch with `older` over those with `newer`: the median of pairs of them."""
    requests = [_request(blob) for blob in (older, newer)]
    shares: list[float] = []
    until = time.perf_counter() + MAX_TRIAL_S
    while len(shares) < MAX_PAIRS and (len(shares) < MIN_PAIRS or time.perf_counter() < until):
        of_older, of_newer = map(_cpu_s, requests)
        shares.append(of_older / of_newer)
    return statistics.median(shares)


def _cpu_s(request: Any) -> float:
    """Others on this machine cost a batch time, but hardly any CPU time."""
    began = time.process_time()
    request.infer()
    return time.process_time() - began


def _request(blob: bytes) -> Any:
    """One that has run once; its input is ones, as what memory happens to hold may be slow."""
    opened = the_core().import_model(blob, "CPU", settings(num_threads=1))
    request = opened.create_infer_request()
    request.get_input_tensor().data[:] = 1
    request.infer()
    return request
