"""The last look before publication: all guards on a run whose shards are all committed.

Nothing of it is needed to begin a night: it is imported while the lanes score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.onnxrt import import_onnxruntime
from pipeline.drift import measure_drift, num_drift_rows, worst
from pipeline.drift_sample import CommittedParts, DriftSampler, Sampled
from pipeline.engine_facts import engine_of
from pipeline.guards import lost_files
from pipeline.last_nights import compare_with, last_nights, scores_of_night
from pipeline.ledger import CommitRecord
from pipeline.plan import Shard
from pipeline.report import Drift, ScoreDistribution, report_from_dict

if TYPE_CHECKING:
    from pipeline.blocks import Decoder
    from pipeline.run import PreparedRun


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What the guards found before publication, for the report."""

    drift: Drift | None
    distribution: ScoreDistribution | None


def import_judges(run: PreparedRun) -> None:
    """Import what `check_before_publication` will decode and compute with."""
    resolved = run.resolved
    if num_drift_rows(run.job, run.plan.num_rows) and not resolved.built:
        _decoder(run)
        import_onnxruntime()


def check_before_publication(
    run: PreparedRun, records: Mapping[int, CommitRecord], reasons: Mapping[str, int]
) -> Findings:
    """Let all guards look at a run whose shards are all committed.

    Raises:
        GuardError: One of them is not content.
        VerifyError: A part is not what was committed.
    """
    run.guards.check_quarantine(run.job, run.plan.num_rows, reasons, lost_files(run.plan))
    distribution = _distribution(run, records)
    if distribution is not None:
        run.guards.check_scores(run.job, distribution)
    drifts = _drifts(run, records)
    limit = run.resolved.engine.manifest.gate.min_agreement
    for engine, drift in drifts.items():
        run.guards.check_drift(run.job.model.head, limit, drift, engine)
    return Findings(drift=worst(drifts.values()), distribution=distribution)


def _distribution(
    run: PreparedRun, records: Mapping[int, CommitRecord]
) -> ScoreDistribution | None:
    before = report_from_dict(run.replaces.manifest["report"]) if run.replaces else None
    found = scores_of_night(records.values(), before.distribution if before else None)
    if found is None:
        return None
    job, model = run.job, run.resolved.engine.manifest.model_fingerprint
    past = last_nights(run.output, job.name, run.plan.date, model, job.model.head)
    return compare_with(past, found, model, job.model.head)


def _drifts(run: PreparedRun, records: Mapping[int, CommitRecord]) -> dict[str, Drift]:
    """By the key of each engine that scored rows: a few rows of one may not hide in all others."""
    if not num_drift_rows(run.job, run.plan.num_rows):
        return {}
    shards: dict[str, list[Shard]] = {}
    for shard in run.plan.shards:
        shards.setdefault(engine_of(records[shard.index], run), []).append(shard)
    return {engine: _drift(run, records, engine, tuple(of)) for engine, of in shards.items()}


def _drift(
    run: PreparedRun, records: Mapping[int, CommitRecord], engine: str, shards: tuple[Shard, ...]
) -> Drift:
    resolved = run.engines.get(engine)
    if resolved is not None and resolved.built:
        return Drift(rows=0, note="the engine was built in this run, from rows of this night")
    num_rows = num_drift_rows(run.job, sum(shard.num_rows for shard in shards))

    def sample() -> Sampled | None:
        plan = dataclasses.replace(run.plan, shards=shards)
        parts = CommittedParts(run.ledger, run.output, records, run.job.model.head)
        sampler = DriftSampler(plan, run.source, parts, _decoder(run), run.ledger.run_id)
        return sampler.sample(num_rows)

    # All engines of a run have one model, and so the same graph in fp32.
    return measure_drift(run.resolved.engine, sample)


def _decoder(run: PreparedRun) -> Decoder:
    """Always the window decoder for images: DALI takes a second to import."""
    job, plan = run.job, run.plan
    if job.input.images is not None:
        from pipeline.decode_windows import WindowDecoder

        return WindowDecoder(job.input.images, job.model.size)
    from pipeline.decode_features import FeatureDecoder

    assert job.input.features is not None
    return FeatureDecoder(job.input.features, plan.feature_columns, plan.num_features)
