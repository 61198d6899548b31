"""Plans: which files, which shards, which run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pipeline_cases import DATE, a_job, a_plan, images_data, job_data, users, write_input

from pipeline.config import Job
from pipeline.errors import GuardError, InputError
from pipeline.guards import Guards, lost_files
from pipeline.plan import Shard, make_plan, run_id_of, shuffled
from pipeline.storage import open_storage


def planning_fails(job: Job, kind: type[Exception] = InputError) -> str:
    with pytest.raises(kind) as caught:
        a_plan(job)
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is kind
    return message


def test_all_files_of_the_date_are_planned_and_no_others(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "sub/c.parq", "d.pq"):
        write_input(tmp_path / "in", users(5), name=name)
    for hidden in ("_SUCCESS.parquet", ".tmp.parquet", "_delta_log/x.parquet", ".s/y.parquet"):
        write_input(tmp_path / "in", users(5), name=hidden)
    (tmp_path / "in" / f"dt={DATE}" / "notes.txt").write_text("not data")
    write_input(tmp_path / "in", users(5), folder="dt=2026-11-21")
    write_input(tmp_path / "in", users(5), folder=f"dt={DATE}-old")
    plan = a_plan(a_job(job_data(tmp_path)))
    names = [file.path.removeprefix(f"dt={DATE}/") for file in plan.files]
    assert names == ["a.parquet", "b.parquet", "d.pq", "sub/c.parq"]
    assert plan.num_rows == 20


def test_rows_behind_links_are_planned(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), name="a.parquet")
    write_input(tmp_path / "volume", users(7), folder="hour=1")
    (tmp_path / "in" / f"dt={DATE}" / "hour=1").symlink_to(tmp_path / "volume" / "hour=1")
    assert a_plan(a_job(job_data(tmp_path))).num_rows == 12
    (tmp_path / "volume").rename(tmp_path / "unmounted")
    assert "which is not there; expected a file" in planning_fails(a_job(job_data(tmp_path)))


def test_a_name_that_is_no_text_is_told_in_ascii(tmp_path: Path) -> None:
    path = write_input(tmp_path / "in", users(5))
    os.rename(path, os.fsencode(path.parent) + b"/\xff.parquet")
    said = planning_fails(a_job(job_data(tmp_path)))
    assert f"a file named 'dt={DATE}/\\udcff.parquet'; expected names in UTF-8" in said


def test_without_a_partition_the_whole_folder_is_planned(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), folder=".")
    write_input(tmp_path / "in", users(7), folder="more")
    plan = a_plan(a_job(job_data(tmp_path), input={"partition": None}))
    assert plan.num_rows == 12


def test_partitions_may_be_nested(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), folder=f"eu/day={DATE}/hour=1")
    write_input(tmp_path / "in", users(6), folder=f"us/day={DATE}/hour=1")
    assert a_plan(a_job(job_data(tmp_path), input={"partition": "eu/day={date}"})).num_rows == 5


@pytest.mark.parametrize(
    ("num_rows", "target", "sizes"),
    [
        (100, 20, [20, 20, 20, 20, 20]),
        (100, 1000, [100]),
        (100, 1, [10] * 10),  # a row group is never split
        (95, 30, [40, 30, 25]),
        (7, 20, [7]),
        (110, 50, [60, 50]),
    ],
)
def test_shards_are_balanced_and_never_split_a_row_group(
    tmp_path: Path, num_rows: int, target: int, sizes: list[int]
) -> None:
    write_input(tmp_path / "in", users(num_rows), rows_per_group=10)
    plan = a_plan(a_job(job_data(tmp_path), lanes={"shard_rows": target}))
    assert sorted(shard.num_rows for shard in plan.shards) == sorted(sizes)
    groups = [group for shard in plan.shards for group in shard.row_groups]
    assert groups == list(range(-(-num_rows // 10)))
    ends = [shard.first_row + shard.num_rows for shard in plan.shards]
    assert [shard.first_row for shard in plan.shards] == [0, *ends[:-1]]
    assert ends[-1] == num_rows


def test_shards_are_numbered_over_all_files_and_never_cross_one(tmp_path: Path) -> None:
    for number, num_rows in enumerate((45, 3, 0, 60)):
        write_input(tmp_path / "in", users(num_rows), name=f"{number}.parquet")
    plan = a_plan(a_job(job_data(tmp_path)))
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    assert sum(shard.num_rows for shard in plan.shards) == plan.num_rows == 108
    assert all(shard.num_rows > 0 for shard in plan.shards)
    assert plan.shards[-1].name == f"{len(plan.shards) - 1:05d}"
    by_file = {shard.file.path[-9:]: 0 for shard in plan.shards}
    assert set(by_file) == {"0.parquet", "1.parquet", "3.parquet"}


def test_empty_row_groups_are_harmless(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "in" / f"dt={DATE}" / "x.parquet"
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, users(1).schema) as writer:
        for num_rows in (0, 15, 0, 0, 25, 0):
            writer.write_table(users(num_rows))
    plan = a_plan(a_job(job_data(tmp_path)))
    assert sum(shard.num_rows for shard in plan.shards) == 40
    assert all(shard.num_rows > 0 for shard in plan.shards)


def test_the_run_id_stays_when_nothing_has_changed(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(50))
    job = a_job(job_data(tmp_path))
    run_id = run_id_of(a_plan(job), job, "engine")
    assert run_id.startswith(f"{DATE}-")
    again = a_job(
        job_data(tmp_path),
        output={"uri": str(tmp_path / "elsewhere")},
        limits={"max_quarantined": 0.5},
        cost={"market": "spot"},
        lanes={"shard_rows": 20, "threads": 1},
    )
    assert run_id_of(a_plan(again), again, "engine") == run_id


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"lanes": {"shard_rows": 10}},
        {"input": {"passthrough": ["user_id", "f0"]}},
        {"input": {"features": {"columns": ["f*"], "fill_missing": 0}}},
        {"model": {"source": "other.onnx"}},
        {"model": {"class_names": "names.txt"}},
        {"output": {"compression": "snappy"}},
    ],
)
def test_the_run_id_changes_with_what_decides_the_output(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_input(tmp_path / "in", users(50))
    data = job_data(tmp_path)
    job = a_job(data)
    name = changes.pop("name", "users")
    other = a_job({**data, "name": name}, **changes)
    assert run_id_of(a_plan(other), other, "e") != run_id_of(a_plan(job), job, "e")


@pytest.mark.parametrize(
    "lanes", [{"cpu_decoder": "dali"}, {"gpu_decode": {"enabled": False}}], ids=["cpu", "gpu"]
)
def test_the_run_id_changes_with_the_decoder(tmp_path: Path, lanes: dict[str, Any]) -> None:
    write_input(tmp_path / "in", pa.table({"user_id": [1], "image": [b"x"]}))
    job, other = a_job(images_data(tmp_path)), a_job(images_data(tmp_path), lanes=lanes)
    assert run_id_of(a_plan(other), other, "e") != run_id_of(a_plan(job), job, "e")


def test_the_run_id_changes_with_engine_date_and_input(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_input(root, users(50))
    write_input(root, users(50), folder="dt=2026-11-21")
    job = a_job(job_data(tmp_path))
    ids = {run_id_of(a_plan(job), job, engine) for engine in ("e1", "e2")}
    ids.add(run_id_of(a_plan(job), job, "e1", ["cat", "dog"]))
    ids.add(run_id_of(make_plan(job, "2026-11-21", open_storage(job.input.uri)), job, "e1"))
    write_input(root, users(50, first=1))
    ids.add(run_id_of(a_plan(job), job, "e1"))
    write_input(root, users(1), name="more.parquet")
    ids.add(run_id_of(a_plan(job), job, "e1"))
    assert len(ids) == 6


def test_a_date_without_data_is_said_to_have_none(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(5), folder="dt=2026-11-21")
    assert f"dt={DATE}: no *.parquet files for {DATE}" in planning_fails(a_job(job_data(tmp_path)))


def test_files_without_rows_are_said_to_have_none(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(0))
    assert "0 rows in 1 files; expected rows" in planning_fails(a_job(job_data(tmp_path)))


def test_a_file_that_cannot_be_read_is_listed_and_the_others_are_planned(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(50), name="b.parquet")
    job = a_job(job_data(tmp_path))
    folder = tmp_path / "in" / f"dt={DATE}"
    (folder / "a.parquet").write_bytes(b"a,b\n1,2\n" * 10)  # the first that is looked at
    (folder / "c.parquet").write_bytes(b"")
    plan = a_plan(job)
    assert [file.path for file in plan.files] == [f"dt={DATE}/b.parquet"]
    assert (plan.num_rows, len(plan.shards)) == (50, 2)
    first, second = plan.unreadable
    assert (first.path, first.num_bytes) == (f"dt={DATE}/a.parquet", 80)
    assert first.version == str((folder / "a.parquet").stat().st_mtime_ns)
    assert first.message == "no Parquet magic bytes at its end"
    assert second.message == "0 bytes"


def test_a_repaired_file_makes_another_run(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(50))
    job = a_job(job_data(tmp_path))
    whole = run_id_of(a_plan(job), job, "e")
    torn = tmp_path / "in" / f"dt={DATE}" / "more.parquet"
    torn.write_bytes(b"PAR1")
    run_ids = [whole, run_id_of(a_plan(job), job, "e")]
    torn.write_bytes(b"PAR1 PAR1")
    run_ids.append(run_id_of(a_plan(job), job, "e"))
    write_input(tmp_path / "in", users(5), name="more.parquet")
    run_ids.append(run_id_of(a_plan(job), job, "e"))
    assert len(set(run_ids)) == 4
    torn.unlink()
    assert run_id_of(a_plan(job), job, "e") == whole


def test_rows_that_nobody_can_count_are_estimated_by_the_bytes_of_the_others(
    tmp_path: Path,
) -> None:
    path = write_input(tmp_path / "in", users(1000))
    job = a_job(job_data(tmp_path))
    assert a_plan(job).num_unreadable_rows == 0
    path.with_name("torn.parquet").write_bytes(path.read_bytes() * 2 + b"torn")
    assert a_plan(job).num_unreadable_rows == pytest.approx(2000, abs=2)


def test_a_file_that_lost_its_bytes_had_as_many_rows_as_the_others(tmp_path: Path) -> None:
    path = write_input(tmp_path / "in", users(1000))
    for name, num_bytes in (("torn", path.stat().st_size // 2), ("cut", 4), ("empty", 0)):
        path.with_name(f"{name}.parquet").write_bytes(path.read_bytes()[:num_bytes])
    job = a_job(job_data(tmp_path))
    assert a_plan(job).num_unreadable_rows == 3000
    guards, lost = Guards(), lost_files(a_plan(job))
    with pytest.raises(GuardError, match=r"0 of 1,000 rows, with about 3,000 in 3 files that"):
        guards.check_quarantine(job, 1000, {}, lost)


def test_a_file_that_has_no_rows_is_a_good_one(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(1000))
    write_input(tmp_path / "in", users(0), name="none.parquet")
    plan = a_plan(a_job(job_data(tmp_path)))
    assert (plan.num_rows, plan.unreadable, plan.num_unreadable_rows) == (1000, (), 0)


def test_without_a_single_file_that_can_be_read_there_is_no_plan(tmp_path: Path) -> None:
    path = write_input(tmp_path / "in", users(5))
    path.write_bytes(b"")
    path.with_name("z.parquet").write_bytes(b"")
    said = planning_fails(a_job(job_data(tmp_path)))
    assert said.startswith(f"{path}: 0 bytes; expected a Parquet file, and none of 2 can be read")


def test_a_footer_longer_than_the_first_guess_is_read(tmp_path: Path) -> None:
    from pipeline.footers import FOOTER_GUESS_BYTES

    path = write_input(tmp_path / "in", users(3000), rows_per_group=1)
    footer_bytes = int.from_bytes(path.read_bytes()[-8:-4], "little")
    assert footer_bytes > FOOTER_GUESS_BYTES
    assert a_plan(a_job(job_data(tmp_path))).num_rows == 3000


@pytest.fixture
def many_shards(tmp_path: Path) -> tuple[Shard, ...]:
    write_input(tmp_path / "in", users(400), rows_per_group=1)
    return a_plan(a_job(job_data(tmp_path), lanes={"shard_rows": 1})).shards


def test_every_attempt_takes_every_shard_once_in_an_order_of_its_own(
    many_shards: tuple[Shard, ...],
) -> None:
    orders = {shuffled(many_shards, seed) for seed in "abcd"}
    assert len(orders) == 4
    assert {frozenset(order) for order in orders} == {frozenset(many_shards)}
    assert shuffled(many_shards, "a") in orders
    assert shuffled((), "a") == ()


@pytest.mark.parametrize(("num_attempts", "most"), [(1, 400), (2, 440), (4, 480), (16, 650)])
def test_attempts_at_once_share_the_work(
    many_shards: tuple[Shard, ...], num_attempts: int, most: int
) -> None:
    """Each has three shards in work, and passes over what is committed when it begins one."""
    orders = [list(shuffled(many_shards, str(number))) for number in range(num_attempts)]
    in_work: list[list[int]] = [[] for _ in orders]
    committed: set[int] = set()
    num_scored = 0
    while len(committed) < len(many_shards):
        for order, busy in zip(orders, in_work, strict=True):
            while order and len(busy) < 3:
                shard = order.pop(0)
                if shard.index not in committed:
                    busy.append(shard.index)
                    num_scored += 1
        for busy in in_work:
            committed.update(busy[:1])
            del busy[:1]
    assert num_scored <= most
