"""Reading shards: every row, in order, of the file that was planned."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_inputs import with_encrypted
from pipeline_cases import DATE, a_job, a_plan, job_data, users, write_input

from pipeline import read_ahead
from pipeline.blocks import Block
from pipeline.config import Job
from pipeline.errors import InputChangedError, InputError, StoreUnavailableError
from pipeline.local_storage import LocalStorage
from pipeline.plan import Plan, Shard
from pipeline.read import BlockReader, sample_rows
from pipeline.read_ahead import RangedFile, ReadAhead
from pipeline.storage import Known, open_storage


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_input(tmp_path / "in", users(50), name="a.parquet")
    write_input(tmp_path / "in", users(33, first=50), name="b.parquet")
    return a_job(job_data(tmp_path))


@pytest.fixture(params=[False, True], ids=["near", "far"])
def _near_and_far(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A disk, and one that is read as a bucket is."""
    with ThreadPoolExecutor(4) as pool:
        if request.param:
            monkeypatch.setattr(LocalStorage, "is_far", True)
            monkeypatch.setattr(LocalStorage, "open", ranged(pool))
            monkeypatch.setattr(read_ahead, "PIECE_BYTES", 300)
        yield


def ranged(pool: ThreadPoolExecutor) -> Callable[..., RangedFile]:
    """Opens files whose ranges come from other threads, a moment later."""

    def open_file(self: LocalStorage, path: str, known: Known | None = None) -> RangedFile:
        del known
        content = Path(self.uri, path).read_bytes()

        def bring(first: int, end: int) -> bytes:
            time.sleep(0.001)
            return content[first:end]

        def fetch(first: int, end: int) -> Future[bytes]:
            return pool.submit(bring, first, end)

        return RangedFile(fetch, len(content), ReadAhead(1_000))

    return open_file


def read_all(job: Job, plan: Plan, block_rows: int = 8) -> list[Block]:
    blocks = BlockReader(
        source=open_storage(job.input.uri), columns=["user_id", "f1"], block_rows=block_rows
    ).blocks(plan.shards)
    return [block for block in blocks if block is not None]


@pytest.mark.usefixtures("_near_and_far")
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


