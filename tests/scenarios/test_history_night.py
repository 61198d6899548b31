"""The history follows what is published, by the commands that a user has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.scenarios.features_nights import DATE, SHARDS, night

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]


def test_versions_and_repairs_of_a_night_are_in_its_history(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    dated = ("--date", DATE)

    def command(name: str, *more: str) -> dict[str, Any]:
        ended = score(name, features_job, *more, "--json", "--set", f"output.uri={output}")
        assert ended.code == 0, ended.err
        result: dict[str, Any] = ended.json
        return result

    first = score(*night(features_job, output, *SHARDS)).json
    (file,) = (output / "users/_history").iterdir()
    file.unlink()  # as if the store had refused it
    assert command("report", *dated)["run_id"] == first["run_id"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    forced = command("run", *dated, "--force", *SHARDS)
    assert command("rollback", *dated)["version"] == 3
    whole = pl.read_parquet(f"{output}/users/_history/*.parquet").sort("version")
    assert whole["run_id"].to_list() == [first["run_id"], forced["run_id"], first["run_id"]]
    assert whole["rows"].to_list() == [first["rows"]] * 3
    (now,) = command("report", "--last", "5")["nights"]
    assert (now["version"], now["run_id"]) == (3, first["run_id"])
    assert 0 < now["scoring_s"] < now["wall_s"] == first["wall_s"]
    page = (output / f"users/dt={DATE}/_report.html").read_text()
    assert "<svg" in page, "where its scores lie"
