"""Row groups that are not read: told by what the footer promises, before memory is taken."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_inputs import footer_of, parquet_bytes, with_encrypted, with_footer, with_promise
from pipeline_cases import (
    DATE,
    SumRunner,
    a_job,
    a_plan,
    job_data,
    publish_night,
    scoring_tools,
    users,
    write_input,
)

from pipeline.config import Job
from pipeline.quarantine import read_samples
from pipeline.report import RunReport
from pipeline.row_groups import (
    MAX_GROUP_BYTES,
    TOO_LARGE,
    UNREADABLE,
    max_group_bytes,
    open_parquet,
    why_lost,
    why_too_large,
)
from pipeline.score_shards import ShardScoring
from pipeline.storage import open_storage
from pipeline.verify import verify_published

MANY = 10**12


def too_large(data: bytes, columns: list[str], max_bytes: int) -> str | None:
    file = io.BytesIO(data)
    return why_too_large(file, open_parquet(file), 0, columns, max_bytes)


def test_a_group_within_the_limit_may_be_read() -> None:
    assert too_large(parquet_bytes(users(1000), 1000), ["user_id", "f0", "f1"], 1 << 20) is None


def test_no_byte_of_a_group_is_read_to_find_out_how_large_it_is() -> None:
    read: list[int] = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            read.append(self.tell())
            return super().read(size)

    file = Watched(parquet_bytes(users(1000), 1000))
    parquet = open_parquet(file)
    read.clear()
    assert why_too_large(file, parquet, 0, ["user_id", "f0", "f1"], 1 << 20) is None
    assert read == []


def test_only_the_columns_of_the_job_count() -> None:
    table = pa.table({"user_id": range(8), "blob": [b"x" * 100_000] * 8, "blob2": [b"y"] * 8})
    data = parquet_bytes(table, 8, use_dictionary=False)
    assert too_large(data, ["user_id", "blob2"], 10_000) is None
    said = too_large(data, ["user_id", "blob"], 10_000)
    assert said is not None
    assert said.startswith("row group 0 promises 8 rows of 0.00 GiB; at most 0.00 GiB are read")


@pytest.mark.parametrize(
    ("values", "row_bytes"),
    [
        (pa.array([1.0] * 500, pa.float64()), 8),
        (pa.array([[1.0, 2.0, 3.0]] * 500, pa.list_(pa.float32(), 3)), 12),
        (pa.array(["a"] * 500), 4),
        (pa.array([True] * 500), 1 / 8),
        (pa.array([[1]] * 500, pa.list_(pa.int64())), 4),
    ],
)
def test_rows_that_are_promised_count_as_what_they_take_in_memory(
    values: pa.Array, row_bytes: float
) -> None:
    data = with_promise(parquet_bytes(pa.table({"x": values}), 500), 500, MANY)
    assert pq.read_metadata(io.BytesIO(data)).num_rows == MANY
    at_least = int(MANY * row_bytes)
    assert too_large(data, ["x"], at_least) is None
    assert too_large(data, ["x"], at_least - 1) is not None


def test_the_limit_is_the_jobs_or_what_a_lane_can_take() -> None:
    assert max_group_bytes(0.5, 1 << 40) == 1 << 29
    assert max_group_bytes(None, 1 << 40) == MAX_GROUP_BYTES == 4 << 30
    assert max_group_bytes(None, 1 << 30) == 1 << 29


def bomb(num_bytes: int) -> bytes:
    """A small file with a column that expands to so many bytes, and a few rows."""
    values = pa.array([b"\0" * (num_bytes // 8)] * 8, pa.large_binary())
    ones = pa.array([1.0] * 8, pa.float32())
    table = pa.table({"user_id": range(8), "f0": ones, "f1": ones, "note": values})
    return parquet_bytes(table, 8, use_dictionary=False)


def test_a_bomb_is_told_by_its_footer_and_costs_nothing() -> None:
    data = bomb(64 << 20)
    assert len(data) < 100_000
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = io.BytesIO(data)
    why = why_lost(file, open_parquet(file), 0, ["user_id", "note"], 32 << 20)
    assert why is not None
    assert why[0] == TOO_LARGE
    assert "promises 8 rows of 0.06 GiB; at most 0.03 GiB are read" in why[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 20 << 10


def test_all_chunks_of_a_nested_column_count_and_none_of_a_like_named_one() -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    table = pa.table({"a": [{"n": 1, "b": {"c": noise}}], "ab": [b"x"], "a.x": [noise * 2]})
    data = parquet_bytes(table, 1)
    assert too_large(data, ["a"], 100_000) is not None
    assert too_large(data, ["a"], 150_000) is None
    assert too_large(data, ["ab"], 10_000) is None
    assert too_large(data, ["a.x"], 150_000) is not None


def test_a_column_that_is_encrypted_is_no_matter_unless_the_job_reads_it() -> None:
    file = io.BytesIO(with_encrypted(users(20), 10, "f1"))
    parquet = open_parquet(file)
    assert why_lost(file, parquet, 1, ["user_id", "f0"], 1 << 30) is None
    assert why_lost(file, parquet, 1, ["user_id", "f0", "f1"], 1 << 30) == (
        UNREADABLE,
        "row group 1: a column of the job is encrypted",
    )


def test_a_damaged_group_beside_an_encrypted_column_is_damage() -> None:
    data = bytearray(with_encrypted(users(20), 10, "f1"))
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0)
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0xFF
    file = io.BytesIO(bytes(data))
    why = why_lost(file, open_parquet(file), 0, ["user_id", "f0"], 1 << 30)
    assert why is not None
    assert (why[0], "CRC" in why[1]) == (UNREADABLE, True)


def test_a_time_at_the_end_of_the_day_costs_no_row() -> None:
    micros = pa.array([86_400_000_000, 5], pa.time64("us"))
    file = io.BytesIO(parquet_bytes(pa.table({"at": micros}), 2))
    assert why_lost(file, open_parquet(file), 0, ["at"], 1 << 30) is None


@pytest.mark.parametrize("column", [pa.array(["name"]), pa.array([["name"]])])
def test_text_that_is_not_utf_8_costs_its_group(column: pa.Array) -> None:
    table = pa.table({"text": column})
    data = parquet_bytes(table, 1, write_page_checksum=False, compression="none")
    file = io.BytesIO(data.replace(b"name", b"\xff\xfe\xfd\xfc"))
    why = why_lost(file, open_parquet(file), 0, ["text"], 1 << 30)
    assert why is not None
    assert (why[0], "UTF8" in why[1]) == (UNREADABLE, True)


def test_a_footer_that_points_nowhere_is_damage() -> None:
    data = parquet_bytes(users(500), 500)
    file = io.BytesIO(with_footer(data[:40] + bytes(8), footer_of(data)))
    why = why_lost(file, open_parquet(file), 0, ["user_id", "f0"], 1 << 30)
    assert why is not None
    assert why[0] == UNREADABLE


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Sixty rows that can be read, and files that promise what nobody can hold."""
    root, folder = tmp_path / "in", tmp_path / "in" / f"dt={DATE}"
    write_input(root, users(60), name="a.parquet")
    (folder / "b.parquet").write_bytes(with_promise(parquet_bytes(users(500), 500), 500, MANY))
    (folder / "c.parquet").write_bytes(bomb(64 << 20))
    (folder / "d.parquet").write_bytes(with_promise(parquet_bytes(users(500), 500), 500, 501))
    (folder / "e.parquet").write_bytes(b"")
    return a_job(
        job_data(tmp_path),
        input={"passthrough": ["user_id", "f0"]},
        limits={"max_quarantined": 1.0},
    )


