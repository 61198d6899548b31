"""A report to render."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.cost import cost_of
from pipeline.report import (
    Ceilings,
    DeviceUse,
    Phases,
    Price,
    QuarantineSample,
    RunReport,
    StageTimes,
)
from pipeline.report_engine import EngineFacts, EngineRung

PRICE = Price(
    instance="c6i.large",
    market="on_demand",
    usd_per_hour=0.085,
    source="https://aws.amazon.com/ec2/pricing/ (AWS, us-east-1)",
    as_of="2025-07-01",
)
ENGINE = EngineFacts(
    key="efficientnet-lite0-4f1c9e2ab83d7705",
    runtime="openvino",
    precision="int8",
    batch_size=8,
    agreement=0.9921875,
    min_agreement=0.97,
    num_held_out=512,
    reason="fastest candidate that passed the gate: 1.9 times fp32",
    rungs=(
        EngineRung(
            runtime="openvino",
            precision="int8",
            rows_per_s=1183.4,
            agreement=0.9921875,
            passed=True,
            error=None,
        ),
        EngineRung(
            runtime="onnxruntime",
            precision="int8",
            rows_per_s=702.18,
            agreement=0.962,
            passed=False,
            error=None,
        ),
        EngineRung(
            runtime="openvino",
            precision="fp32",
            rows_per_s=611.9,
            agreement=1.0,
            passed=True,
            error=None,
        ),
        EngineRung(
            runtime="onnxruntime",
            precision="fp32",
            rows_per_s=0.0,
            agreement=None,
            passed=False,
            error="out of memory while loading",
        ),
    ),
    built=True,
    build_s=31.4,
)
REPORT = RunReport(
    run_id="demo-2026-11-20-7d1f03c9",
    job="demo",
    date="2026-11-20",
    status="published",
    rows=4_000,
    scored=3_992,
    quarantined=8,
    quarantined_by_reason={"truncated": 2, "format_not_accepted": 3, "null": 1, "corrupt": 2},
    quarantine_samples=(
        QuarantineSample(
            file="pictures-0.parquet",
            row=250,
            reason="truncated",
            message="Premature end of JPEG data. Stopped at line 238/369",
        ),
        QuarantineSample(
            file="pictures-1.parquet",
            row=750,
            reason="format_not_accepted",
            message="starts with b'<!DOCTYPE html>'; expected JPEG or PNG",
        ),
    ),
    shards=32,
    shards_reused=0,
    attempts=1,
    examples_per_sec=4_000 / 42.7,
    wall_s=42.7,
    phases=Phases(startup_s=3.1, plan_s=0.12, engine_s=31.4, score_s=7.6, publish_s=0.48),
    usd_per_100k=0.0252,
    cost=cost_of(PRICE, wall_s=42.7, score_s=7.6, build_s=31.4, rows=4_000),
    engine=ENGINE,
    stages={
        "read": StageTimes(busy_s=0.31, wait_s=7.2, items=4_000),
        "decode": StageTimes(busy_s=7.31, wait_s=0.22, items=4_000),
        "infer": StageTimes(busy_s=3.42, wait_s=4.1, items=3_992),
        "write": StageTimes(busy_s=0.22, wait_s=7.3, items=4_000),
    },
    ceilings=Ceilings(
        decode_per_sec=742.0, engine_per_sec=1183.4, engine_with_copies_per_sec=1120.0
    ),
    bottleneck="decode",
    device="Intel Xeon Platinum 8375C, 1 lane of 2 threads",
    started_at="2026-11-21T02:00:00Z",
    finished_at="2026-11-21T02:00:43Z",
    output="s3://lake/scores/demo/dt=2026-11-20",
    manifest="s3://lake/scores/demo/dt=2026-11-20/_MANIFEST.json",
    devices=(
        DeviceUse(
            name="Intel Xeon Platinum 8375C",
            kind="cpu",
            num_samples=9,
            duration_s=7.6,
            utilisation_mean=0.981,
            utilisation_max=1.0,
            cpu_s=14.2,
        ),
    ),
)


@pytest.fixture
def a_report() -> Callable[..., RunReport]:
    """Builds a report of an ordinary night; keyword arguments replace its fields."""

    def build(**changes: Any) -> RunReport:
        return dataclasses.replace(REPORT, **changes)

    return build
