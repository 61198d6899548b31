"""The Delta table of a job says of each date what is published, once."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltalake
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_cases import DATE, a_job, a_plan, job_data, users, write_input
from version_cases import Dated

from pipeline import delta, delta_columns
from pipeline.config import Job
from pipeline.delta import update_table
from pipeline.errors import ConfigError, StorageError, StoreUnavailableError
from pipeline.report import RunReport
from pipeline.storage import open_storage
from pipeline.versions import roll_back

NEXT_DATE = "2026-11-21"
NUM_ROWS, NUM_BAD = 100, 2
ONE, TWO = f"{DATE}-one", f"{DATE}-two"


def write_dates(root: Path) -> None:
    table = users(NUM_ROWS)
    f1 = [None if row in (5, 50) else 1.0 for row in range(NUM_ROWS)]
    table = table.set_column(2, "f1", pa.array(f1, pa.float32()))
    for date in (DATE, NEXT_DATE):
        write_input(root / "in", table, folder=f"dt={date}")


@pytest.fixture(params=["beside the parts", "of its own", "in the bucket"])
def dated(
    request: pytest.FixtureRequest, tmp_path: Path, a_report: Callable[[], RunReport]
) -> Dated:
    """A date whose job has a Delta table, on a disk or in a bucket."""
    write_dates(tmp_path)
    is_object = "bucket" in request.param
    root = str(request.getfixturevalue("s3_folder")) if is_object else str(tmp_path)
    table = f"{root}/lake" if "own" in request.param else True
    job = a_job(job_data(tmp_path), output={"uri": f"{root}/out", "delta": table})
    return Dated(job=job, output=open_storage(job.output.uri), report=a_report())


@pytest.fixture
def local(tmp_path: Path, a_report: Callable[[], RunReport]) -> Dated:
    write_dates(tmp_path)
    job = a_job(job_data(tmp_path), output={"delta": True})
    return Dated(job=job, output=open_storage(job.output.uri), report=a_report())


def table_of(dated: Dated) -> str:
    found = dated.job.output.delta
    return found if isinstance(found, str) else f"{dated.job.output.uri}/{dated.job.name}"


def options_of(dated: Dated) -> dict[str, str]:
    """As a reader of the bucket sets them."""
    return {"aws_allow_http": "true"} if table_of(dated).startswith("s3://") else {}


def read(dated: Dated, version: int | None = None) -> pl.DataFrame:
    """As anybody would."""
    return pl.read_delta(table_of(dated), version=version, storage_options=options_of(dated))


def rows_by_date(dated: Dated) -> dict[str, int]:
    counts = read(dated).group_by("dt").len()
    return {str(date): num for date, num in counts.rows()}


def log_of(dated: Dated) -> list[dict[str, Any]]:
    """Its transactions that wrote, the oldest first."""
    table = deltalake.DeltaTable(table_of(dated), storage_options=options_of(dated))
    return [entry for entry in reversed(table.history()) if entry["operation"] == "WRITE"]


def test_a_published_date_is_one_transaction_that_polars_reads(dated: Dated) -> None:
    assert dated.score(ONE)
    assert update_table(dated.job, dated.output, DATE)
    rows = read(dated)
    assert rows.schema == {
        "user_id": pl.Int64,
        "score": pl.Float32,
        "dt": pl.Date,
    }
    assert rows["dt"].unique().to_list() == [datetime.date.fromisoformat(DATE)]
    expected = sorted(set(range(NUM_ROWS)) - {5, 50})
    assert sorted(rows["user_id"].to_list()) == expected
    (entry,) = log_of(dated)
    assert (entry["nightscore.run_id"], entry["nightscore.version"]) == (ONE, "1")
    assert not update_table(dated.job, dated.output, DATE)
    assert len(log_of(dated)) == 1


def test_a_new_version_and_the_way_back_replace_the_date_and_no_other(dated: Dated) -> None:
    next_day = dataclasses.replace(dated, date=NEXT_DATE)
    for each in (dated, next_day):
        assert each.score(f"{each.date}-one")
        assert update_table(each.job, each.output, each.date)
    assert dated.score(TWO)
    assert update_table(dated.job, dated.output, DATE)
    scored = NUM_ROWS - NUM_BAD
    assert rows_by_date(dated) == {DATE: scored, NEXT_DATE: scored}
    assert roll_back(dated.output, dated.job.name, DATE).run_id == ONE
    assert update_table(dated.job, dated.output, DATE)
    assert rows_by_date(dated) == {DATE: scored, NEXT_DATE: scored}
    runs = [entry["nightscore.run_id"] for entry in log_of(dated)]
    assert runs == [ONE, f"{NEXT_DATE}-one", TWO, ONE]


def test_a_table_beside_the_parts_copies_nothing(local: Dated) -> None:
    local.score(ONE)
    before = {info.path for info in local.output.list_files("users")}
    update_table(local.job, local.output, DATE)
    new = {info.path for info in local.output.list_files("users")} - before
    assert new
    assert all(path.startswith("users/_delta_log/") for path in new)


def test_a_table_of_its_own_keeps_earlier_versions_readable(tmp_path: Path, local: Dated) -> None:
    job = a_job(job_data(tmp_path), output={"delta": str(tmp_path / "lake")})
    own = dataclasses.replace(local, job=job)
    for run_id in (ONE, TWO):
        own.score(run_id)
        update_table(job, own.output, DATE)
    table = deltalake.DeltaTable(table_of(own))
    assert read(own, table.version() - 1).height == read(own).height == NUM_ROWS - NUM_BAD


def test_the_job_without_a_table_gets_none(tmp_path: Path, local: Dated) -> None:
    local.score(ONE)
    assert not update_table(a_job(job_data(tmp_path)), local.output, DATE)
    assert not (tmp_path / "out/users/_delta_log").exists()


def test_a_date_that_is_not_published_is_not_committed(local: Dated) -> None:
    assert not update_table(local.job, local.output, DATE)


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let somebody act once, after the table was opened for a commit and before the commit."""
    opened = delta.open_table

    def pause(job: Job) -> Any:
        found = opened(job)
        monkeypatch.undo()
        act()
        return found

    monkeypatch.setattr(delta, "open_table", pause)