def test_a_million_million_promised_rows_are_one_record_and_are_verified(
    job: Job, a_report: Callable[..., RunReport]
) -> None:
    plan = a_plan(job)
    assert plan.num_rows == 60 + MANY + 8 + 501
    report = a_report(degraded=True, unreadable_files=plan.unreadable)
    folder = publish_night(job, report)
    verdict = verify_published(job.output.uri, job.name, DATE)
    assert verdict["rows"] == plan.num_rows
    assert (verdict["scored"], verdict["quarantined"]) == (60 + 8, MANY + 501)
    assert verdict["unreadable_files"] == 1
    tables = [pq.read_table(path) for path in sorted(folder.glob("_quarantine/*.parquet"))]
    entries = pa.concat_tables(tables).to_pylist()
    assert [(entry["row"], entry["num_rows"], entry["reason"]) for entry in entries] == [
        (0, MANY, TOO_LARGE),
        (0, 501, UNREADABLE),
    ]


def test_passthrough_columns_can_be_bombs_too(job: Job) -> None:
    bold = job.model_copy(
        update={"input": job.input.model_copy(update={"passthrough": ("user_id", "note")})}
    )
    folder = Path(job.input.uri, f"dt={DATE}")
    for name in ("a", "b", "d"):
        (folder / f"{name}.parquet").unlink()
    plan = a_plan(bold)
    tools = scoring_tools(bold, plan, SumRunner(), max_group_bytes=32 << 20)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ShardScoring(plan.shards, tools) as scoring:
        (record,) = scoring
    assert (record.num_scored, record.reasons) == (0, {TOO_LARGE: 8})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 20 << 10


