"""Rows that crash, hang or bloat the process that scores them: they alone are lost."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pipeline_cases import (
    DATE,
    LAYOUT,
    a_job,
    a_plan,
    encoded,
    images_data,
    job_data,
    photo,
    scoring_tools,
    users,
    write_input,
)
from poison_cases import CRASH, EAT, HANG, SLOW, TORN

from engines.demo_models import write_ranking_onnx
from engines.devices import this_cpu
from engines.model import fingerprint_model
from flows.demo_data import write_users
from flows.lanes import LocalLanes
from flows.night import run_night
from pipeline.config import Job
from pipeline.engine import get_engine, request_for
from pipeline.lane import Lane, LaneDevice
from pipeline.lane_messages import LaneSetup, PoisonRow, WatchLimits
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.poison import keep_poison_out
from pipeline.read import BlockReader
from pipeline.run import Night
from pipeline.storage import open_storage
from pipeline.verify import verify_published

pytestmark = pytest.mark.timeout(300)
NUM_ROWS, SHARD_ROWS, BLOCK_ROWS = 400, 100, 8
LIMITS = WatchLimits(hang_s=6.0, rows_per_s=1e6, max_rss_bytes=1 << 30)
PATIENT = dataclasses.replace(LIMITS, hang_s=60.0)
"""For rows that take memory: on a busy machine that takes longer than a row may hang."""
DEVICE = LaneDevice(name="cpu", num_threads=1)
AHEAD = ("poison_cases",)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users without poison, and the demo's ranking model."""
    root = tmp_path_factory.mktemp("poison")
    write_users(root / "raw", DATE, num_rows=NUM_ROWS, num_files=1)
    table = pq.read_table(root / "raw" / f"dt={DATE}" / "users-0.parquet")
    columns = [pc.fill_null(column, 0) for column in table.columns]
    columns = [
        pc.replace_with_mask(
            column, pc.invert(pc.is_finite(column)).combine_chunks(), pa.scalar(0, column.type)
        )
        if pa.types.is_floating(column.type)
        else column
        for column in columns
    ]
    write_input(root / "in", pa.table(columns, table.schema.names), rows_per_group=SHARD_ROWS)
    write_ranking_onnx(root / "model.onnx")
    job = job_for(root, root)
    setup_for(job, a_plan(job))  # builds the engine: from rows that do no harm
    return root


def job_for(demo: Path, root: Path) -> Job:
    return a_job(
        job_data(root),
        model={"source": str(demo / "model.onnx")},
        engine={
            "store": str(demo / "engines"),
            "calibration": {"rows": 64},
            "gate": {"rows": 64, "min_agreement": 0.9},
        },
        lanes={"shard_rows": SHARD_ROWS, "block_rows": BLOCK_ROWS},
    )


