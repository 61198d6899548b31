"""Nights of the features demo that a measurement runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "configs" / "demo-features.yaml"
DATE = "2026-11-01"


def report_of(
    score: Sequence[str],
    sets: Mapping[str, object],
    environment: Mapping[str, str],
    *more: str,
    cwd: Path | None = None,
) -> dict[str, Any]:
    """Run `score run` on the CPU; its report. Ends the measurement if it fails.

    Args:
        score: The command.
        sets: Settings of the job besides.
        environment: Variables besides ours.
        more: Options of `score run` besides.
        cwd: Where it runs.
    """
    own = {"limits.max_quarantined": 1.0, "lanes.device": "cpu"}
    values = [f"{key}={value}" for key, value in {**sets, **own}.items()]
    options = [part for value in values for part in ("--set", value)]
    ended = subprocess.run(
        [*score, "run", str(CONFIG), "--date", DATE, "--json", *more, *options],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        sys.exit(ended.stderr)
    report: dict[str, Any] = json.loads(ended.stdout)
    return report
