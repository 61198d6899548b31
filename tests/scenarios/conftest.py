"""What several scenarios share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.storage_nights import NUM_SHARDS, night, scores_on_disk


@pytest.fixture(scope="session")
def kept() -> dict[str, dict[int, float]]:
    return {}


@pytest.fixture
def undisturbed_scores(
    score: Callable[..., Any],
    features_job: Path,
    kept: dict[str, dict[int, float]],
    tmp_path: Path,
) -> dict[int, float]:
    """Of a night of the features job that nobody disturbed, by user; made once, on a disk."""
    if not kept:
        ended = score(*night(features_job, tmp_path / "undisturbed"))
        assert ended.code == 0, ended.err
        assert ended.json["shards"] == NUM_SHARDS
        kept["scores"] = scores_on_disk(tmp_path / "undisturbed")
    return kept["scores"]
