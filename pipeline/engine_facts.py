"""What the report says of a run's engines."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engines.build import ResolvedEngine
from engines.errors import EngineError
from engines.gate import Accuracy
from pipeline.engine import open_store
from pipeline.report_engine import EngineFacts, EngineRows, EngineRung

if TYPE_CHECKING:
    from pipeline.ledger import CommitRecord
    from pipeline.run import PreparedRun

log = logging.getLogger(__name__)


def engine_of(record: CommitRecord, run: PreparedRun) -> str:
    """Key of the engine that scored a shard; before records said so, a run had only one."""
    return record.engine or run.resolved.engine.key


def engines_of(
    run: PreparedRun, records: Mapping[int, CommitRecord]
) -> tuple[EngineFacts, tuple[EngineRows, ...]]:
    """The engine that scored most rows of a run, and how many each of them did, most first.

    Those of earlier attempts, and of the version before, are looked up in the engine store.
    """
    rows: Counter[str] = Counter()
    for record in records.values():
        rows[engine_of(record, run)] += record.num_rows
    found = {key: run.engines.get(key) or _stored(run, key) for key in rows}
    shares = tuple(
        EngineRows(
            key=key, device=each.engine.manifest.device.name if each else None, rows=num_rows
        )
        for key, num_rows in rows.most_common()
        for each in (found[key],)
    )
    known = [each for share in shares if (each := found[share.key])]
    first = known[0] if known else run.resolved
    return engine_facts(first, run.pin.common), shares


def _stored(run: PreparedRun, key: str) -> ResolvedEngine | None:
    try:
        return ResolvedEngine(engine=open_store(run.job).get(key), built=False, build_s=0.0)
    except (EngineError, OSError) as error:
        log.warning("the report does not tell its device: %s", error)
        return None


def engine_facts(resolved: ResolvedEngine, common: str) -> EngineFacts:
    """The engine of a run, and what each rung of its ladder gave.

    Args:
        resolved: The engine.
        common: What it has in common with others of the run.
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
        build_s=resolved.build_s if resolved.built else 0.0,
        common=common,
    )


def _fidelity(accuracy: Accuracy | None) -> dict[str, Any]:
    names = ("agreement", "cosine", "divergence", "metric_name", "metric", "reference_metric")
    return {name: getattr(accuracy, name, None) for name in names}
