"""A night with a Delta table, by the commands that a user has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltalake
import polars as pl
import pytest

from tests.scenarios.features_nights import DATE, NUM_BAD, NUM_ROWS, RESUMABLE

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]


def test_the_table_follows_the_date_through_a_failure_a_new_version_and_the_way_back(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    table = lake / "users"
    dated = (features_job, "--date", DATE, "--json", "--set", f"output.delta={table}")
    lake.write_text("a file where a folder should be")
    failed = score("run", *dated)
    assert failed.code == RESUMABLE, failed.err
    assert "The date is published" in failed.json["error"]
    assert (tmp_path / f"scores/users/dt={DATE}/_SUCCESS").exists()

    lake.unlink()
    mended = score("report", *dated)
    assert mended.code == 0, mended.err
    rows = pl.read_delta(str(table))
    assert rows["user_id"].n_unique() == rows.height == NUM_ROWS - NUM_BAD
    again = score("run", *dated)
    assert again.json["status"] == "already_published"
    assert score("run", *dated, "--force").code == 0
    assert score("rollback", *dated).code == 0
    assert pl.read_delta(str(table)).height == NUM_ROWS - NUM_BAD
    log = [entry for entry in deltalake.DeltaTable(table).history() if "nightscore.job" in entry]
    assert [entry["nightscore.version"] for entry in reversed(log)] == ["1", "2", "3"]
    assert log[0]["nightscore.run_id"] == mended.json["run_id"]