@pytest.mark.usefixtures("_near_and_far")
def test_none_is_handed_on(job: Job) -> None:
    first, second, *_ = a_plan(job).shards
    source = open_storage(job.input.uri)
    blocks = list(
        BlockReader(source=source, columns=["user_id"], block_rows=1000).blocks(
            [None, first, None, second]
        )
    )
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


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_object_that_was_written_again_stops_the_run(
    job: Job, s3_folder: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """No look before and after is needed: each request asks for the planned version."""
    monkeypatch.setattr("pipeline.read_ahead.PIECE_BYTES", 100)
    monkeypatch.setattr("pipeline.object_storage.AHEAD_BYTES", 100)
    name = f"dt={DATE}/a.parquet"
    storage = open_storage(s3_folder)
    storage.create(name, a_file(job).read_bytes())
    bucket = a_job({**job.model_dump(), "input": {**job.input.model_dump(), "uri": s3_folder}})
    reader = BlockReader(source=open_storage(s3_folder), columns=["user_id", "f0"], block_rows=5)
    blocks = reader.blocks(a_plan(bucket).shards)
    if when == "meanwhile":
        next(blocks)
    storage.delete(name)
    storage.create(name, a_file(job, "b.parquet").read_bytes())
    with pytest.raises(InputChangedError, match=r"expected .*version .*Run again"):
        list(blocks)


@pytest.mark.usefixtures("_near_and_far")
def test_no_shard_is_begun_when_it_is_over_and_none_stays_open(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []
    opened = LocalStorage.open

    def remembering(self: LocalStorage, path: str, known: Known | None = None) -> Any:
        files.append(opened(self, path, known))
        return files[-1]

    monkeypatch.setattr(LocalStorage, "open", remembering)
    shards, over = a_plan(job).shards, threading.Event()
    reader = BlockReader(source=open_storage(job.input.uri), columns=["user_id"], block_rows=5)
    blocks = reader.blocks(shards, over.is_set)
    first = next(blocks)
    assert first is not None
    over.set()
    assert {block.shard.index for block in blocks if block is not None} == {first.shard.index}
    assert len(shards) > 2
    assert all(file.closed for file in files)


def test_shards_far_away_are_opened_side_by_side(job: Job) -> None:
    together = threading.Barrier(4)

    class Far(LocalStorage):
        is_far = True

        def open(self, path: str, known: Known | None = None) -> BinaryIO:
            together.wait(10)
            return super().open(path, known)

    shards = a_plan(job).shards[:4]
    reader = BlockReader(source=Far(job.input.uri), columns=["user_id"], block_rows=100)
    found = [block for block in reader.blocks(shards) if block is not None]
    assert [block.shard for block in found] == list(shards)


def test_a_file_that_changes_while_it_is_read_stops_the_run(job: Job) -> None:
    plan = a_plan(job)
    blocks = BlockReader(
        source=open_storage(job.input.uri), columns=["user_id"], block_rows=5
    ).blocks(plan.shards[:1])
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


def told(job: Job, shard: Shard, **options: Any) -> list[Block]:
    """The blocks that count: those since the shard was begun anew."""
    source = open_storage(job.input.uri)
    blocks = list(
        BlockReader(source=source, columns=["user_id", "f0"], block_rows=4, **options).blocks(
            [shard]
        )
    )
    return [block for block in blocks if block and block.shard is blocks[-1].shard]  # type: ignore[union-attr]


def ids_of(blocks: list[Block]) -> dict[int, int]:
    """Row of the shard -> id."""
    return {
        block.first_row + slot: value
        for block in blocks
        for slot, value in enumerate(block.rows["user_id"].to_pylist())
    }


@pytest.mark.usefixtures("_near_and_far")
@pytest.mark.parametrize("groups", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_a_damaged_row_group_costs_its_rows_and_no_other(job: Job, groups: tuple[int]) -> None:
    shard = a_plan(job).shards[0]
    assert shard.row_groups == (0, 1, 2)
    for group in groups:
        damage(job, group)
    blocks = told(job, shard)
    lost = {row for group in groups for row in range(10 * group, 10 * group + 10)}
    assert ids_of(blocks) == {row: row for row in range(30) if row not in lost}
    assert [block.is_last for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert not any(block.poison for block in blocks)
    for group, why in zip(groups, blocks[0].shard.lost, strict=True):
        assert (why.first_row, why.num_rows) == (10 * group, 10)
        assert why.reason == "row_group_unreadable"
        assert why.message.startswith(f"row group {group}: ")
        assert "CRC" in why.message


@pytest.mark.usefixtures("_near_and_far")
def test_a_shard_of_damage_only_travels_as_one_row_without_content(job: Job) -> None:
    shard = a_plan(job).shards[0]
    for group in range(3):
        damage(job, group)
    (block,) = told(job, shard)
    assert (block.rows.num_rows, block.is_last, block.shard.end_row) == (1, True, 0)
    assert block.rows.to_pylist() == [{"user_id": None, "f0": None}]
    assert block.poison[0].reason == "row_group_unreadable"
    assert sum(lost.num_rows for lost in block.shard.lost) == shard.num_rows


@pytest.mark.usefixtures("_near_and_far")
def test_a_row_group_that_promises_too_much_is_not_read(job: Job) -> None:
    write_input(Path(job.input.uri), users(30), name="a.parquet", rows_per_group=14)
    job = a_job(job.model_dump(), lanes={"shard_rows": 30})
    (shard, _) = a_plan(job).shards
    assert shard.row_groups == (0, 1, 2)
    group = pq.ParquetFile(a_file(job)).metadata.row_group(2)  # of two rows
    read = [group.column(column) for column in (0, 1)]
    small = sum(max(one.total_compressed_size, one.total_uncompressed_size) for one in read)
    blocks = told(job, shard, max_group_bytes=small)
    (first, second) = blocks[0].shard.lost
    assert (first.first_row, second.first_row, blocks[0].first_row) == (0, 14, 28)
    assert first.reason == "row_group_too_large"
    assert "row group 0 promises 14 rows of " in first.message
    assert "limits.max_group_gib" in first.message
    assert ids_of(blocks) == {28: 28, 29: 29}


@pytest.mark.usefixtures("_near_and_far")
def test_a_column_that_is_encrypted_costs_the_rows_of_its_file(job: Job) -> None:
    a_file(job).write_bytes(with_encrypted(users(50), 10, "f0"))
    plan, source = a_plan(job), open_storage(job.input.uri)
    (block,) = told(job, plan.shards[0])
    assert {lost.num_rows for lost in block.shard.lost} == {10}
    assert "a column of the job is encrypted" in block.poison[0].message
    sample = sample_rows(plan, source, ["user_id", "f0"], 10_000, seed=0)["user_id"].to_pylist()
    assert sorted(sample) == list(range(50, 83))
    assert ids_of(read_all(job, plan, 50)[:1]) == {row: row for row in range(30)}  # not of f0


def test_what_pyarrow_delivers_beyond_the_promise_is_never_let_out(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = a_plan(job).shards[0]
    whole = pq.ParquetFile.iter_batches

    def more(self: Any, *args: Any, **options: Any) -> Any:
        yield from whole(self, *args, **options)
        yield from whole(self, 4, row_groups=[0], columns=["user_id"])

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", more)
    source = open_storage(job.input.uri)
    blocks = list(BlockReader(source=source, columns=["user_id"], block_rows=4).blocks([shard]))
    assert not any(block.is_last for block in blocks if block and not block.shard.lost)
    assert blocks[-1] is not None
    assert [lost.message for lost in blocks[-1].shard.lost] == [
        f"row group {group}: 20 rows of 10 that it promises" for group in range(3)
    ]


def test_a_moment_without_the_store_is_no_damage(job: Job) -> None:
    """The first reads fail, later ones do not: every row comes."""
    shard = a_plan(job).shards[0]
    failures = 3

    class Shaky(LocalStorage):
        def open(self, path: str, known: Known | None = None) -> Any:
            file = super().open(path, known)

            class Failing:
                closed = False

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def read(self, size: int = -1) -> bytes:
                    nonlocal failures
                    if size != 8 and file.tell() < 2_000 and failures:
                        failures -= 1
                        raise OSError(5, "Input/output error")
                    return file.read(size)

            return Failing()

    blocks = list(
        BlockReader(source=Shaky(job.input.uri), columns=["user_id"], block_rows=5).blocks([shard])
    )
    assert blocks[-1] is not None
    assert blocks[-1].shard.lost == ()
    assert blocks[-1].is_last


@pytest.mark.usefixtures("_near_and_far")
def test_a_store_that_cannot_be_read_costs_no_row(job: Job) -> None:
    """What looks like damage is none when the bytes cannot be had at all."""
    plan = a_plan(job)
    damage(job, 1)

    class Broken(LocalStorage):
        def open(self, path: str, known: Known | None = None) -> Any:
            file = super().open(path, known)

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
        list(
            BlockReader(source=Broken(job.input.uri), columns=["user_id"], block_rows=5).blocks(
                plan.shards
            )
        )


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


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
def test_a_sample_larger_than_the_input_is_all_of_it(
    monkeypatch: pytest.MonkeyPatch, job: Job, piece_bytes: int
) -> None:
    monkeypatch.setattr("pipeline.row_groups.SAMPLED_BYTES", piece_bytes)
    sample = sample_rows(a_plan(job), open_storage(job.input.uri), ["user_id"], 10_000, seed=0)
    assert np.array_equal(np.sort(sample["user_id"].to_numpy()), np.arange(83))


@pytest.mark.parametrize("kind", [pa.float64(), pa.int32(), pa.int64(), pa.float16()])
def test_a_sample_may_come_from_files_with_numbers_of_other_widths(
    job: Job, kind: pa.DataType
) -> None:
    table = users(20, first=83)
    not_null = pa.schema([pa.field(each.name, each.type, nullable=False) for each in table.schema])
    write_input(Path(job.input.uri), table.cast(not_null), name="c.parquet")
    table = users(20, first=103)
    table = table.set_column(1, "f0", table["f0"].cast(kind))
    write_input(Path(job.input.uri), table, name="d.parquet")
    source = open_storage(job.input.uri)
    sample = sample_rows(a_plan(job), source, ["user_id", "f0"], 10_000, seed=0)
    assert sorted(sample["f0"].cast(pa.int64()).to_pylist()) == list(range(123))


def test_a_sample_of_columns_that_cannot_be_one_says_so(job: Job) -> None:
    table = users(20).append_column("label", pa.array(["yes"] * 20))
    write_input(Path(job.input.uri), table, name="a.parquet")
    table = users(20).append_column("label", pa.array([1] * 20))
    write_input(Path(job.input.uri), table, name="b.parquet")
    with pytest.raises(InputError, match=r"Field label has .+; expected columns that are alike"):
        sample_rows(a_plan(job), open_storage(job.input.uri), ["label"], 100, seed=0)
