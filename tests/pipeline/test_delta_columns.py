"""What a job's Delta table has already decides over a night's columns before it is scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import deltalake
import polars as pl
import pyarrow as pa
import pytest
from pipeline_cases import DATE, a_job, a_plan, job_data, users, write_input
from version_cases import Dated

from pipeline.config import Job
from pipeline.delta import update_table
from pipeline.errors import ConfigError
from pipeline.report import RunReport
from pipeline.storage import open_storage

NEXT_DATE = "2026-11-21"


def a_night(root: Path, kind: pa.DataType, date: str = DATE) -> Job:
    """A job that copies a column `more` of nulls into its Delta table."""
    write_input(root / "in", users(3).append_column("more", pa.nulls(3, kind)), folder=f"dt={date}")
    return a_job(job_data(root), output={"delta": True}, input={"passthrough": ["user_id", "more"]})


def with_table(job: Job, kind: pa.DataType) -> Job:
    schema = pa.schema({"user_id": pa.int64(), "more": kind, "dt": pa.date32()})
    place = f"{job.output.uri}/{job.name}"
    deltalake.DeltaTable.create(place, schema, partition_by=["dt"], name=job.name)
    return job


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (pa.int64(), pa.int32()),
        (pa.float64(), pa.float32()),
        (pa.string(), pa.null()),
        (pa.list_(pa.float32()), pa.null()),
        (pa.timestamp("us", "UTC"), pa.null()),
        (pa.list_(pa.int64()), pa.list_(pa.int32())),
        (pa.int16(), pa.uint8()),
    ],
    ids=str,
)
def test_a_part_has_the_wider_type_of_the_table(
    known: pa.DataType, found: pa.DataType, tmp_path: Path
) -> None:
    job = with_table(a_night(tmp_path, found), known)
    assert a_plan(job).wider_types == {"more": known}


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (pa.int64(), pa.int64()),
        (pa.string(), pa.large_string()),
        (pa.timestamp("us"), pa.timestamp("ms")),
        (pa.list_(pa.field("element", pa.int32(), nullable=False)), pa.large_list(pa.int32())),
    ],
    ids=str,
)
def test_a_type_that_the_table_reads_as_its_own_is_left_as_it_is(
    known: pa.DataType, found: pa.DataType, tmp_path: Path
) -> None:
    job = with_table(a_night(tmp_path, found), known)
    assert a_plan(job).wider_types == {}


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (pa.int32(), pa.int64()),
        (pa.string(), pa.int64()),
        (pa.timestamp("us", "UTC"), pa.timestamp("us")),
        (pa.timestamp("us"), pa.timestamp("ns")),
        (pa.list_(pa.int32()), pa.int32()),
    ],
    ids=str,
)
def test_a_type_whose_values_the_table_cannot_have_is_refused_before_anything_is_scored(
    known: pa.DataType, found: pa.DataType, tmp_path: Path
) -> None:
    job = with_table(a_night(tmp_path, found), known)
    with pytest.raises(ConfigError) as refused:
        a_plan(job)
    assert f"column `more` is {found}; expected {known}, as in the Delta table" in str(
        refused.value
    )
    without = job.output.model_copy(update={"delta": False})
    assert a_plan(job.model_copy(update={"output": without})).wider_types == {}


def test_a_column_without_a_value_is_null_in_the_table(
    tmp_path: Path, a_report: Callable[[], RunReport]
) -> None:
    job = a_night(tmp_path, pa.string())
    a_night(tmp_path, pa.null(), NEXT_DATE)
    dated = Dated(job=job, output=open_storage(job.output.uri), report=a_report())
    for date in (DATE, NEXT_DATE):
        night = dataclasses.replace(dated, date=date)
        night.score(f"{date}-one")
        night.verify()
        assert update_table(job, dated.output, date)
    place = f"{job.output.uri}/{job.name}"
    for rows in (pl.read_delta(place), pl.read_parquet(f"{place}/dt=*/*.parquet")):
        assert rows.schema["more"] == pl.String
        assert rows["more"].null_count() == 6


def test_a_table_that_cannot_be_read_stops_no_night(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = a_night(tmp_path, pa.string())
    place = Path(job.output.uri, job.name)
    place.parent.mkdir(parents=True)
    place.write_text("a file where a folder should be")
    assert a_plan(job).num_rows
    assert "the Delta table cannot be read; columns are not held to it" in caplog.text
