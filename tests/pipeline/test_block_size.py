"""However slow the store is, no more rows are begun than a kill is said to cost at most."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from device_cases import SlotRunner
from pipeline_cases import a_job, a_plan, job_data, scoring_tools, users, write_input
from test_score_on_cores import CoreRunner

from pipeline.block_size import decoder_kind, rows_at_risk, rows_side_by_side
from pipeline.config import Job
from pipeline.decode_features import FeatureDecoder
from pipeline.ledger import Ledger
from pipeline.local_storage import LocalStorage
from pipeline.plan import Plan
from pipeline.score_shards import ShardScoring
from pipeline.storage import open_storage

pytestmark = pytest.mark.timeout(30)
NUM_ROWS, SHARD_ROWS, BLOCK_ROWS = 2_000, 40, 4
ENOUGH_ROUNDS = 10


class StuckLedger(Ledger):
    """Commits `num_free` shards, and the next one only when it is told to."""

    num_free = 2

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.is_stuck, self.go_on = threading.Event(), threading.Event()

    def commit(self, *arguments: Any) -> Any:
        self.num_free -= 1
        if self.num_free < 0:
            self.is_stuck.set()
            assert self.go_on.wait(20)
        return super().commit(*arguments)


def when_nothing_moves(rows_begun: Any) -> int:
    """What it says when it has said the same for a while."""
    seen, num_same = -1, 0
    while num_same < ENOUGH_ROUNDS:
        time.sleep(0.03)
        found = rows_begun()
        num_same = num_same + 1 if found == seen and found else 0
        seen = found
    return int(seen)


def rows_begun_when_stuck(job: Job, plan: Plan, num_threads: int | None, **changes: Any) -> int:
    """Rows that a night has begun when its store does not go on; then all of it is scored."""
    assert job.input.features is not None
    ledger = StuckLedger(open_storage(job.output.uri), job.name, "run")
    runner = SlotRunner((BLOCK_ROWS, 2), "float32") if num_threads is None else CoreRunner()
    tools = scoring_tools(
        job,
        plan,
        runner,
        decoder=FeatureDecoder(job.input.features, plan.feature_columns, 2, BLOCK_ROWS),
        core_threads=num_threads,
        ledger=ledger,
        **changes,
    )
    with ShardScoring(plan.shards, tools) as scoring, ThreadPoolExecutor(1) as pool:
        records = pool.submit(list, scoring)
        assert ledger.is_stuck.wait(20)  # a commit that is free may take its time, too
        begun = when_nothing_moves(lambda: tools.marks.rows_begun)
        ledger.go_on.set()
        assert sum(record.num_rows for record in records.result(20)) == NUM_ROWS
    assert tools.marks.rows_begun == NUM_ROWS
    return begun


def an_engine(kind: str) -> Any:
    return SimpleNamespace(device=SimpleNamespace(kind=kind), batch_size=BLOCK_ROWS)


@pytest.mark.parametrize("queue_depth", [1, 2, 4])
@pytest.mark.parametrize("num_threads", [1, 2, 5, None])
def test_rows_begun_and_not_committed_are_never_more_than_those_at_risk(
    tmp_path: Path, num_threads: int | None, queue_depth: int
) -> None:
    write_input(tmp_path / "in", users(NUM_ROWS), rows_per_group=SHARD_ROWS)
    lanes = {"shard_rows": SHARD_ROWS, "block_rows": BLOCK_ROWS, "queue_depth": queue_depth}
    job = a_job(job_data(tmp_path), lanes=lanes)
    plan = a_plan(job)
    engine = an_engine("cpu" if num_threads else "gpu")
    limit = rows_at_risk(job, engine, num_threads or 64, plan.shards)
    begun = rows_begun_when_stuck(job, plan, num_threads, queue_depth=queue_depth)
    in_flight = begun - StuckLedger.num_free * SHARD_ROWS
    assert SHARD_ROWS < in_flight <= limit
    assert in_flight >= limit - BLOCK_ROWS, "a bound that says little"


def test_small_shards_that_are_committed_side_by_side_are_at_risk_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "is_far", True)
    monkeypatch.setattr(StuckLedger, "num_free", 0)
    write_input(tmp_path / "in", users(NUM_ROWS), rows_per_group=SHARD_ROWS)
    lanes = {"shard_rows": SHARD_ROWS, "block_rows": BLOCK_ROWS}
    job = a_job(job_data(tmp_path), lanes=lanes)
    plan = a_plan(job)
    large = a_job(job_data(tmp_path), lanes={**lanes, "shard_rows": 3 * SHARD_ROWS})
    limit = rows_at_risk(large, an_engine("cpu"), 2, plan.shards, is_far=True)
    beside = rows_side_by_side(large, plan.shards)
    begun = rows_begun_when_stuck(job, plan, 2, rows_side_by_side=beside)
    assert limit - BLOCK_ROWS <= begun <= limit


@pytest.mark.parametrize(
    ("images", "lanes", "on_gpu", "kind"),
    [
        (False, {}, False, "features"),
        (False, {}, True, "features"),
        (True, {}, False, "window"),
        (True, {"cpu_decoder": "dali"}, False, "dali"),
        (True, {}, True, "gpu"),
        (True, {"gpu_decode": {"enabled": False}}, True, "dali"),
    ],
)
def test_what_decodes_is_known_without_a_decoder(
    tmp_path: Path, images: bool, lanes: dict[str, Any], on_gpu: bool, kind: str
) -> None:
    data = job_data(tmp_path)
    if images:
        del data["input"]["features"]
        data["input"]["images"] = {"column": "image"}
        data["model"]["head"] = "classes"
    assert decoder_kind(a_job(data, lanes=lanes), on_gpu=on_gpu) == kind
