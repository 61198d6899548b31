"""What a benchmark compares: each way to run the model, and why it cannot be run here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engines.devices import Cpu, Device, Gpu
from engines.gpu_runtimes import tensorrt_problem, torch_problem
from engines.model import ModelSpec
from engines.torch_run import TorchMode

EAGER = "torch.inference_mode, eager, fp32, weights not folded"
PLAIN = "one batch after the other on torch's own threads, contiguous (NCHW)"
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
    """torch eager fp32 as most scripts run it: the base line."""
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
            how=how,
            mode=mode,
            is_base=mode.is_serial,
        )

    plain = TorchMode(is_compiled=False, is_channels_last=False, is_serial=True)
    yield torch("torch eager fp32", f"{EAGER}; {PLAIN}", plain)
    yield torch(
        "torch eager fp32 tuned",
        f"{EAGER}, channels last (NHWC); {WORKERS}",
        TorchMode(is_compiled=False),
    )
    yield torch(
        "torch compile fp32",
        "torch.inference_mode, torch.compile with freezing (weights folded), channels last; "
        f"{WORKERS}",
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
            how=f"strongly typed, built as the job says (`engine.tensorrt`); {slots}",
            problem=no_tensorrt,
        )