def with_poison(
    demo: Path,
    root: Path,
    poison: dict[int, float],
    *,
    column: str = "f00",
    rows_per_group: int = SHARD_ROWS,
) -> Job:
    """The job on the same users, some of which do harm."""
    (path,) = (demo / "in").rglob("*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    values = table.column(place).to_numpy().copy()
    for row, kind in poison.items():
        values[row] = kind
    field = table.schema.field(place)
    write_input(
        root / "in",
        table.set_column(place, field, pa.array(values, field.type)),
        rows_per_group=rows_per_group,
    )
    return job_for(demo, root)


def setup_for(job: Job, plan: Plan, **changes: Any) -> LaneSetup:
    request = request_for(job, plan.num_features, this_cpu(1))
    fingerprint = fingerprint_model(request.model)
    setup = LaneSetup(
        job=job,
        engine=get_engine(job, plan, request, fingerprint, lambda _: None).engine,
        feature_columns=plan.feature_columns,
        num_features=plan.num_features,
        layout=LAYOUT,
        run_id="run",
        attempt="attempt",
        num_threads=1,
        limits=LIMITS,
    )
    return dataclasses.replace(setup, **changes)


@pytest.fixture
def start_lane() -> Iterator[Callable[[], Lane]]:
    lanes: list[Lane] = []

    def start() -> Lane:
        lanes.append(Lane(DEVICE, AHEAD))
        return lanes[-1]

    yield start
    for lane in lanes:
        lane.abort()


def ledger_of(job: Job) -> Ledger:
    return Ledger(open_storage(job.output.uri), job.name, "run")


def quarantined(job: Job) -> dict[int, str]:
    """Row of the file -> reason, as quarantine parts say."""
    ledger, output = ledger_of(job), open_storage(job.output.uri)
    found = {}
    for record in ledger.records().values():
        if record.quarantine:
            data = output.read(ledger.part_path(record.quarantine))
            assert data is not None
            for row in pq.read_table(io.BytesIO(data)).to_pylist():
                assert len(row["sha256"]) == 64
                assert row["stage"] == "score"
                found[row["row"]] = row["reason"]
    return found


def scored_ids(job: Job) -> list[int]:
    """Of committed parts: a process may die after it has uploaded one and before it commits."""
    ledger = ledger_of(job)
    paths = [ledger.part_path(record.part) for record in ledger.records().values()]
    parts = [pq.read_table(Path(job.output.uri, path)) for path in paths]
    return sorted(i for part in parts for i in part["user_id"].to_pylist())


@pytest.mark.parametrize(
    ("poison", "expected"),
    [
        ({137: CRASH}, {137: "crashed"}),
        ({0: CRASH}, {0: "crashed"}),
        ({210: HANG}, {210: "hung"}),
        ({399: EAT}, {399: "out_of_memory"}),
        ({16: CRASH, 18: CRASH, 301: HANG}, {16: "crashed", 18: "crashed", 301: "hung"}),
    ],
    ids=["crash", "first-row", "hang", "memory", "several"],
)
def test_only_the_rows_that_do_harm_are_lost(
    start_lane: Callable[[], Lane],
    demo: Path,
    tmp_path: Path,
    poison: dict[int, float],
    expected: dict[int, str],
) -> None:
    job = with_poison(demo, tmp_path, poison)
    plan = a_plan(job)
    lane = start_lane()
    lane.open(setup_for(job, plan, limits=LIMITS if HANG in poison.values() else PATIENT))
    records = lane.score(plan.shards)
    assert quarantined(job) == expected
    (path,) = (tmp_path / "in").rglob("*.parquet")
    ids = pq.read_table(path)["user_id"].to_pylist()
    assert scored_ids(job) == sorted(ids[row] for row in range(NUM_ROWS) if row not in expected)
    assert sum(record.num_rows for record in records) == NUM_ROWS
    known = {(row.shard * SHARD_ROWS + row.row): row.reason for row in ledger_of(job).poison()}
    assert known == expected
    assert lane.num_restarts <= 6 * len(poison)


def test_a_block_of_slow_rows_is_scored_in_the_end_and_costs_no_row(
    start_lane: Callable[[], Lane], demo: Path, tmp_path: Path
) -> None:
    """A block of them takes 2.4 s, more than it may; each of them alone does not."""
    job = with_poison(demo, tmp_path, dict.fromkeys(range(108, 116), SLOW))
    plan = a_plan(job)
    lane = start_lane()
    lane.open(setup_for(job, plan, limits=dataclasses.replace(LIMITS, hang_s=1.5)))
    assert sum(record.num_rows for record in lane.score(plan.shards)) == NUM_ROWS
    assert not quarantined(job)
    assert not ledger_of(job).poison()
    assert lane.num_restarts > 0


def test_a_row_that_hangs_among_slow_ones_is_the_only_one_that_is_lost(
    start_lane: Callable[[], Lane], demo: Path, tmp_path: Path
) -> None:
    poison = dict.fromkeys(range(108, 116), SLOW) | {111: HANG}
    job = with_poison(demo, tmp_path, poison)
    plan = a_plan(job)
    lane = start_lane()
    lane.open(setup_for(job, plan, limits=dataclasses.replace(LIMITS, hang_s=1.5)))
    lane.score(plan.shards)
    assert quarantined(job) == {111: "hung"}


def test_a_resume_does_not_try_known_poison_again(
    start_lane: Callable[[], Lane], demo: Path, tmp_path: Path
) -> None:
    job = with_poison(demo, tmp_path, {137: CRASH})
    plan = a_plan(job)
    known = PoisonRow(shard=1, row=37, reason="crashed", message="exit code -11 (SIGSEGV)")
    ledger_of(job).note_poison(known)
    assert ledger_of(job).poison() == (known,)
    lane = start_lane()
    lane.open(setup_for(job, plan, poison=ledger_of(job).poison()))
    lane.score(plan.shards)
    assert quarantined(job) == {137: "crashed"}
    assert lane.num_restarts == 0


@pytest.mark.parametrize(
    ("harm", "reason"), [(CRASH, "crashed"), (EAT, "out_of_memory")], ids=["crash", "memory"]
)
def test_a_row_group_that_harms_its_reader_is_lost_and_no_other_row(
    start_lane: Callable[[], Lane], demo: Path, tmp_path: Path, harm: float, reason: str
) -> None:
    job = with_poison(demo, tmp_path, {150: harm + TORN}, column="f01", rows_per_group=20)
    plan = a_plan(job)
    lane = start_lane()
    lane.open(setup_for(job, plan, limits=PATIENT))
    lane.score(plan.shards)
    assert len(scored_ids(job)) == NUM_ROWS - 20
    (known,) = ledger_of(job).poison()
    assert (known.shard, known.row, known.group_rows, known.reason) == (1, 40, 20, reason)
    (record,) = [one for one in ledger_of(job).records().values() if one.num_quarantined]
    assert record.reasons == {"row_group_unreadable": 20}
    assert lane.num_restarts <= 3
    again = start_lane()  # whoever resumes does not try it again
    again.open(setup_for(job, plan, run_id="again", poison=(known,)))
    assert sum(record.num_scored for record in again.score(plan.shards)) == NUM_ROWS - 20
    assert again.num_restarts == 0


def test_a_whole_night_with_a_poison_row_is_published_and_verified(
    demo: Path, tmp_path: Path
) -> None:
    class Silent:
        def say(self, text: str) -> None: ...
        def start(self, num_rows: int, num_done: int) -> None: ...
        def update(self, times: object) -> None: ...
        def expect(self, end: str) -> None: ...
        def stop(self) -> None: ...

    job = with_poison(demo, tmp_path, {8: CRASH})
    report = run_night(Night(job=job, date=DATE), Silent(), lanes=LocalLanes([Lane(DEVICE, AHEAD)]))
    assert report.quarantined_by_reason == {"crashed": 1}
    assert report.scored == NUM_ROWS - 1
    (sample,) = report.quarantine_samples
    assert (sample.row, sample.reason) == (8, "crashed")
    assert "SIGSEGV" in sample.message
    verdict = verify_published(job.output.uri, job.name, DATE)
    assert (verdict["scored"], verdict["quarantined"]) == (NUM_ROWS - 1, 1)


def test_poison_is_null_for_the_decoder_and_told_with_its_digest(tmp_path: Path) -> None:
    images = [encoded(photo(seed=seed)) for seed in range(5)]
    table = pa.table({"user_id": range(5), "image": pa.array(images, pa.binary())})
    write_input(tmp_path / "in", table, rows_per_group=5)
    job = a_job(images_data(tmp_path))
    (shard,) = a_plan(job).shards
    blocks = BlockReader(
        source=open_storage(job.input.uri), columns=["user_id", "image"], block_rows=2
    ).blocks([shard])
    rows = [PoisonRow(shard=0, row=row, reason="hung", message="no answer") for row in (0, 3)]
    kept = list(keep_poison_out(blocks, rows, ["image"]))
    assert [sorted(block.poison) for block in kept if block] == [[0], [1], []]
    found = [block.rows["image"].to_pylist() for block in kept if block]
    assert found == [[None, images[1]], [images[2], None], [images[4]]]
    assert [block.rows["user_id"].to_pylist() for block in kept if block] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32(), 2), pa.float32(), pa.float64(), pa.int32()]
)
def test_features_of_every_type_can_be_kept_out(tmp_path: Path, kind: pa.DataType) -> None:
    if pa.types.is_fixed_size_list(kind):
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(20, dtype=np.float32)), 2)
    else:
        values = pa.array(np.arange(10), kind)
    table = pa.table({"user_id": range(10), "f0": values})
    write_input(tmp_path / "in", table, rows_per_group=10)
    job = a_job(job_data(tmp_path))
    plan = a_plan(job)
    tools = scoring_tools(job, plan, runner=None)
    blocks = BlockReader(
        source=open_storage(job.input.uri), columns=tools.columns, block_rows=10
    ).blocks(plan.shards)
    row = PoisonRow(shard=0, row=4, reason="crashed", message="x")
    (block,) = keep_poison_out(blocks, [row], tools.decoder.columns)
    assert block is not None
    assert block.rows["f0"].null_count == 1
    assert not block.rows["f0"][4].is_valid
    _, bad_rows = tools.decoder.decode(block.rows)
    assert list(bad_rows) == [4]
    assert len(block.poison[4].sha256) == 64


def test_without_poison_blocks_are_passed_on_as_they_are(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(20))
    job = a_job(job_data(tmp_path))
    plan = a_plan(job)
    blocks = list(
        BlockReader(source=open_storage(job.input.uri), columns=["f0"], block_rows=10).blocks(
            plan.shards
        )
    )
    other = PoisonRow(shard=99, row=4, reason="crashed", message="x")
    for poison in ([], [other]):
        kept = list(keep_poison_out([*blocks, None], poison, ["f0"]))
        assert all(mine is theirs for mine, theirs in zip(kept, [*blocks, None], strict=True))
