"""The history of a job grows by one small file a night, and is read without its reports."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import StoreRefusedError, StoreUnavailableError
from pipeline.history import (
    SCHEMA,
    HistoryRow,
    nights_before,
    read_history,
    record_night,
    row_of,
    write_row,
)
from pipeline.local_storage import LocalStorage
from pipeline.report import Drift, RunReport, ScoreDistribution
from pipeline.storage import FileInfo, Storage, open_storage

Build = Callable[..., RunReport]
AT = "2026-11-21T02:00:43Z"


@pytest.fixture
def output(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


@pytest.fixture(params=["local", "object"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    is_object = request.param == "object"
    return open_storage(str(request.getfixturevalue("s3_folder") if is_object else tmp_path))


@pytest.fixture
def record(output: LocalStorage, a_report: Build) -> Callable[..., None]:
    """Adds a night of `date` to the history."""

    def add(date: str, version: int = 1, **changes: object) -> None:
        report = a_report(date=date, run_id=f"{date}-{version:08x}", **changes)
        record_night(output, report, version=version, published_at=AT)

    return add


def files(output: LocalStorage) -> list[str]:
    return [info.path for info in output.list_files("demo/_history")]


def test_a_row_comes_back_as_it_was_written(output: LocalStorage, a_report: Build) -> None:
    scores = ScoreDistribution(
        counts="1:2",
        num_values=2,
        model="4f1c",
        head="classes",
        nights=("2026-11-19",),
        psi={"probability": 0.2, "classes": 0.3},
        chance={"probability": 0.05, "classes": 0.01},
    )
    report = a_report(
        distribution=scores, drift=Drift(rows=32, agreement=0.99), joules_per_1000_rows=41.5
    )
    row = row_of(report, version=3, published_at=AT)
    assert write_row(output, row)
    assert read_history(output, "demo") == (row,)
    assert (row.psi, row.psi_chance, row.drift_agreement) == (0.3, 0.01, 0.99)
    assert (row.version, row.model_fingerprint, row.currency) == (3, "4f1c", "USD")


def test_what_was_not_measured_is_none(a_report: Build) -> None:
    row = row_of(a_report(), version=1, published_at=AT)
    unknown = (row.psi, row.psi_chance, row.drift_agreement, row.joules_per_1000)
    assert (*unknown, row.model_fingerprint) == (None,) * 5


def test_all_files_are_one_table_also_where_values_are_unknown(
    tmp_path: Path, record: Callable[..., None]
) -> None:
    record("2026-11-19")
    record("2026-11-20", joules_per_1000_rows=3.5)
    table = pl.read_parquet(tmp_path / "demo/_history/*.parquet")
    assert table.columns == SCHEMA.names == [f.name for f in dataclasses.fields(HistoryRow)]
    assert table.sort("date")["joules_per_1000"].to_list() == [None, 3.5]


def test_a_night_is_written_once(
    tmp_path: Path, output: LocalStorage, record: Callable[..., None]
) -> None:
    record("2026-11-20")
    (name,) = files(output)
    before = (tmp_path / name).read_bytes()
    record("2026-11-20", rows=1)
    assert files(output) == ["demo/_history/2026-11-20_v1_2026-11-20-00000001.parquet"]
    assert (tmp_path / name).read_bytes() == before


def test_nights_come_by_date_with_the_version_that_is_published(
    output: LocalStorage, record: Callable[..., None]
) -> None:
    for date, version in (("2026-11-20", 1), ("2026-11-18", 1), ("2026-11-20", 10)):
        record(date, version)
    record("2026-11-20", 9)
    found = [(row.date, row.version) for row in read_history(output, "demo")]
    assert found == [("2026-11-18", 1), ("2026-11-20", 10)]


@pytest.mark.parametrize(
    ("until", "last", "days"),
    [
        (None, 2, [19, 20]),
        ("2026-11-19", None, [17, 18, 19]),
        ("2026-11-19", 2, [18, 19]),
        (None, 30, [17, 18, 19, 20]),
        (None, 0, []),
        ("2026-11-16", 3, []),
    ],
)
def test_only_the_nights_asked_for_are_read(
    output: LocalStorage,
    record: Callable[..., None],
    until: str | None,
    last: int | None,
    days: list[int],
) -> None:
    for day in (17, 18, 19, 20):
        record(f"2026-11-{day}")
    found = [int(row.date[-2:]) for row in read_history(output, "demo", until=until, last=last)]
    assert found == days


def test_a_disk_and_a_bucket_keep_the_same_history(stored: Storage, a_report: Build) -> None:
    assert read_history(stored, "demo") == ()
    rows = [
        row_of(a_report(date=date, run_id=f"{date}-7d1f"), version=version, published_at=AT)
        for date, version in (("2026-11-18", 1), ("2026-11-19", 2), ("2026-11-20", 1))
    ]
    assert [write_row(stored, row) for row in (*rows, rows[0])] == [True, True, True, False]
    assert read_history(stored, "demo") == tuple(rows)
    assert nights_before(stored, "demo", "2026-11-20") == tuple(rows[:2])
    assert nights_before(stored, "demo", "2026-11-20", last=1) == (rows[1],)


def test_a_damaged_file_costs_its_own_night_only(
    tmp_path: Path,
    output: LocalStorage,
    record: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    record("2026-11-19")
    record("2026-11-20")
    (tmp_path / files(output)[1]).write_bytes(b"PAR1")
    (tmp_path / "demo/_history/notes.txt").write_text("of somebody else")
    assert [row.date for row in read_history(output, "demo")] == ["2026-11-19"]
    assert "2026-11-20_v1" in caplog.text


def test_rows_of_other_versions_of_the_program_are_read_as_far_as_they_go(
    tmp_path: Path, output: LocalStorage, record: Callable[..., None]
) -> None:
    record("2026-11-20", rows_taken_over=7)
    path = tmp_path / files(output)[0]
    row = pl.read_parquet(path)
    row.with_columns(later=pl.lit(1)).write_parquet(path)
    assert [found.rows_taken_over for found in read_history(output, "demo")] == [7]
    row.drop("rows_taken_over").write_parquet(path)
    assert [found.rows_taken_over for found in read_history(output, "demo")] == [0]
    row.drop("machine_share").write_parquet(path)
    assert [found.machine_share for found in read_history(output, "demo")] == [1]
    row.drop("usd").write_parquet(path)
    assert read_history(output, "demo") == ()


class Refusing(LocalStorage):
    """A store that lets a history neither be written nor read."""

    error: Exception

    def list_files(self, prefix: str) -> list[FileInfo]:  # noqa: ARG002
        raise self.error

    def create(self, path: str, data: bytes) -> bool:  # noqa: ARG002
        raise self.error


@pytest.fixture(params=[StoreUnavailableError("full"), StoreRefusedError("no"), OSError(5, "EIO")])
def refusing(request: pytest.FixtureRequest, tmp_path: Path) -> Refusing:
    Refusing.error = request.param
    return Refusing(str(tmp_path))


def test_a_store_that_refuses_the_history_does_not_fail_the_night(
    refusing: Refusing, a_report: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        record_night(refusing, a_report(), version=1, published_at=AT)
        assert nights_before(refusing, "demo", "2026-11-20") == ()
    assert "not written to the history" in caplog.text
    assert "history cannot be read" in caplog.text
