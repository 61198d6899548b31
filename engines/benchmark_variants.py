"""What a benchmark compares: each way to run the model here, and the files that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.candidates import Candidate, onnx_candidates
from engines.devices import Cpu, Device, Gpu
from engines.gpu_runtimes import tensorrt_problem, torch_problem
from engines.model import ImageInput, ModelSpec
from engines.runner import Array
from engines.torch_run import TorchMode

if TYPE_CHECKING:
    import onnx

    from engines.torch_program import TorchPrecision

EAGER = "torch.inference_mode, eager, fp32, weights not folded"
WORKERS = "one batch on each thread at a time, as many threads as all others have"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run the model."""

    name: str
    """Such as `openvino int8`; those on a GPU begin with `gpu`."""
    runtime: str
    precision: str
    device: Device | None
    """None: this machine has no such device."""
    how: str
    """Exactly how it is run, for whoever doubts the numbers."""
    mode: TorchMode | None = None
    is_base: bool = False
    """torch eager fp32: the fastest of these is the base line."""
    problem: str | None = None
    """Why it cannot run here."""


def all_variants(spec: ModelSpec, cpu: Cpu, gpu: Gpu | None, why_no_gpu: str) -> list[Variant]:
    """All variants, base lines first; those that cannot run here say why.

    Args:
        spec: The model.
        cpu: The CPU with the threads that each variant gets.
        gpu: The GPU, if there is one.
        why_no_gpu: Why there is none, as a clause.
    """
    variants = [*_on_cpu(cpu), *_on_gpu(gpu, why_no_gpu)]
    if spec.is_torch:
        return variants
    needs_torch = "the model is an ONNX file; torch needs module:callable"
    return [v if v.mode is None else _without(v, needs_torch) for v in variants]


def _without(variant: Variant, problem: str) -> Variant:
    return replace(variant, problem=problem)


def _on_cpu(cpu: Cpu) -> Iterator[Variant]:
    def torch(name: str, how: str, mode: TorchMode) -> Variant:
        return Variant(
            name=name,
            runtime="torch",
            precision="fp32",
            device=cpu,
            how=f"{how}; {WORKERS}",
            mode=mode,
            is_base=not mode.is_compiled,
        )

    yield torch("torch eager fp32", f"{EAGER}, channels last (NHWC)", TorchMode(is_compiled=False))
    yield torch(
        "torch eager fp32 nchw",
        f"{EAGER}, contiguous (NCHW)",
        TorchMode(is_compiled=False, is_channels_last=False),
    )
    yield torch(
        "torch compile fp32",
        "torch.inference_mode, torch.compile with freezing (weights folded), channels last",
        TorchMode(),
    )
    for precision in ("fp32", "int8"):
        yield Variant(
            name=f"onnxruntime {precision}",
            runtime="onnxruntime",
            precision=precision,
            device=cpu,
            how=f"CPUExecutionProvider, no spinning; {WORKERS}",
        )
        yield Variant(
            name=f"openvino {precision}",
            runtime="openvino",
            precision=precision,
            device=cpu,
            how="CPU plugin, THROUGHPUT, a stream for each thread, f32 hint, no pinning",
        )


def _on_gpu(gpu: Gpu | None, why_none: str) -> Iterator[Variant]:
    no_torch = why_none if gpu is None else torch_problem(gpu)
    no_tensorrt = why_none if gpu is None else tensorrt_problem(gpu)
    slots = "three batches in flight, pinned copies on streams of their own"
    for precision, is_compiled in (("fp32", 0), ("fp32", 1), ("fp16", 0), ("fp16", 1)):
        kind = "compile" if is_compiled else "eager"
        yield Variant(
            name=f"gpu torch {kind} {precision}",
            runtime="torch",
            precision=precision,
            device=gpu,
            how=f"torch.inference_mode, {kind}, channels last; {slots}",
            mode=TorchMode(device="cuda", is_compiled=bool(is_compiled)),
            is_base=precision == "fp32" and not is_compiled,
            problem=no_torch,
        )
    for precision in ("fp16", "int8"):
        yield Variant(
            name=f"gpu tensorrt {precision}",
            runtime="tensorrt",
            precision=precision,
            device=gpu,
            how=f"strongly typed, builder level 3; {slots}",
            problem=no_tensorrt,
        )


