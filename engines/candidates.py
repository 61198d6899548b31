"""Candidates: the model's graph in each precision, wrapped for the runtimes that run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.devices import Device
from engines.export import fixed_batch
from engines.model import ImageInput, ModelSpec
from engines.runner import TensorSpec

if TYPE_CHECKING:
    import onnx

CPU_BATCH_IMAGES = 8
"""Activations of a small batch stay in the cache: EfficientNet-Lite0 int8 on OpenVINO scored
1,122 images/s in batches of 8 and 896 in batches of 128 (2 cores with AVX512-VNNI)."""
CPU_BATCH_FEATURES = 2048
GPU_BATCH_IMAGES = 256
"""Large enough to fill a GPU; MLPerf's Offline entries take 32 (L4) to 2,048 (H100)."""
GPU_BATCH_FEATURES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A graph and the runtime that would run it."""

    runtime: str
    precision: str
    graph: Path
    """What the runtime loads: an ONNX file, a TensorRT plan or a torch program."""
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """Such as `openvino int8`."""
        return f"{self.runtime} {self.precision}"


def batch_size_for(
    spec: ModelSpec, device: Device, wanted: int | None, core: onnx.ModelProto
) -> int:
    """Rows per call: what the graph is bound to, or the wish, or what suits the device."""
    is_image = isinstance(spec.input, ImageInput)
    if device.kind == "gpu":
        default = GPU_BATCH_IMAGES if is_image else GPU_BATCH_FEATURES
    else:
        default = CPU_BATCH_IMAGES if is_image else CPU_BATCH_FEATURES
    return fixed_batch(core) or wanted or default


def onnx_candidates(
    core: onnx.ModelProto,
    spec: ModelSpec,
    *,
    runtimes: Sequence[str],
    precision: str,
    batch_size: int,
    folder: Path,
) -> list[Candidate]:
    """Wrap a graph of the model, write it to `folder`, and name it for each runtime.

    Args:
        core: The model's graph in this precision, without preprocessing and head.
        spec: The model's description.
        runtimes: Runtimes that load the ONNX file as it is.
        precision: `fp32`, `int8` or `mixed`.
        batch_size: Rows of every batch.
        folder: Gets `<precision>-<batch>.onnx`.
    """
    from engines.graph import input_spec, output_specs, wrap

    wrapped = wrap(core, spec, batch_size)
    path = folder / f"{precision}-{batch_size}.onnx"
    path.write_bytes(wrapped.SerializeToString())
    return [
        Candidate(
            runtime=runtime,
            precision=precision,
            graph=path,
            input=input_spec(spec, batch_size),
            outputs=output_specs(wrapped, spec),
        )
        for runtime in runtimes
    ]
