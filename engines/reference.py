"""The fp32 graph that an engine was judged against, kept beside it: to judge its answers again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from engines.errors import EngineError
from engines.gate import Answers, run_rows
from engines.lone_rows import run_apart, with_gaps
from engines.manifest import REFERENCE, StoredEngine
from engines.model import shown
from engines.onnxrt import OnnxrtRunner
from engines.runner import Array, TensorSpec


def has_reference(engine: StoredEngine) -> bool:
    """Whether the graph is kept; engines of older versions of this program have none."""
    return REFERENCE in engine.manifest.attachments


def fp32_answers(engine: StoredEngine, rows: Array) -> Answers:
    """What fp32 answers to rows of an engine's input: on the CPU, one batch on each core.

    Args:
        engine: Fetched, and `has_reference`.
        rows: Any number of rows in the engine's input dtype.

    Returns:
        The engine's outputs by name; NaN for a row that the graph cannot be run with.

    Raises:
        EngineError: The graph is not what was stored, or ONNX Runtime cannot run it here with any
            row.
    """
    manifest, graph = engine.manifest, engine.attachment(REFERENCE)
    engine.check_file(graph.name, manifest.attachments[REFERENCE])

    def batched(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=(manifest.reference_batch, *spec.shape[1:]))

    runner = OnnxrtRunner(
        graph,
        batched(manifest.input),
        tuple(map(batched, manifest.outputs)),
        manifest.device.num_threads,
    )
    try:
        with runner:
            return with_gaps(*run_apart(partial(run_rows, runner), rows))
    except Exception as error:  # the runtime may raise anything
        raise EngineError(
            f"engine {engine.key[:12]}: {REFERENCE}: {shown(error)}; expected fp32 to run on the "
            "CPU. Build the engine again with `score engine build --force`."
        ) from error
