"""Reading shards: every row, in order, of the file that was planned."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pipeline_cases import DATE, a_job, a_plan, job_data, users, write_input

from pipeline.blocks import Block
from pipeline.config import Job
from pipeline.errors import InputChangedError, InputError, StoreUnavailableError
from pipeline.local_storage import LocalStorage
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


def damage(job: Job, group: int, column: int = 0) -> None:
    """Flip a byte in a page."""
    path = a_file(job)
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    content = bytearray(path.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content[begin + chunk.total_compressed_size - 1] ^= 0xFF
    keep_pins(path, bytes(content))


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_damaged_row_group_costs_its_rows_and_no_other(job: Job, group: int) -> None:
    plan = a_plan(job)
    shard = plan.shards[0]
    assert shard.row_groups == (0, 1, 2)
    damage(job, group)
    source = open_storage(job.input.uri)
    blocks = [block for block in read_blocks([shard], source, ["user_id", "f0"], 4) if block]
    begun = max(index for index, block in enumerate(blocks) if block.first_row == 0)
    told = blocks[begun:]
    assert sum(block.rows.num_rows for block in told) == shard.num_rows
    lost = {block.first_row + slot for block in told for slot in block.poison}
    assert lost == set(range(10 * group, 10 * group + 10))
    ids = {
        block.first_row + slot: value
        for block in told
        for slot, value in enumerate(block.rows["user_id"].to_pylist())
    }
    assert ids == {row: None if row in lost else row for row in range(30)}
    (why,) = {row for block in told for row in block.poison.values()}
    assert (why.stage, why.reason, why.sha256) == ("read", "row_group_unreadable", "")
    assert why.message.startswith(f"row group {group}: ")


def test_a_store_that_cannot_be_read_costs_no_row(job: Job) -> None:
    """What looks like damage is none when the bytes cannot be had at all."""
    plan = a_plan(job)
    damage(job, 1)

    class Broken(LocalStorage):
        def open(self, path: str) -> Any:
            file = super().open(path)

            class Failing:
                closed = False

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)  # Arrow takes `read_buffer`

                def read(self, _: int = -1) -> bytes:
                    raise OSError(5, "Input/output error")

            return Failing()

    with pytest.raises(StoreUnavailableError, match=r"Input/output error.*same command goes on"):
        list(read_blocks(plan.shards, Broken(job.input.uri), ["user_id"], 5))


def test_a_sample_leaves_damaged_groups_out(job: Job) -> None:
    plan, source = a_plan(job), open_storage(job.input.uri)
    damage(job, 1)
    sample = sample_rows(plan, source, ["user_id"], 10_000, seed=0)["user_id"].to_pylist()
    assert sorted(sample) == [row for row in range(83) if not 10 <= row < 20]


def test_a_sample_of_nothing_but_damage_says_so(job: Job) -> None:
    plan, source = a_plan(job), open_storage(job.input.uri)
    for file in plan.files:
        path = Path(job.input.uri, file.path)
        size = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
        content = bytearray(path.read_bytes())
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        content[size:footer] = bytes(footer - size)
        keep_pins(path, bytes(content))
    with pytest.raises(InputError, match="no row group can be read"):
        sample_rows(plan, source, ["user_id"], 100, seed=0)


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
