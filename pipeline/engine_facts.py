"""What a report says of the engine: who it is, how true, and what else was tried."""

from __future__ import annotations

from typing import Any

from engines.build import ResolvedEngine
from engines.gate import Accuracy
from pipeline.report import EngineFacts, EngineRung


def engine_facts(resolved: ResolvedEngine, build_s: float) -> EngineFacts:
    """The engine that scores a run, for its report.

    Args:
        resolved: The engine.
        build_s: Seconds that this run spent building it.
    """
    manifest = resolved.engine.manifest
    accuracy = manifest.accuracy
    return EngineFacts(
        key=manifest.key,
        runtime=manifest.runtime,
        precision=manifest.precision,
        batch_size=manifest.batch_size,
        agreement=accuracy.agreement,
        min_agreement=manifest.gate.min_agreement,
        num_held_out=accuracy.num_rows,
        reason=manifest.reason,
        rungs=tuple(
            EngineRung(
                runtime=rung.runtime,
                precision=rung.precision,
                rows_per_s=rung.rows_per_s,
                passed=rung.passed,
                error=rung.error,
                failures=rung.failures,
                note=rung.note,
                float_layers=rung.float_layers,
                **_fidelity(rung.accuracy),
            )
            for rung in manifest.rungs
        ),
        built=resolved.built,
        build_s=build_s,
    )


def _fidelity(accuracy: Accuracy | None) -> dict[str, Any]:
    names = ("agreement", "cosine", "divergence", "metric_name", "metric", "reference_metric")
    return {name: getattr(accuracy, name, None) for name in names}
