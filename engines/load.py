"""Open an engine for scoring: checked by hash before use, and by a probe batch after loading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from engines.devices import Device, Gpu
from engines.errors import EngineCorruptError, EngineError
from engines.manifest import StoredEngine
from engines.runner import (
    LOGITS,
    Array,
    DeviceRows,
    HostRunner,
    Outputs,
    Runner,
    TensorSpec,
    check_answers,
)

PROBE_SEED = 20261120
PROBE_TOLERANCE = 0.02
"""Of the largest probability or score: more than kernels differ from call to call, much less than
other weights do."""

SMALLEST_SCALE = 1e-6
"""Scores that are all smaller count as zero."""


def make_runner(
    runtime: str,
    graph: Path,
    input: TensorSpec,
    outputs: tuple[TensorSpec, ...],
    device: Device,
) -> Runner:
    """The runner of a runtime for a graph; nothing is loaded yet."""
    if runtime == "openvino":
        from engines.ovino import OpenVinoRunner

        return OpenVinoRunner(graph, input, outputs, device.num_threads)
    if runtime == "torch":
        from engines.torch_run import TorchMode, TorchRunner

        # TF32 has no more digits than fp16: fp32 is for rows that need them.
        mode = TorchMode(device="cuda" if device.kind == "gpu" else "cpu", allows_tf32=False)
        return TorchRunner(graph, input, outputs, device.num_threads, mode)
    if runtime == "tensorrt" and isinstance(device, Gpu):
        from engines.tensorrt_run import TensorRtRunner

        return TensorRtRunner(graph, input, outputs, device)
    if runtime != "onnxruntime":
        raise EngineError(
            f"runtime {runtime}: not known on a {device.kind}; expected openvino, onnxruntime or "
            "torch, or tensorrt on a gpu."
        )
    from engines.onnxrt import OnnxrtRunner

    return OnnxrtRunner(graph, input, outputs, device.num_threads)


def probe_batch(spec: TensorSpec) -> Array:
    """A seeded batch: noise over pixels, or features from 0 to below 1.

    Models take such features whatever they do with them: as an index they are 0, which every table
    has, and they have a logarithm.
    """
    rng = np.random.default_rng(PROBE_SEED)
    if spec.dtype == "uint8":
        return rng.integers(0, 256, spec.shape, dtype=np.uint8)
    return rng.random(spec.shape, dtype=np.float32)


def probe_answer(runner: Runner) -> tuple[float, ...]:
    """The first column of probability or score for the probe batch.

    Raises:
        ModelError: The engine has not one answer for each row of it.
    """
    (outputs,) = runner.infer([probe_batch(runner.input)])
    check_answers(outputs, runner.outputs)
    by_name = {spec.name: array for spec, array in zip(runner.outputs, outputs, strict=True)}
    by_name.pop(LOGITS, None)
    return tuple(map(float, list(by_name.values())[-1][:, 0]))


def probes_agree(expected: Sequence[float], found: Sequence[float]) -> bool:
    """Whether two answers to the probe batch may come from the same engine."""
    # Noise may lie outside of what a model takes (log of a negative feature): NaN equals NaN.
    finite = np.abs([value for value in expected if np.isfinite(value)])
    tolerance = PROBE_TOLERANCE * finite.max(initial=SMALLEST_SCALE)
    return len(expected) == len(found) and np.allclose(
        expected, found, rtol=0, atol=tolerance, equal_nan=True
    )


def open_runner(engine: StoredEngine, num_threads: int | None = None) -> Runner:
    """A runner for a stored engine; the checks are made when it is entered.

    Args:
        engine: What is run.
        num_threads: Batches that a CPU may compute at once; None: as when the engine was built.
            Each is computed by one thread all the same: answers do not depend on it.
    """
    return CheckedRunner(engine, num_threads or engine.manifest.device.num_threads)


class CheckedRunner:
    """Runs a stored engine, unless it is not what was published."""

    def __init__(self, engine: StoredEngine, num_threads: int) -> None:
        manifest = engine.manifest
        self.batch_size = manifest.batch_size
        self.input = manifest.input
        self.outputs = manifest.outputs
        self._engine = engine
        self._runner = make_runner(
            manifest.runtime,
            engine.artifact,
            manifest.input,
            manifest.outputs,
            replace(manifest.device, num_threads=num_threads),
        )

    def __enter__(self) -> CheckedRunner:
        self._engine.check()
        expected = self._engine.manifest.probe
        with ExitStack() as undo:
            undo.enter_context(self._runner)
            found = probe_answer(self._runner)
            self._compare(expected, found)
            undo.pop_all()
        return self

    def _compare(self, expected: tuple[float, ...], found: tuple[float, ...]) -> None:
        if not probes_agree(expected, found):
            raise EngineCorruptError(
                f"engine {self._engine.key[:12]}: its probe batch gives {found[:3]}; expected "
                f"{expected[:3]}. Build it again with `score engine build --force`."
            )

    def __exit__(self, *error: object) -> None:
        self._runner.__exit__(*error)

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        """See `engines.runner.Runner.infer`."""
        return self._runner.infer(batches)

    def run(self, batch: Array) -> Outputs:
        """See `engines.runner.HostRunner.run`; engines of a CPU only."""
        return cast("HostRunner", self._runner).run(batch)
