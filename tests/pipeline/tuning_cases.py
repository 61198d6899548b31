"""A tuning as `score tune` writes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.tuning import LaneSettings, Tuning


def a_tuning(**changes: Any) -> Tuning:
    tuning = Tuning(
        key="k",
        job="users",
        device="A processor",
        num_threads=2,
        settings=LaneSettings(queue_depth=4, hardware_decoder_load=0.8),
        rows_per_s_default=1_000.0,
        rows_per_s_tuned=1_250.0,
        confirmed=True,
        num_rows=512,
        num_trials=42,
        budget_s=300.0,
        took_s=281.0,
        versions={"openvino": "2026.4.1"},
        host="h",
        tuned_at="2026-11-20T03:04:05+00:00",
    )
    return dataclasses.replace(tuning, **changes)
