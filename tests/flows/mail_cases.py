"""A night worth a mail, the nights before it, and a job that sends mail."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from pipeline.config import Job
from pipeline.cost import cost_of
from pipeline.history import HistoryRow, row_of
from pipeline.report import (
    Alert,
    Ceilings,
    DeviceUse,
    Drift,
    Limit,
    Phases,
    Price,
    QuarantineSample,
    RunReport,
    ScoreDistribution,
    StageTimes,
)
from pipeline.report_engine import EngineFacts

DATE = "2026-11-20"
PRICE = Price(
    instance="g6.xlarge",
    market="spot",
    usd_per_hour=0.3517,
    source="https://aws.amazon.com/ec2/spot/pricing/ (AWS, us-east-1)",
    as_of="2026-11-01",
)
REPORT = RunReport(
    run_id="2026-11-20-7d1f03c94be1a2f0",
    job="users",
    date=DATE,
    status="published",
    rows=40_000,
    scored=39_992,
    quarantined=8,
    quarantined_by_reason={"null_feature": 5, "row_group_damaged": 2, "not_finite": 1},
    quarantine_samples=(
        QuarantineSample(
            file="dt=2026-11-20/part-00000.parquet",
            row=250,
            reason="null_feature",
            message="f17 is null; expected a number, or `fill_missing`",
        ),
        QuarantineSample(
            file="dt=2026-11-20/part-00003.parquet",
            row=9_750,
            reason="not_finite",
            message="f3 is inf; expected a finite number",
        ),
        QuarantineSample(
            file="dt=2026-11-20/part-00003.parquet",
            row=12_000,
            num_rows=2,
            reason="row_group_damaged",
            message="page checksum does not agree",
        ),
    ),
    shards=40,
    shards_reused=12,
    attempts=2,
    examples_per_sec=40_000 / 42.7,
    wall_s=42.7,
    phases=Phases(startup_s=1.1, plan_s=0.12, engine_s=13.4, score_s=27.6, publish_s=0.48),
    usd_per_100k=cost_of(
        PRICE, wall_s=42.7, score_s=27.6, build_s=11.4, rows=40_000, replay_s=1.1
    ).usd_per_100k,
    cost=cost_of(PRICE, wall_s=42.7, score_s=27.6, build_s=11.4, rows=40_000, replay_s=1.1),
    engine=EngineFacts(
        key="ranking-4f1c9e2ab83d7705",
        runtime="tensorrt",
        precision="int8",
        batch_size=4096,
        agreement=0.9921875,
        min_agreement=0.97,
        num_held_out=512,
        reason="fastest candidate that passed the gate: 1.9 times fp32",
        rungs=(),
        built=True,
        build_s=11.4,
    ),
    stages={
        "read": StageTimes(busy_s=3.1, wait_s=24.2, items=40_000),
        "decode": StageTimes(busy_s=21.3, wait_s=4.2, items=40_000),
        "infer": StageTimes(busy_s=13.4, wait_s=14.1, items=39_992),
        "write": StageTimes(busy_s=0.9, wait_s=26.3, items=40_000),
    },
    ceilings=Ceilings(
        decode_per_sec=1_742.0, engine_per_sec=3_183.4, engine_with_copies_per_sec=2_920.0
    ),
    limit=Limit(
        per_sec=1_742.0,
        rate_per_sec=1_449.0,
        reached=0.832,
        bound_by="decode",
        gap_usd=0.0007,
        gap_usd_per_100k=0.00175,
    ),
    bottleneck="decode",
    device="NVIDIA L4, 1 lane of 4 threads",
    started_at="2026-11-21T02:00:00.123456+00:00",
    finished_at="2026-11-21T02:00:42.823456+00:00",
    output="s3://lake/scores/users/dt=2026-11-20",
    manifest="s3://lake/scores/users/dt=2026-11-20/_MANIFEST.json",
    devices=(
        DeviceUse(
            name="NVIDIA L4",
            kind="gpu",
            num_samples=27,
            duration_s=27.6,
            utilisation_mean=0.62,
            utilisation_max=0.98,
            memory_peak_bytes=3 * 2**30,
            power_mean_w=51.2,
            energy_j=1_413.0,
        ),
    ),
    joules_per_1000_rows=35.3,
    interruptions=1,
    rows_replayed=1_024,
    replay_s=1.1,
    scoring_s=27.6,
    building_s=11.4,
    drift=Drift(rows=32, agreement=0.9961, mean_abs_diff=0.0021),
    distribution=ScoreDistribution(
        counts="",
        num_values=39_992,
        model="9c1e77ab01d2",
        head="scores",
        nights=("2026-11-19", "2026-11-18", "2026-11-17"),
        psi={"scores": 0.131},
        chance={"scores": 0.01},
    ),
    alerts=(
        Alert(
            name="cost",
            text="$0.0104 per 100,000 rows, 34% above the median of the last seven nights; "
            "expected at most 25% (alerts.max_cost_rise).",
        ),
    ),
)


def nights(num_nights: int = 14) -> tuple[HistoryRow, ...]:
    """The night, and those before it: slower on Sundays, once with another engine."""
    tonight = row_of(REPORT, version=1, published_at="2026-11-21T02:00:43+00:00")
    today = datetime.date.fromisoformat(DATE)
    rows = [tonight]
    for back in range(1, num_nights):
        date = today - datetime.timedelta(days=back)
        rate = 1_000 + 90 * (date.day % 5) - (300 if date.weekday() == 6 else 0)
        rows.append(
            dataclasses.replace(
                tonight,
                date=date.isoformat(),
                run_id=f"{date.isoformat()}-0000",
                rows=39_000 + 100 * back,
                quarantined=back % 4,
                examples_per_sec=float(rate),
                usd_per_100k=PRICE.usd_per_hour / 3600 * 100_000 / rate,
                engine_key="ranking-0b7d11c2e5a94f3e",
                precision="fp16",
                usd_per_hour=0.3301,
            )
        )
    return tuple(reversed(rows))


def mail_section(**changes: Any) -> dict[str, Any]:
    """Of a job file."""
    section = {"to": ["me@example.com"], "from": "score@example.com", "host": "mail.example.com"}
    return {**section, **changes}


def mail_job(folder: Path, **mail: Any) -> Job:
    """A job whose output is below the folder; nothing of it can be scored."""
    return Job.model_validate(
        {
            "name": "users",
            "input": {
                "uri": str(folder / "in"),
                "passthrough": ["user_id"],
                "features": {"columns": ["f*"]},
            },
            "model": {"source": "model.onnx", "head": "scores"},
            "output": {"uri": str(folder / "out")},
            "cost": {"instance": "c6i.large"},
            "mail": mail_section(**mail),
        }
    )