def test_two_that_commit_the_same_version_commit_it_once(
    local: Dated, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run_id in (ONE, TWO):  # the first one makes the table
        local.score(run_id)
        meanwhile(monkeypatch, lambda: update_table(local.job, local.output, DATE))
        assert not update_table(local.job, local.output, DATE)
    assert [entry["nightscore.run_id"] for entry in log_of(local)] == [ONE, TWO]
    assert rows_by_date(local) == {DATE: NUM_ROWS - NUM_BAD}


def test_who_is_late_with_an_older_version_commits_the_newer_one(
    local: Dated, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.score(ONE)
    update_table(local.job, local.output, DATE)
    local.score(TWO)
    meanwhile(monkeypatch, lambda: local.score(f"{DATE}-three"))
    assert update_table(local.job, local.output, DATE)
    assert [entry["nightscore.version"] for entry in log_of(local)] == ["1", "3"]


def test_dates_that_are_committed_side_by_side_all_come_in(
    local: Dated, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_day = dataclasses.replace(local, date=NEXT_DATE)
    for each in (local, next_day):
        each.score(f"{each.date}-one")
    meanwhile(monkeypatch, lambda: update_table(local.job, local.output, NEXT_DATE))
    assert update_table(local.job, local.output, DATE)
    assert rows_by_date(local) == dict.fromkeys((DATE, NEXT_DATE), NUM_ROWS - NUM_BAD)


def test_a_new_column_is_null_on_earlier_dates(tmp_path: Path, local: Dated) -> None:
    local.score(ONE)
    update_table(local.job, local.output, DATE)
    wider = a_job(
        job_data(tmp_path), output={"delta": True}, input={"passthrough": ["user_id", "f0"]}
    )
    next_day = dataclasses.replace(local, job=wider, date=NEXT_DATE)
    next_day.score(f"{NEXT_DATE}-one")
    update_table(wider, local.output, NEXT_DATE)
    nulls = read(local).group_by("dt").agg(pl.col("f0").null_count()).sort("dt")
    assert nulls["f0"].to_list() == [NUM_ROWS - NUM_BAD, 0]


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.list_(pa.timestamp("us"))], ids=str)
def test_a_new_column_of_times_without_a_zone_leaves_the_table_readable(
    kind: pa.DataType, tmp_path: Path, local: Dated
) -> None:
    local.score(ONE)
    update_table(local.job, local.output, DATE)
    table = users(3).append_column("seen_at", pa.nulls(3, kind))
    write_input(tmp_path / "in", table, folder=f"dt={NEXT_DATE}")
    job = a_job(
        job_data(tmp_path), output={"delta": True}, input={"passthrough": ["user_id", "seen_at"]}
    )
    next_day = dataclasses.replace(local, job=job, date=NEXT_DATE)
    for run_id in (f"{NEXT_DATE}-one", f"{NEXT_DATE}-two"):
        next_day.score(run_id)
        assert update_table(job, local.output, NEXT_DATE)
    assert rows_by_date(local) == {DATE: NUM_ROWS - NUM_BAD, NEXT_DATE: 3}
    assert read(local)["seen_at"].null_count() == NUM_ROWS - NUM_BAD + 3


def test_a_column_that_had_another_type_before_there_was_a_table_is_refused(
    tmp_path: Path, local: Dated
) -> None:
    table = users(NUM_ROWS)
    names = pa.array([str(row) for row in range(NUM_ROWS)])
    write_input(tmp_path / "in", table.set_column(0, "user_id", names), folder=f"dt={NEXT_DATE}")
    for date in (DATE, NEXT_DATE):
        dataclasses.replace(local, date=date, job=a_job(job_data(tmp_path))).score(f"{date}-one")
    update_table(local.job, local.output, DATE)
    with pytest.raises(StorageError, match=r"column `user_id` is int64; expected string, as 2026-"):
        update_table(local.job, local.output, NEXT_DATE)


def test_a_column_that_was_null_before_there_was_a_table_is_null_in_it(
    tmp_path: Path, local: Dated
) -> None:
    more = {"passthrough": ["user_id", "more"]}
    for date, kind in ((DATE, pa.null()), (NEXT_DATE, pa.string())):
        table = users(3).append_column("more", pa.nulls(3, kind))
        write_input(tmp_path / "in", table, folder=f"dt={date}")
        job = a_job(job_data(tmp_path), input=more)
        dataclasses.replace(local, date=date, job=job).score(f"{date}-one")
        update_table(local.job, local.output, date)
    assert read(local).schema["more"] == pl.String
    assert read(local)["more"].null_count() == 6


def test_lists_that_had_no_null_may_have_some_from_now_on(tmp_path: Path, local: Dated) -> None:
    job = a_job(
        job_data(tmp_path), output={"delta": True}, input={"passthrough": ["user_id", "more"]}
    )
    full = pa.list_(pa.field("element", pa.int32(), nullable=False))
    schema = pa.schema({"user_id": pa.int64(), "more": full, "dt": pa.date32()})
    deltalake.DeltaTable.create(table_of(local), schema, partition_by=["dt"], name="users")
    more = pa.array([[1, None]] * 3, pa.list_(pa.int32()))
    write_input(tmp_path / "in", users(3).append_column("more", more))
    dataclasses.replace(local, job=job).score(ONE)
    update_table(job, local.output, DATE)
    assert read(local)["more"].to_list() == [[1, None]] * 3


def test_a_column_that_differs_from_a_known_one_only_in_case_is_refused(
    tmp_path: Path, local: Dated
) -> None:
    table = users(NUM_ROWS)
    shouted = table.rename_columns(["USER_ID", *table.column_names[1:]])
    write_input(tmp_path / "in", shouted, folder=f"dt={NEXT_DATE}")
    job = a_job(job_data(tmp_path), output={"delta": True}, input={"passthrough": ["USER_ID"]})
    next_day = dataclasses.replace(local, date=NEXT_DATE, job=job)
    next_day.score(f"{NEXT_DATE}-one")
    local.score(ONE)
    update_table(local.job, local.output, DATE)
    with pytest.raises(StorageError, match=rf"columns of {NEXT_DATE} .*Duplicate.*; expected such"):
        update_table(job, local.output, NEXT_DATE)
    with pytest.raises(ConfigError, match=r"`USER_ID` and `user_id` are one name in a Delta table"):
        next_day.score(f"{NEXT_DATE}-two")


def test_columns_of_one_name_that_were_published_all_the_same_are_told_in_a_sentence(
    tmp_path: Path, local: Dated, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = users(NUM_ROWS)
    write_input(tmp_path / "in", table.append_column("Score", table["f0"]))
    job = a_job(job_data(tmp_path), output={"delta": True}, input={"passthrough": ["Score"]})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.input_columns.delta_types", lambda _, types, __: types)
        dataclasses.replace(local, job=job).score(ONE)
    with pytest.raises(StorageError, match=rf"cannot have the columns of {DATE} .*Duplicate"):
        update_table(job, local.output, DATE)


def test_another_jobs_table_is_left_alone(tmp_path: Path, local: Dated) -> None:
    lake = str(tmp_path / "lake")
    schema = pa.schema([pa.field("dt", pa.date32())])
    deltalake.DeltaTable.create(lake, schema, partition_by=["dt"], name="others")
    local.score(ONE)
    job = a_job(job_data(tmp_path), output={"delta": lake})
    for touch in (lambda: update_table(job, local.output, DATE), lambda: a_plan(job)):
        with pytest.raises(StorageError, match=r"named others.*expected one of the job users"):
            touch()
    assert deltalake.DeltaTable(lake).version() == 0


def test_a_table_that_cannot_be_written_says_that_the_same_command_mends_it(
    tmp_path: Path, local: Dated
) -> None:
    local.score(ONE)
    (tmp_path / "file").write_text("no folder")
    job = a_job(job_data(tmp_path), output={"delta": f"{tmp_path}/file/table"})
    with pytest.raises(StoreUnavailableError, match=r"same command"):
        update_table(job, local.output, DATE)


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.int64(),
        pa.bool_(),
        pa.float64(),
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.date32(),
        pa.timestamp("us"),
        pa.timestamp("ms", "UTC"),
        pa.decimal128(10, 2),
        pa.list_(pa.float32()),
    ],
    ids=str,
)
def test_columns_of_these_types_are_read_back(
    kind: pa.DataType, tmp_path: Path, local: Dated
) -> None:
    table = users(3).append_column("more", pa.nulls(3, kind))
    write_input(tmp_path / "in", table)
    job = a_job(
        job_data(tmp_path), output={"delta": True}, input={"passthrough": ["user_id", "more"]}
    )
    dated = dataclasses.replace(local, job=job)
    dated.score(ONE)
    update_table(job, dated.output, DATE)
    assert read(dated)["more"].null_count() == 3