class VariantFiles:
    """Makes what the variants load; each graph and each file once.

    Args:
        spec: The model.
        calibration: Real rows that the int8 scales are taken from.
        folder: Gets the files.
        say: Told what takes long.
    """

    def __init__(
        self, spec: ModelSpec, calibration: Array, folder: Path, say: Callable[[str], None]
    ) -> None:
        self._spec = spec
        self._calibration = calibration
        self._folder = folder
        self._say = say
        self._graph = cache(self._make_graph)

    def fixed_batch(self) -> int | None:
        """The batch that the model's graph is bound to, or None."""
        from engines.export import fixed_batch

        return fixed_batch(self._graph("fp32"))

    def candidate(self, runtime: str, precision: str, batch_size: int) -> Candidate:
        """The file of a variant for one batch size.

        Raises:
            Exception: Whatever an exporter, the quantiser or a builder raises.
        """
        if runtime == "torch":
            return self._torch(precision, batch_size)
        kind = f"{runtime}-{precision}" if runtime == "tensorrt" else precision
        (candidate,) = onnx_candidates(
            self._graph(kind),
            self._spec,
            runtimes=[runtime],
            precision=precision,
            batch_size=batch_size,
            folder=self._subfolder(runtime),
        )
        return self._planned(candidate) if runtime == "tensorrt" else candidate

    def _subfolder(self, runtime: str) -> Path:
        folder = self._folder / runtime
        folder.mkdir(exist_ok=True)
        return folder

    def _torch(self, precision: str, batch_size: int) -> Candidate:
        from engines.graph import input_spec
        from engines.torch_program import save_program

        path = self._subfolder("torch") / f"{precision}-{batch_size}.pt2"
        kind: TorchPrecision = "fp16" if precision == "fp16" else "fp32"
        return Candidate(
            runtime="torch",
            precision=precision,
            graph=path,
            input=input_spec(self._spec, batch_size),
            outputs=save_program(self._spec, batch_size, path, kind),
        )

    def _planned(self, candidate: Candidate) -> Candidate:
        from engines.tensorrt_build import BuilderSettings, build_plan

        graph = candidate.graph.read_bytes()
        built = build_plan(graph, BuilderSettings(), timing_cache=None, say=self._say)
        plan = candidate.graph.with_suffix(".plan")
        plan.write_bytes(built.plan)
        return replace(candidate, graph=plan)

    def _make_graph(self, kind: str) -> onnx.ModelProto:
        """`fp32`, `int8`, `tensorrt-fp16` or `tensorrt-int8`."""
        from engines.export import load_core
        from engines.half import to_half

        if kind == "fp32":
            self._say(f"exporting {self._spec.source}")
            return load_core(self._spec)
        core = self._graph("fp32")
        if kind == "tensorrt-fp16":
            return to_half(core)
        self._say(f"calibrating int8 with {len(self._calibration):,} rows")
        return self._quantized(core, "tensorrt" if kind == "tensorrt-int8" else "cpu")

    def _quantized(self, core: onnx.ModelProto, placement: str) -> onnx.ModelProto:
        from engines.bias_correction import correct_biases
        from engines.calibrate import calibrate
        from engines.quantize import quantize

        corrected = correct_biases(core, self._feeds(core))
        table = calibrate(corrected, lambda: self._feeds(core), "max")
        return quantize(corrected, table, "tensorrt" if placement == "tensorrt" else "cpu")

    def _feeds(self, core: onnx.ModelProto) -> Iterator[dict[str, Array]]:
        num_rows = self.fixed_batch() or 32
        constants = {tensor.name for tensor in core.graph.initializer}
        name = next(entry.name for entry in core.graph.input if entry.name not in constants)
        for start in range(0, len(self._calibration), num_rows):
            rows = self._calibration.take(range(start, start + num_rows), axis=0, mode="wrap")
            if isinstance(self._spec.input, ImageInput):
                image = self._spec.input
                mean, std = np.array(image.mean, np.float32), np.array(image.std, np.float32)
                rows = ((rows.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
            yield {name: np.ascontiguousarray(rows)}
