"""A machine that simulated nights run on: one lane, a hundred rows a second."""

from __future__ import annotations

from pipeline.rates import Rates

RATES = Rates(
    measured_rows=51_000,
    measured_shards=51,
    rows_per_s=100.0,
    spread=0.3,
    timed_shards=50,
    rows_per_shard=1_000,
    lanes_per_machine=1,
    usd_per_hour=0.36,
    startup_s=2.0,
    warmup_s=3.0,
    plan_s=0.5,
    plan_s_per_shard=0.001,
    engine_s=0.25,
    publish_s=0.25,
    publish_s_per_shard=0.002,
)