@pytest.mark.parametrize(
    "kind",
    [pa.uint64(), pa.timestamp("ns"), pa.list_(pa.float32(), 2), pa.float16()],
    ids=str,
)
def test_columns_of_other_types_are_refused_before_anything_is_scored(
    kind: pa.DataType, tmp_path: Path
) -> None:
    write_input(tmp_path / "in", users(3).append_column("more", pa.nulls(3, kind)))
    job = a_job(
        job_data(tmp_path), output={"delta": True}, input={"passthrough": ["user_id", "more"]}
    )
    with pytest.raises(ConfigError, match=r"column `more` is .*; expected a type that Delta Lake"):
        a_plan(job)


@pytest.mark.parametrize(("name", "other"), [("Score", "score"), ("DT", "dt"), ("F0", "f0")])
def test_names_that_differ_only_in_case_are_refused_before_anything_is_scored(
    name: str, other: str, tmp_path: Path
) -> None:
    write_input(tmp_path / "in", users(3).append_column(name, pa.nulls(3, pa.int64())))
    passthrough = {"passthrough": ["f0", name]}
    with pytest.raises(ConfigError, match=rf"`{name}` and `{other}` are one name in a Delta table"):
        a_plan(a_job(job_data(tmp_path), output={"delta": True}, input=passthrough))
    a_plan(a_job(job_data(tmp_path), input=passthrough))


def test_without_the_package_the_plan_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(tmp_path / "in", users(3))
    monkeypatch.setattr(delta_columns, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'nightscore\[delta\]'"):
        a_plan(a_job(job_data(tmp_path), output={"delta": True}))


def test_the_date_is_the_tables_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`dt` is the date in a Delta table"):
        a_job(job_data(tmp_path), output={"delta": True}, input={"passthrough": ["dt"]})


def test_parts_of_the_table_keep_their_checksums(local: Dated) -> None:
    local.score(ONE)
    update_table(local.job, local.output, DATE)
    for path in deltalake.DeltaTable(table_of(local)).file_uris():
        pq.read_table(path, page_checksum_verification=True)
