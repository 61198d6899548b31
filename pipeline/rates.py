"""What a past night measured: how fast a lane is, how much its shards differ, and what else costs.

A forecast (`simulate.py`) is made of these and of nothing else.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev

from pipeline.ledger import CommitRecord
from pipeline.report import RunReport

MIN_TIMED_SHARDS = 8
"""Of each lane. With fewer, what waits between the stages is much of the night: the times between
commits are then those of the queues, and not of the scoring."""
MIN_TELLING_SHARDS = 1_000
"""From so many shards on, a night's planning and publishing say what a shard costs there."""
PLAN_S, LOCAL_PUBLISH_S, OBJECT_PUBLISH_S = 0.00004, 0.0001, 0.007
"""Seconds a shard where a smaller night cannot tell, on a disk and on SeaweedFS, all measured in
benchmarks/2026-11-21-plan-scaling.md; publishing reads the ledger first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """One night in figures, on machines like that night's."""

    measured_rows: int
    measured_shards: int
    """Of the attempt that finished the night, from which all this is; others may have more."""
    rows_per_s: float
    """Of one lane between its first commit and its last: start-up is not in it. With fewer than
    `MIN_TIMED_SHARDS` it is that of all the scoring, which is too low for larger nights."""
    timed_shards: int
    """Whose times `rows_per_s` and `spread` are; 0: too few."""
    spread: float
    """Standard deviation of the shards' seconds a row, relative to their mean."""
    rows_per_shard: float
    lanes_per_machine: int
    usd_per_hour: float
    """Of one machine."""
    startup_s: float
    """Process start until planning begins."""
    warmup_s: float
    """Engine found until lanes are at their rate: opening, ceilings of a device, first blocks."""
    plan_s: float
    """Planning, without what grows with the shards."""
    plan_s_per_shard: float
    engine_s: float
    """Finding the engine, or building it when the night will have to."""
    publish_s: float
    """Checking and publishing, without what grows with the shards."""
    publish_s_per_shard: float


def most_telling(reports: Iterable[RunReport]) -> RunReport | None:
    """Of nights, the newest first: that with shards enough to be timed, or else with most rows.

    Only shards of the attempt that finished a night count; see `measure_rates`.
    """
    most: RunReport | None = None
    for report in reports:
        if _own_shards(report) >= (1 + MIN_TIMED_SHARDS) * report.num_lanes:
            return report
        if most is None or _own_rows(report) > _own_rows(most):
            most = report
    return most


def _own_shards(report: RunReport) -> int:
    return report.shards - report.shards_reused


def _own_rows(report: RunReport) -> float:
    return report.rows * _own_shards(report) / report.shards


def measure_rates(report: RunReport, records: Mapping[int, CommitRecord], build_s: float) -> Rates:
    """The rates of a published night.

    Args:
        report: Of the night.
        records: Its ledger. Only the shards of the attempt that finished it are used: the phases
            in the report are those of that attempt.
        build_s: What building the engine will add; 0 when it is stored.

    Raises:
        ValueError: The night scored nothing, so that there is nothing to measure.
    """
    if not records or report.phases.score_s <= 0:
        raise ValueError("a night without scored shards has no rates")
    last = max(records.values(), key=_committed_at)
    own = [record for record in records.values() if record.owner == last.owner]
    num_rows = sum(record.num_rows for record in own)
    num_lanes = max(1, report.num_lanes)
    rows_per_s, spread, timed_shards = num_rows / report.phases.score_s / num_lanes, 0.0, 0
    if len(own) >= (1 + MIN_TIMED_SHARDS) * num_lanes:
        rows_per_s, spread = _lane_rate(own, num_lanes)
        timed_shards = len(own) - num_lanes
    phases, is_object = report.phases, "://" in report.output
    plan_s, plan_s_per_shard = _split(phases.plan_s, report.shards, PLAN_S)
    usual_s = OBJECT_PUBLISH_S if is_object else LOCAL_PUBLISH_S
    publish_s, publish_s_per_shard = _split(phases.publish_s, report.shards, usual_s)
    return Rates(
        measured_rows=num_rows,
        measured_shards=len(own),
        rows_per_s=rows_per_s,
        spread=spread,
        timed_shards=timed_shards,
        rows_per_shard=report.rows / report.shards,
        lanes_per_machine=num_lanes,
        usd_per_hour=report.cost.price.usd_per_hour,
        startup_s=phases.startup_s,
        warmup_s=max(0.0, phases.score_s - num_rows / (rows_per_s * num_lanes)),
        plan_s=plan_s,
        plan_s_per_shard=plan_s_per_shard,
        engine_s=max(0.0, phases.engine_s - report.engine.build_s) + build_s,
        publish_s=publish_s,
        publish_s_per_shard=publish_s_per_shard,
    )


def _committed_at(record: CommitRecord) -> float:
    return datetime.datetime.fromisoformat(record.committed_at).timestamp()


def _lane_rate(records: list[CommitRecord], num_lanes: int) -> tuple[float, float]:
    """Rows a second of one lane, and the spread of its shards.

    In the order of their commits, about one shard of each lane lies between a commit and the one
    `num_lanes` later: that time is how long a lane takes for a shard.
    """
    ordered = sorted(records, key=_committed_at)
    times = [_committed_at(record) for record in ordered]
    later = range(num_lanes, len(ordered))
    num_rows = sum(ordered[i].num_rows for i in later)
    rate = num_rows / (times[-1] - times[num_lanes - 1]) / num_lanes
    s_per_row = [
        (times[i] - times[i - num_lanes])
        / sum(record.num_rows for record in ordered[i - num_lanes + 1 : i + 1])
        for i in later
    ]
    return rate, pstdev(s_per_row) / fmean(s_per_row)


def _split(seconds: float, num_shards: int, usual_s_per_shard: float) -> tuple[float, float]:
    """A phase's seconds as a fixed part, and a part for each shard."""
    if num_shards >= MIN_TELLING_SHARDS:
        return 0.0, seconds / num_shards
    return max(0.0, seconds - num_shards * usual_s_per_shard), usual_s_per_shard
