"""What several scenarios share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.features_nights import NUM_SMALL_SHARDS, SMALL_SHARDS, night, scores_in


@pytest.fixture(scope="session")
def quiet_nights() -> dict[str, Path]:
    return {}


@pytest.fixture
def undisturbed(
    score: Callable[..., Any],
    features_job: Path,
    quiet_nights: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Output of a night of the features job that nobody disturbed; made once, on a disk."""
    if "output" not in quiet_nights:
        output = tmp_path_factory.mktemp("undisturbed")
        ended = score(*night(features_job, output, *SMALL_SHARDS))
        assert ended.code == 0, ended.err
        assert ended.json["shards"] == NUM_SMALL_SHARDS
        quiet_nights["output"] = output
    return quiet_nights["output"]


@pytest.fixture
def undisturbed_scores(undisturbed: Path) -> dict[int, float]:
    """Those of `undisturbed`, by user."""
    return scores_in(undisturbed)
