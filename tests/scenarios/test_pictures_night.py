"""A whole night of pictures, by the installed command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]
DATE = "2026-11-20"
NUM_ROWS = 512
REASONS = {
    32: "jpeg_truncated",
    96: "empty",
    160: "null",
    224: "format_not_accepted",
    288: "format_not_accepted",
    352: "decode_failed",
    416: "header_unreadable",
    480: "png_chunk_length",
}
"""Damaged rows of flows/demo_data.py, and what is said of them."""
REPORT_FIELDS = {
    "run_id",
    "job",
    "date",
    "status",
    "rows",
    "scored",
    "quarantined",
    "shards",
    "shards_reused",
    "examples_per_sec",
    "wall_s",
    "usd_per_100k",
    "engine",
    "stages",
    "ceilings",
    "bottleneck",
    "output",
    "manifest",
}


def check_report(report: dict[str, Any]) -> None:
    assert set(report) >= REPORT_FIELDS
    assert (report["job"], report["date"]) == ("pictures", DATE)
    assert report["status"] == "published"
    assert report["rows"] == report["scored"] + report["quarantined"] == NUM_ROWS
    assert (report["shards"], report["shards_reused"]) == (4, 0)
    assert report["examples_per_sec"] == pytest.approx(NUM_ROWS / report["wall_s"])
    assert report["usd_per_100k"] > 0
    assert {"key", "runtime", "precision"} <= set(report["engine"])
    for name in ("read", "decode", "infer", "write"):
        assert report["stages"][name]["busy_s"] >= 0
        assert report["stages"][name]["wait_s"] >= 0
        assert report["stages"][name]["items"] == NUM_ROWS
    rates = report["ceilings"]
    assert set(rates) == {"decode_per_sec", "engine_per_sec", "engine_with_copies_per_sec"}
    assert min(rates.values()) > 1
    assert report["bottleneck"] in report["stages"]
    assert Path(report["manifest"]).parent == Path(report["output"])


def test_a_night_of_pictures(score: Callable[..., Any], pictures_job: Path) -> None:
    command = ("run", pictures_job, "--date", DATE, "--json", "--set", "lanes.shard_rows=128")
    ended = score(*command)
    assert ended.code == 0, ended.err
    check_report(ended.json)
    folder = Path(ended.json["output"])
    names = {path.name for path in folder.iterdir()}
    assert {"_MANIFEST.json", "_SUCCESS", "_report.json", "_report.html"} <= names

    verdict = score("verify", pictures_job, "--date", DATE, "--json")
    assert verdict.code == 0, verdict.err
    counted = ("rows", "scored", "quarantined")
    assert [verdict.json[key] for key in counted] == [ended.json[key] for key in counted]

    check_quarantine(folder)
    check_scores(folder)

    again = score(*command)
    assert again.code == 0
    assert again.json["status"] == "already_published"
    assert again.json["run_id"] == ended.json["run_id"]
    assert again.json["wall_s"] == ended.json["wall_s"]
    shown = score("report", pictures_job, "--date", DATE, "--json")
    assert (shown.code, shown.json["run_id"]) == (0, ended.json["run_id"])
    listed = score("status", pictures_job, "--json")
    assert [run["run_id"] for run in listed.json["published"]] == [ended.json["run_id"]]


def check_quarantine(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in (folder / "_quarantine").glob("*.parquet")]
    found = {}
    for row in pa.concat_tables(tables).to_pylist():
        file = int(row["file"].removesuffix(".parquet").rpartition("-")[2])
        found[file * NUM_ROWS // 2 + row["row"]] = row["reason"]
        assert row["message"]
        assert (row["sha256"] == "") == (row["reason"] == "null")
    assert found == REASONS


def check_scores(folder: Path) -> None:
    """The same table in polars, DuckDB and pandas."""
    import duckdb
    import pandas as pd
    import polars as pl

    columns = ["picture_id", "photo", "class_id", "class_name", "probability"]
    table = pl.read_parquet(folder / "*.parquet").sort("picture_id")
    assert table.columns == columns
    expected = [f"{DATE}-{row:06d}" for row in range(NUM_ROWS) if row not in REASONS]
    assert table["picture_id"].to_list() == expected
    assert table["probability"].is_between(0, 1).all()
    # The photographs are trained weights' home ground: a cat is a cat.
    cats = table.filter(pl.col("photo") == "chelsea")["class_name"]
    assert cats.str.contains("cat|tabby|lynx").mean() > 0.5  # type: ignore[operator]

    # DuckDB adds the folder's `dt` as a column.
    query = f"select * exclude (dt) from '{folder}/*.parquet' order by picture_id"
    assert duckdb.sql(query).fetchall() == table.rows()
    frame = pd.read_parquet(folder, columns=["picture_id", "class_id"]).sort_values("picture_id")
    assert frame["class_id"].tolist() == table["class_id"].to_list()


def test_dali_decodes_a_whole_night_on_a_cpu_with_the_same_answers(
    score: Callable[..., Any], pictures_job: Path, tmp_path: Path
) -> None:
    import polars as pl

    run_ids, tables = set(), []
    for decoder in ("window", "dali"):
        changes = (f"lanes.cpu_decoder={decoder}", f"output.uri={tmp_path / decoder}")
        sets = [part for change in changes for part in ("--set", change)]
        ended = score("run", pictures_job, "--date", DATE, "--json", *sets)
        assert ended.code == 0, ended.err
        folder = Path(ended.json["output"])
        check_quarantine(folder)
        stages = {name: times["items"] for name, times in ended.json["stages"].items()}
        assert stages == dict.fromkeys(("read", "decode", "infer", "write"), NUM_ROWS)
        assert min(ended.json["ceilings"].values()) > 1
        run_ids.add(ended.json["run_id"])
        tables.append(pl.read_parquet(folder / "*.parquet").sort("picture_id"))
    assert len(run_ids) == 2
    ours, by_dali = tables
    assert ours["picture_id"].to_list() == by_dali["picture_id"].to_list()
    assert (ours["class_id"] == by_dali["class_id"]).mean() > 0.97  # type: ignore[operator]
    assert (ours["probability"] - by_dali["probability"]).abs().mean() < 0.02  # type: ignore[operator]


def test_a_night_with_too_many_bad_pictures_is_not_published(
    score: Callable[..., Any], pictures_job: Path, tmp_path: Path
) -> None:
    ended = score(
        "run", pictures_job, "--date", DATE, "--json", "--set", "limits.max_quarantined=0.01"
    )
    assert ended.code == 3
    assert "8 of 512 rows (1.56%) are in quarantine" in ended.json["error"]
    assert not (tmp_path / "scores" / "pictures" / f"dt={DATE}").exists()