def test_the_report_shows_ranges_as_such(job: Job) -> None:
    plan = a_plan(job)
    tools = scoring_tools(job, plan, SumRunner())
    with ShardScoring(plan.shards, tools) as scoring:
        records = {record.shard: record for record in scoring}
    samples = read_samples(tools.ledger, records, open_storage(job.output.uri))
    found = [(sample.file[-9:], sample.row, sample.num_rows) for sample in samples]
    assert found == [("b.parquet", 0, MANY), ("d.parquet", 0, 501)]


@pytest.mark.parametrize("core_threads", [None, 2])
@pytest.mark.parametrize("lost", [(0,), (1,), (5,), (0, 1, 2), (3, 4, 5), tuple(range(6))])
def test_blocks_of_lost_groups_are_not_made_and_all_other_rows_are_scored(
    tmp_path: Path, lost: tuple[int, ...], core_threads: int | None
) -> None:
    path = write_input(tmp_path / "in", users(60))
    data = bytearray(path.read_bytes())
    metadata = pq.ParquetFile(path).metadata
    for group in lost:
        chunk = metadata.row_group(group).column(0)
        begin = chunk.dictionary_page_offset or chunk.data_page_offset
        data[begin + chunk.total_compressed_size - 1] ^= 0xFF
    path.write_bytes(data)
    job = a_job(job_data(tmp_path), lanes={"shard_rows": 30})
    plan = a_plan(job)
    runner: Any = SumRunner()
    if core_threads:
        runner = Immediate()
    tools = scoring_tools(job, plan, runner, core_threads=core_threads)
    with ShardScoring([*plan.shards, None], tools) as scoring:
        records = list(scoring)
    assert sum(record.num_scored for record in records) == 60 - 10 * len(lost)
    assert sum(record.num_quarantined for record in records) == 10 * len(lost)
    tables = [pq.read_table(part) for part in sorted((tmp_path / "out").rglob("part-0*.parquet"))]
    found = pa.concat_tables(tables)
    ids = [row for row in range(60) if row // 10 not in lost]
    assert found["user_id"].to_pylist() == ids
    assert np.allclose(found["score"].to_numpy(), [3 * row for row in ids])


class Immediate(SumRunner):
    """A runner that computes in the calling thread."""

    def run(self, batch: Any) -> Any:
        return self._score(batch)
