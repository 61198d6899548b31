"""The chain of stages in one process: what goes in comes out, whatever happens on the way."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from device_cases import HostRows, SlotRunner
from pipeline_cases import SumRunner, a_job, a_plan, job_data, scoring_tools, users, write_input

from pipeline.config import Job
from pipeline.decode_features import FeatureDecoder
from pipeline.ledger import CommitRecord
from pipeline.local_storage import LocalStorage
from pipeline.plan import Plan
from pipeline.score_shards import (
    ScoringTools,
    ShardScoring,
    measure_ceilings,
    store_thread_cpu_s,
)
from pipeline.storage import open_storage

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    table = users(103)
    f1 = table["f1"].to_pylist()
    f1[17] = f1[40] = None
    table = table.set_column(2, "f1", pa.array(f1, pa.float32()))
    write_input(tmp_path / "in", table)
    write_input(tmp_path / "in", users(21, first=103), name="part-1.parquet")
    return a_job(job_data(tmp_path))


@pytest.fixture
def plan(job: Job) -> Plan:
    return a_plan(job)


def part_of(job: Job, record: CommitRecord, name: str = "part") -> pa.Table:
    stored = getattr(record, name)
    path = f"{job.name}/_runs/run/parts/{stored.name}"
    data = LocalStorage(job.output.uri).read(path)
    assert data is not None
    return pq.read_table(io.BytesIO(data))


def no_threads_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("stage-")]


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_every_row_is_scored_or_quarantined_once(job: Job, plan: Plan, block_rows: int) -> None:
    tools = scoring_tools(job, plan, SumRunner())
    tools.decoder.block_rows = block_rows
    with ShardScoring(plan.shards, tools) as scoring:
        records = list(scoring)
        times = scoring.times()
    assert [record.shard for record in records] == list(range(len(plan.shards)))
    table = pa.concat_tables(part_of(job, record) for record in records)
    ids = table["user_id"].to_pylist()
    assert ids == [row for row in range(124) if row not in (17, 40)]
    assert table["score"].to_pylist() == [3.0 * row for row in ids]
    bad = [part_of(job, record, "quarantine") for record in records if record.quarantine]
    assert pa.concat_tables(bad)["row"].to_pylist() == [17, 40]
    assert {name: stage.items for name, stage in times.items()} == {
        "read": 124,
        "decode": 124,
        "infer": 124,
        "write": 124,
    }
    assert no_threads_left()


def test_a_pause_between_shards_brings_out_everything(job: Job, plan: Plan) -> None:
    committed: list[int] = []
    caught_up = threading.Event()

    def shards() -> Iterator[Any]:
        yield plan.shards[0]
        yield plan.shards[1]
        yield None
        assert caught_up.wait(10), "the first shards wait for the third"
        yield plan.shards[2]

    with ShardScoring(shards(), scoring_tools(job, plan, SumRunner())) as scoring:
        for record in scoring:
            committed.append(record.shard)
            if len(committed) == 2:
                caught_up.set()
    assert committed == [0, 1, 2]


@pytest.mark.parametrize("when", [0, 3, 9])
def test_an_error_in_the_engine_ends_everything(job: Job, plan: Plan, when: int) -> None:
    class Broken(SumRunner):
        def infer(self, batches: Iterable[Any]) -> Iterator[Any]:
            for number, outputs in enumerate(super().infer(batches)):
                if number == when:
                    raise RuntimeError("device lost")
                yield outputs

    with (
        pytest.raises(RuntimeError, match="device lost") as caught,
        ShardScoring(plan.shards, scoring_tools(job, plan, Broken())) as scoring,
    ):
        list(scoring)
    assert caught.value.__notes__[0] == "Pipeline stage: infer"
    assert no_threads_left()


def test_an_error_in_the_store_ends_everything(job: Job, plan: Plan) -> None:
    class Full(LocalStorage):
        def create(self, path: str, data: bytes) -> bool:
            if "commits" in path:
                raise OSError(28, "No space left on device")
            return super().create(path, data)

    from pipeline.ledger import Ledger

    ledger = Ledger(Full(job.output.uri), job.name, "run")
    with (
        pytest.raises(OSError, match="No space left") as caught,
        ShardScoring(plan.shards, scoring_tools(job, plan, SumRunner(), ledger=ledger)) as scoring,
    ):
        list(scoring)
    assert caught.value.__notes__[0] == "Pipeline stage: write"
    assert ledger.records() == {}
    assert no_threads_left()


def test_whoever_leaves_early_leaves_no_threads(job: Job, plan: Plan) -> None:
    with ShardScoring(plan.shards, scoring_tools(job, plan, SumRunner())) as scoring:
        next(iter(scoring))
    assert no_threads_left()


def test_a_shard_of_bad_rows_only_is_committed(tmp_path: Path) -> None:
    table = users(20).set_column(2, "f1", pa.nulls(20, pa.float32()))
    write_input(tmp_path / "in", table)
    job = a_job(job_data(tmp_path))
    plan = a_plan(job)
    with ShardScoring(plan.shards, scoring_tools(job, plan, SumRunner())) as scoring:
        (record,) = scoring
    assert (record.num_scored, record.num_quarantined) == (0, 20)
    assert len(part_of(job, record)) == 0


def test_a_passthrough_column_may_be_a_feature(tmp_path: Path) -> None:
    write_input(tmp_path / "in", users(20))
    job = a_job(job_data(tmp_path), input={"passthrough": ["f1", "user_id"]})
    plan = a_plan(job)
    with ShardScoring(plan.shards, scoring_tools(job, plan, SumRunner())) as scoring:
        (record,) = scoring
    assert part_of(job, record).schema.names == ["f1", "user_id", "score"]


def test_ceilings_are_measured_without_committing(job: Job, plan: Plan) -> None:
    tools = scoring_tools(job, plan, SumRunner())
    ceilings = measure_ceilings(plan.shards[0], tools)
    assert (
        min(ceilings.decode_per_sec, ceilings.engine_per_sec, ceilings.engine_with_copies_per_sec)
        > 0
    )
    assert np.isfinite(ceilings.engine_per_sec)
    assert tools.ledger.records() == {}


class DeviceDecoder(FeatureDecoder):
    """Leaves its rows on a "device", and draws one block ahead."""

    def decode_blocks(self, blocks: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[Any] = deque()
        for rows in blocks:
            if rows is not None:
                inputs, bad_rows = self.decode(rows)
                waiting.append((HostRows(inputs), bad_rows))
            while len(waiting) > (rows is not None):
                yield waiting.popleft()
            if rows is None:
                yield None
        yield from waiting


@pytest.fixture
def device_tools(job: Job, plan: Plan) -> ScoringTools:
    runner = SlotRunner((7, 2), "float32")
    assert job.input.features is not None
    decoder = DeviceDecoder(job.input.features, plan.feature_columns, plan.num_features)
    decoder.block_rows = runner.batch_size
    return scoring_tools(job, plan, runner, decoder=decoder)


def test_a_decoder_on_a_device_that_draws_ahead_scores_the_same_rows(
    job: Job, plan: Plan, device_tools: ScoringTools
) -> None:
    with ShardScoring([*plan.shards, None], device_tools) as scoring:
        records = list(scoring)
    table = pa.concat_tables(part_of(job, record) for record in records)
    assert table["user_id"].to_pylist() == [row for row in range(124) if row not in (17, 40)]
    assert table["score"].to_pylist() == [3.0 * row for row in table["user_id"].to_pylist()]
    assert set(device_tools.runner.kinds) == {"device"}  # type: ignore[attr-defined]
    assert no_threads_left()


def test_a_pause_brings_out_what_the_decoder_has_drawn_ahead(
    plan: Plan, device_tools: ScoringTools
) -> None:
    first_came = threading.Event()

    def shards() -> Iterator[Any]:
        yield plan.shards[0]
        yield None
        assert first_came.wait(10), "the first shard waits for the second"
        yield plan.shards[1]

    with ShardScoring(shards(), device_tools) as scoring:
        for _ in scoring:
            first_came.set()
    assert first_came.is_set()


def test_ceilings_are_measured_on_a_device_too(plan: Plan, device_tools: ScoringTools) -> None:
    ceilings = measure_ceilings(plan.shards[0], device_tools)
    rates = (
        ceilings.decode_per_sec,
        ceilings.engine_per_sec,
        ceilings.engine_with_copies_per_sec,
    )
    assert min(rates) > 0
    assert set(device_tools.runner.kinds) == {"device"}  # type: ignore[attr-defined]


def test_a_ceiling_is_what_a_known_stage_does(
    monkeypatch: pytest.MonkeyPatch, job: Job, plan: Plan
) -> None:
    class Slow(SumRunner):
        def _score(self, batch: Any) -> Any:
            time.sleep(0.01)  # 4 rows: 400 rows per second at most
            return super()._score(batch)

    monkeypatch.setattr("pipeline.score_shards.CEILING_S", 0.2)
    ceilings = measure_ceilings(plan.shards[0], scoring_tools(job, plan, Slow()))
    assert 40 < ceilings.engine_per_sec <= 400
    assert 40 < ceilings.engine_with_copies_per_sec <= 400


def test_requests_to_a_bucket_count_as_reading_and_not_as_the_engine(
    job: Job, s3_folder: str
) -> None:
    source = open_storage(s3_folder)
    for path in Path(job.input.uri).rglob("*.parquet"):
        source.create(str(path.relative_to(job.input.uri)), path.read_bytes())
    bucket = a_job({**job.model_dump(), "input": {**job.input.model_dump(), "uri": s3_folder}})
    plan = a_plan(bucket)
    before_s = store_thread_cpu_s()
    with ShardScoring(plan.shards, scoring_tools(bucket, plan, SumRunner())) as scoring:
        assert sum(record.num_rows for record in scoring) == 124
        took_s = store_thread_cpu_s() - before_s
        assert scoring.times()["read"].cpu_s >= took_s > 0
