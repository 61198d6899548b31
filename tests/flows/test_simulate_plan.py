"""`score plan --simulate`: what it says, what it refuses, and that a real night bears it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.demo_data import write_users
from flows.planning.simulate import no_night, parse_counts, past_reports, telling_night
from pipeline.errors import ConfigError
from pipeline.local_storage import LocalStorage
from pipeline.report import RunReport
from tests.flows.mail_cases import REPORT

SHARD_ROWS = 1_000
SMALL, LARGE = ("2026-11-20", 40_000), ("2026-11-22", 240_000)


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """Two nights in shards of `SHARD_ROWS`: enough of them to measure a rate."""
    folder = tmp_path / "users"
    for date, num_rows in (SMALL, LARGE):
        write_users(folder, date, num_rows=num_rows)
    for file in folder.glob("*/*.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=SHARD_ROWS)
    return folder


@pytest.mark.timeout(300)
def test_the_first_night_forecasts_a_larger_one(
    score: Callable[..., Any], features_job: Path, users: Path
) -> None:
    sets = ("--set", f"input.uri={users}", "--set", f"lanes.shard_rows={SHARD_ROWS}")

    def command(name: str, date: str, *more: str) -> Any:
        ended = score(name, features_job, "--date", date, *more, *sets)
        assert ended.code == 0, ended.err
        return ended

    first = command("run", SMALL[0], "--json").json
    asked = ("--simulate", "--lanes", "1", "--lanes", "4", "--rows", str(LARGE[1]), "--rows=1e10")
    found = command("plan", LARGE[0], *asked, "--json").json
    simulation = found["simulation"]
    assert found["rows"] == LARGE[1], "the plan itself is there too"
    assert simulation["from"]["run_id"] == first["run_id"]
    assert simulation["engine_cached"]
    assert 0 < simulation["rows_at_risk"] < SMALL[1]
    assert simulation["rates"]["timed_shards"] == SMALL[1] // SHARD_ROWS - 1
    lines = {(line["rows"], line["lanes"]): line for line in simulation["forecasts"]}
    one, four = lines[LARGE[1], 1], lines[LARGE[1], 4]
    assert (one["fits"], one["is_fewest"]) == (True, True)
    assert four["wall_s"] < one["wall_s"]
    assert four["machines"] == 4
    assert lines[10**10, 1]["hours"] > 4 > lines[LARGE[1], 1]["hours"]
    assert simulation["price"] == found["price"]
    assert (simulation["from"]["rows"], simulation["from"]["shards"]) == (SMALL[1], 40)
    dear = command("plan", LARGE[0], *asked, "--set", "cost.usd_per_hour=3.4", "--json").json
    ratio = dear["simulation"]["forecasts"][0]["usd"] / simulation["forecasts"][0]["usd"]
    usual = simulation["from"]["price"]["usd_per_hour"]
    assert ratio == pytest.approx(3.4 / usual), "the price of the job, not of that night"
    assert dear["simulation"]["from"]["price"]["usd_per_hour"] == usual

    text = command("plan", LARGE[0], *asked).out
    assert f"Rates: run {first['run_id']}" in " ".join(text.split())
    assert "within 4 h?" in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("10,000,000,000 ") >= 2, "large numbers are not cut off"

    _check_fleet(command, first)

    second = command("run", LARGE[0], "--json").json
    # Generous, as other processes share the cores of whoever runs the tests.
    assert second["wall_s"] / 3 < one["wall_s"] < second["wall_s"] * 3
    assert second["phases"]["score_s"] / 4 < one["score_s"] < second["phases"]["score_s"] * 4


def _check_fleet(command: Callable[..., Any], first: Any) -> None:
    """The same night's rate on its own machine, and another machine's that is given."""
    asked = ("--fleet", "--rows", "1e8", "--rows", "1e11", "--rate", "g6.xlarge=4e6")
    fleet = command("plan", LARGE[0], *asked, "--seeds", "3", "--json").json["fleet"]
    assert fleet["from"]["run_id"] == first["run_id"]
    assert set(fleet["instances"]) == {"c6i.large", "g6.xlarge"}
    small, large = fleet["nights"]
    assert [each["forecast"] for each in large["fleets"]] == [None, None]
    assert large["ceilings"][0]["name"] == "publishing", "10^8 shards take 8 days of it"
    assert small["fleets"][0]["forecast"]["wall_high_s"] <= 4 * 3600

    larger = (*asked, "--seeds", "3", "--shard-rows", "1000000")
    text = command("plan", LARGE[0], *larger).out
    assert "no number does" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_without_a_night_before_there_is_nothing_to_forecast_from(tmp_path: Path) -> None:
    output = LocalStorage(str(tmp_path))
    assert list(past_reports(output, "users", "2026-11-20")) == []
    assert str(no_night(output, "users", "2026-11-20")) == (
        f"{tmp_path}/users: no night published from 2025-11-19 to 2026-11-20; expected one to "
        "take measured rates from. Run `score run JOB --date D` for some date first; a part of "
        "the rows is enough."
    )


def published(output: LocalStorage, date: str, **changes: Any) -> RunReport:
    """A report of a night, where the next ones look for it."""
    report = dataclasses.replace(REPORT, job="users", date=date, **changes)
    output.create(f"users/dt={date}/_report.json", report.to_json().encode())
    return report


def test_a_night_of_a_few_rows_or_of_a_few_shards_again_is_passed_over(tmp_path: Path) -> None:
    output = LocalStorage(str(tmp_path))
    large = published(output, "2026-11-11", rows=1_000_000, shards=200, shards_reused=0)
    published(output, "2026-11-19", rows=100, shards=20, shards_reused=19, rows_taken_over=95)
    tiny = published(output, "2026-11-20", rows=1, shards=1, shards_reused=0)
    found = [report.date for report in past_reports(output, "users", "2026-11-20")]
    assert found == [tiny.date, large.date]
    assert telling_night(output, "users", "2026-11-20").date == large.date
    assert telling_night(output, "users", "2027-01-20").date == large.date
    assert telling_night(output, "users", "2026-11-18").date == large.date
    with pytest.raises(ConfigError, match="no night published"):
        telling_night(output, "users", "2026-11-10")


def test_counts_may_be_written_as_people_do() -> None:
    found = parse_counts("--rows", ["1e10", "8", "1_000", "8"], 10**12)
    assert found == (8, 1_000, 10**10)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e13", "nan", "inf", ""])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a whole number from 1 to 1,000,000,000,000"):
        parse_counts("--rows", [text], 10**12)
