"""Reading shards: every row, in order, of the file that was planned."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pipeline_cases import DATE, a_job, a_plan, job_data, users, write_input

from pipeline.blocks import Block
from pipeline.config import Job
from pipeline.errors import InputChangedError, InputError
from pipeline.plan import Plan
from pipeline.read import read_blocks, sample_rows
from pipeline.storage import open_storage


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_input(tmp_path / "in", users(50), name="a.parquet")
    write_input(tmp_path / "in", users(33, first=50), name="b.parquet")
    return a_job(job_data(tmp_path))


def read_all(job: Job, plan: Plan, block_rows: int = 8) -> list[Block]:
    blocks = read_blocks(plan.shards, open_storage(job.input.uri), ["user_id", "f1"], block_rows)
    return [block for block in blocks if block is not None]


@pytest.mark.parametrize("block_rows", [1, 7, 10, 20, 1000])
def test_every_row_comes_once_and_in_order(job: Job, block_rows: int) -> None:
    blocks = read_all(job, a_plan(job), block_rows)
    ids = [row for block in blocks for row in block.rows["user_id"].to_pylist()]
    assert ids == list(range(83))
    assert max(block.rows.num_rows for block in blocks) <= block_rows
    assert min(block.rows.num_rows for block in blocks) > 0
    for before, after in pairwise(blocks):
        expected = before.first_row + before.rows.num_rows if before.shard == after.shard else 0
        assert after.first_row == expected


def test_only_the_columns_asked_for_are_read(job: Job) -> None:
    assert read_all(job, a_plan(job))[0].rows.schema.names == ["user_id", "f1"]


def test_none_is_handed_on(job: Job) -> None:
    first, second, *_ = a_plan(job).shards
    source = open_storage(job.input.uri)
    blocks = list(read_blocks([None, first, None, second], source, ["user_id"], 1000))
    assert [None if block is None else block.shard.index for block in blocks] == [None, 0, None, 1]


def a_file(job: Job, name: str = "a.parquet") -> Path:
    return Path(job.input.uri, f"dt={DATE}", name)


def test_a_file_that_was_written_again_stops_the_run(job: Job) -> None:
    plan = a_plan(job)
    write_input(Path(job.input.uri), users(50, first=1), name="a.parquet")
    with pytest.raises(InputChangedError, match=r"expected \d+ bytes, version .*Run again"):
        read_all(job, plan)


def test_a_file_that_is_gone_stops_the_run(job: Job) -> None:
    plan = a_plan(job)
    a_file(job, "b.parquet").unlink()
    with pytest.raises(InputChangedError, match=r"b\.parquet: gone; expected"):
        read_all(job, plan)


def test_a_file_that_changes_while_it_is_read_stops_the_run(job: Job) -> None:
    plan = a_plan(job)
    blocks = read_blocks(plan.shards[:1], open_storage(job.input.uri), ["user_id"], 5)
    next(blocks)
    os.utime(a_file(job), ns=(1, 1))
    with pytest.raises(InputChangedError):
        list(blocks)


def keep_pins(path: Path, content: bytes) -> None:
    """Change a file in a way that neither size nor time shows."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_flipped_byte_in_a_page_stops_the_run(job: Job) -> None:
    plan = a_plan(job)
    content = bytearray(a_file(job).read_bytes())
    content[60] ^= 0xFF
    keep_pins(a_file(job), bytes(content))
    with pytest.raises(InputError, match=r"rows from \d+ cannot be read .*Write the file again"):
        read_all(job, plan)


def test_another_footer_than_the_planned_one_stops_the_run(job: Job) -> None:
    """Fewer rows than the plan says, and nothing else that shows it."""
    import dataclasses

    plan = a_plan(job)
    shard = dataclasses.replace(plan.shards[0], num_rows=plan.shards[0].num_rows + 1)
    with pytest.raises(InputError, match=r"30 rows in row groups \(0, 1, 2\); expected 31"):
        read_all(job, dataclasses.replace(plan, shards=(shard,)))


def test_a_sample_comes_from_everywhere_and_is_the_same_each_time(job: Job) -> None:
    plan, source = a_plan(job), open_storage(job.input.uri)
    sample = sample_rows(plan, source, ["user_id"], 30, seed=3)["user_id"].to_pylist()
    assert len(sample) == len(set(sample)) == 30
    assert len({row // 10 for row in sample}) >= 6
    assert sample == sample_rows(plan, source, ["user_id"], 30, seed=3)["user_id"].to_pylist()
    assert sample != sample_rows(plan, source, ["user_id"], 30, seed=4)["user_id"].to_pylist()


def test_a_sample_larger_than_the_input_is_all_of_it(job: Job) -> None:
    sample = sample_rows(a_plan(job), open_storage(job.input.uri), ["user_id"], 10_000, seed=0)
    assert np.array_equal(np.sort(sample["user_id"].to_numpy()), np.arange(83))
