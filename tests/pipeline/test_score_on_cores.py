"""Blocks scored core by core: the staged path's parts, known ceilings, and nothing left behind."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_cases import SumRunner, a_job, a_plan, job_data, scoring_tools, users, write_input

from engines.runner import Outputs
from pipeline.blocks import Array, Block
from pipeline.config import Job
from pipeline.decode_features import FeatureDecoder
from pipeline.ledger import CommitRecord
from pipeline.limit import ceilings_of_cores
from pipeline.local_storage import LocalStorage
from pipeline.plan import Plan
from pipeline.read import BlockReader
from pipeline.report import Ceilings, StageTimes
from pipeline.score_on_cores import CoreScoring
from pipeline.score_shards import ScoringTools, ShardScoring

pytestmark = pytest.mark.timeout(30)
THREADS = 3
NUM_ROWS = 225
BAD_ROWS = (0, 17, 40, 102, 103)


class CoreRunner(SumRunner):
    """Sums each row of a batch of four, in whatever thread asks."""

    def run(self, batch: Array) -> Outputs:
        assert len(batch) == self.batch_size
        return self._score(batch)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Several shards in three files, the last of a single row; some rows are bad."""
    table = users(NUM_ROWS)
    f1 = [None if row in BAD_ROWS else value for row, value in enumerate(table["f1"].to_pylist())]
    table = table.set_column(2, "f1", pa.array(f1, pa.float32()))
    for name, first, stop in (("a", 0, 103), ("b", 103, 224), ("c", 224, 225)):
        write_input(tmp_path / "in", table[first:stop], name=f"{name}.parquet")
    return a_job(job_data(tmp_path))


@pytest.fixture
def plan(job: Job) -> Plan:
    return a_plan(job)


class LateDecoder(FeatureDecoder):
    """Takes another time for each block, so that the later overtake the earlier."""

    def decode(self, rows: pa.RecordBatch) -> Any:
        time.sleep(random.Random(repr(rows["f0"][0])).uniform(0, 0.004))
        return super().decode(rows)


def tools_for(job: Job, plan: Plan, block_rows: int = 7, **changes: Any) -> ScoringTools:
    assert job.input.features is not None
    kind = changes.pop("decoder", FeatureDecoder)
    decoder = kind(job.input.features, plan.feature_columns, plan.num_features, block_rows)
    runner = changes.pop("runner", CoreRunner())
    return scoring_tools(
        job, plan, runner, **{"decoder": decoder, "core_threads": THREADS, **changes}
    )


def parts_of(job: Job, records: list[CommitRecord], name: str = "part") -> list[pa.Table]:
    parts = []
    for record in records:
        if (stored := getattr(record, name)) is not None:
            path = f"{job.name}/_runs/run/parts/{stored.name}"
            data = LocalStorage(job.output.uri).read(path)
            assert data is not None
            parts.append(pq.read_table(io.BytesIO(data)))
    return parts


def no_threads_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith(("stage-", "core"))]


@pytest.fixture(params=[1, 3])
def _batches_at_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    num_bytes = request.param * CoreRunner.input.num_bytes
    monkeypatch.setattr("pipeline.score_on_cores.DECODED_BYTES", num_bytes)


@pytest.mark.usefixtures("_batches_at_once")
@pytest.mark.parametrize("num_threads", [1, THREADS, 16])
@pytest.mark.parametrize("block_rows", [1, 4, 7, 30, 1000])
def test_parts_are_those_of_the_stages(
    tmp_path: Path, job: Job, plan: Plan, block_rows: int, num_threads: int
) -> None:
    found, times = [], {}
    for threads in (None, num_threads):
        here = a_job(
            job.model_dump(),
            output={**job.output.model_dump(), "uri": str(tmp_path / f"{threads}")},
        )
        decoder = LateDecoder if threads and block_rows > 1 else FeatureDecoder
        tools = tools_for(here, plan, block_rows, decoder=decoder, core_threads=threads)
        with ShardScoring(plan.shards, tools) as scoring:
            records = list(scoring)
            times = scoring.times()
        found.append((records, parts_of(here, records), parts_of(here, records, "quarantine")))
    (staged, staged_parts, staged_bad), (cored, parts, bad) = found
    counts = ("shard", "num_rows", "num_scored", "num_quarantined", "reasons")
    for name in counts:
        assert [getattr(r, name) for r in cored] == [getattr(r, name) for r in staged]
    assert parts == staged_parts
    assert bad == staged_bad
    ids = pa.concat_tables(parts)["user_id"].to_pylist()
    assert ids == [row for row in range(NUM_ROWS) if row not in BAD_ROWS]
    assert {name: stage.items for name, stage in times.items()} == dict.fromkeys(
        ("read", "decode", "infer", "write"), NUM_ROWS
    )
    assert no_threads_left()


@pytest.mark.parametrize("first_shards", [1, 3])
def test_a_pause_brings_out_everything(job: Job, plan: Plan, first_shards: int) -> None:
    committed: list[int] = []
    caught_up = threading.Event()

    def shards() -> Iterator[Any]:
        yield None
        yield from plan.shards[:first_shards]
        yield None
        assert caught_up.wait(10), "the first shards wait for the others"
        yield from plan.shards[first_shards:]

    with ShardScoring(shards(), tools_for(job, plan)) as scoring:
        for record in scoring:
            committed.append(record.shard)
            if len(committed) == first_shards:
                caught_up.set()
    assert committed == list(range(len(plan.shards)))


class Gauge:
    """Counts how many are inside at once; each computes for `cpu_s`, and is kept as long again."""

    def __init__(self, cpu_s: float) -> None:
        self.most = self._now = 0
        self._cpu_s = cpu_s
        self._lock = threading.Lock()

    def visit(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        until = time.thread_time() + self._cpu_s
        while time.thread_time() < until:
            pass
        time.sleep(self._cpu_s)  # as if another process had the core
        with self._lock:
            self._now -= 1


class Slow:
    """A decoder and a runner of known speed: CPU seconds for a batch, on each core."""

    def __init__(self, decode_s: float, infer_s: float) -> None:
        self.decoding, self.inferring = Gauge(decode_s), Gauge(infer_s)

    def scoring(self, job: Job, plan: Plan) -> CoreScoring:
        decoding, inferring = self.decoding, self.inferring

        class Decoder(FeatureDecoder):
            def decode(self, rows: pa.RecordBatch) -> Any:
                decoding.visit()
                return super().decode(rows)

        class Runner(CoreRunner):
            def run(self, batch: Array) -> Outputs:
                inferring.visit()
                return super().run(batch)

        tools = tools_for(job, plan, decoder=Decoder)
        return CoreScoring(tools.decoder, Runner(), ("user_id",), THREADS, tools.marks)


def job_of_one_shard(root: Path, num_rows: int) -> Job:
    write_input(root / "one", users(num_rows))
    data = job_data(root)
    return a_job(
        data, input={**data["input"], "uri": str(root / "one")}, lanes={"shard_rows": num_rows}
    )


@pytest.fixture
def long_job(tmp_path: Path) -> Job:
    """One shard of 240 rows: 30 blocks of 8."""
    return job_of_one_shard(tmp_path, 240)


@pytest.fixture
def short_job(tmp_path: Path) -> Job:
    """One shard of 72 rows, for batches that take so long that a busy machine adds little."""
    return job_of_one_shard(tmp_path, 72)


def blocks_of(job: Job, plan: Plan, block_rows: int) -> list[Block | None]:
    source = LocalStorage(job.input.uri)
    return list(
        BlockReader(source=source, columns=("user_id", "f0", "f1"), block_rows=block_rows).blocks(
            plan.shards
        )
    )


def ceilings_of(times: dict[str, StageTimes]) -> Ceilings:
    ceilings = ceilings_of_cores(times, THREADS)
    assert ceilings is not None
    return ceilings


def best_of(measure: Callable[[], Ceilings]) -> tuple[float, float]:
    """Decoding and engine in several runs: what else the machine does only makes them slower."""
    found = [measure() for _ in range(3)]
    return max(c.decode_per_sec for c in found), max(c.engine_per_sec for c in found)


@pytest.mark.parametrize("block_rows", [1000, 36, 24, 20, 12, 4])
def test_ceilings_are_what_cores_of_known_speed_would_do_however_many_blocks_there_are(
    monkeypatch: pytest.MonkeyPatch, short_job: Job, block_rows: int
) -> None:
    monkeypatch.setattr("pipeline.score_on_cores.DECODED_BYTES", 1)
    plan = a_plan(short_job)

    def measure() -> Ceilings:
        slow = Slow(decode_s=0.016, infer_s=0.008)
        scoring = slow.scoring(short_job, plan)
        scored = list(scoring.score(blocks_of(short_job, plan, block_rows)))
        assert [block.first_row for block in scored] == list(range(0, 72, min(block_rows, 72)))
        assert slow.decoding.most == min(THREADS, len(scored)) >= slow.inferring.most
        ceilings = ceilings_of(scoring.times(others_cpu_s=0.0))
        assert ceilings.engine_with_copies_per_sec == ceilings.engine_per_sec
        return ceilings

    decode_per_sec, engine_per_sec = best_of(measure)
    assert decode_per_sec == pytest.approx(THREADS * 4 / 0.016, rel=0.3)
    assert engine_per_sec == pytest.approx(THREADS * 4 / 0.008, rel=0.4)


def test_what_threads_of_a_runtime_compute_is_inference(short_job: Job) -> None:
    """As OpenVINO's, for which the thread that asks only waits."""

    class Runner(CoreRunner):
        def run(self, batch: Array) -> Outputs:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self._slowly, batch).result()

        def _slowly(self, batch: Array) -> Outputs:
            until = time.thread_time() + 0.01
            while time.thread_time() < until:
                pass
            return self._score(batch)

    plan = a_plan(short_job)
    tools = tools_for(short_job, plan, block_rows=24, runner=Runner())
    with ShardScoring(plan.shards, tools) as scoring:
        list(scoring)
        times = scoring.times()
    assert 0.9 * 18 * 0.01 <= times["infer"].cpu_s, "18 batches"
    assert times["decode"].cpu_s < 0.1


def test_no_rows_have_no_ceilings(job: Job, plan: Plan) -> None:
    scoring = Slow(0, 0).scoring(job, plan)
    assert ceilings_of_cores(scoring.times(0.0), THREADS) is None, "it has not begun"
    assert list(scoring.score([None, None])) == []
    assert ceilings_of_cores(scoring.times(0.0), THREADS) is None


def test_the_first_block_is_scored_before_others_are_read(long_job: Job) -> None:
    plan = a_plan(long_job)
    blocks = blocks_of(long_job, plan, 4)
    slow = Slow(0, 0)

    def drawn() -> Iterator[Block | None]:
        yield blocks[0]
        deadline = time.monotonic() + 10
        while not slow.inferring.most:
            assert time.monotonic() < deadline, "it waits for more blocks"
            time.sleep(0.001)
        yield from blocks[1:]

    assert len(list(slow.scoring(long_job, plan).score(drawn()))) == len(blocks)


def test_times_add_up_to_what_the_threads_had(
    monkeypatch: pytest.MonkeyPatch, long_job: Job
) -> None:
    monkeypatch.setattr("pipeline.score_on_cores.DECODED_BYTES", 1)
    plan = a_plan(long_job)
    scoring = Slow(decode_s=0.004, infer_s=0.002).scoring(long_job, plan)
    assert scoring.times(0.0)["decode"].wait_s == 0
    started = time.perf_counter()
    seen = 0
    for block in scoring.score(blocks_of(long_job, plan, 8)):
        seen += block.num_rows
        times, had_s = scoring.times(0.0), THREADS * (time.perf_counter() - started)
        assert times["decode"].busy_s + times["infer"].busy_s <= had_s
        assert sum(stage.busy_s + stage.wait_s for stage in times.values()) <= had_s
        assert times["decode"].items == times["infer"].items >= seen
    # 60 batches of 4 rows; what is counted twice is more than the threads had.
    assert times["decode"].items == 240
    assert times["decode"].busy_s >= 60 * 0.004
    assert times["infer"].busy_s >= 60 * 0.002
    shares = times["decode"].busy_share, times["infer"].busy_share
    assert shares[0] == pytest.approx(shares[1]), "the cores wait for both together"


def test_cores_that_wait_for_rows_are_busy_with_nothing(short_job: Job) -> None:
    def slowly(blocks: list[Block | None]) -> Iterator[Block | None]:
        for block in blocks:
            time.sleep(0.05)
            yield block

    plan = a_plan(short_job)
    scoring = Slow(decode_s=0.002, infer_s=0.002).scoring(short_job, plan)
    list(scoring.score(slowly(blocks_of(short_job, plan, 8))))
    for stage in scoring.times(0.0).values():
        assert 0 < stage.busy_share < 0.5


class DecodeError(Exception):
    """Not an error that any decoder expects."""


@pytest.mark.parametrize("at_row", [0, 63, 239])
@pytest.mark.parametrize("where", ["decode", "infer"])
def test_an_error_of_any_thread_ends_everything(long_job: Job, where: str, at_row: int) -> None:
    class Decoder(FeatureDecoder):
        def decode(self, rows: pa.RecordBatch) -> Any:
            if where == "decode" and at_row in rows["f0"].to_pylist():
                raise DecodeError("the decoder lost its way")
            return super().decode(rows)

    class Runner(CoreRunner):
        is_lost = False

        def run(self, batch: Array) -> Outputs:
            self.is_lost |= where == "infer" and at_row in batch[:, 0]
            if self.is_lost:  # once is a fault of the row
                raise DecodeError("the engine lost its way")
            return super().run(batch)

    plan = a_plan(long_job)
    tools = tools_for(long_job, plan, decoder=Decoder, runner=Runner())
    with (
        pytest.raises(DecodeError, match="lost its way") as caught,
        ShardScoring(plan.shards, tools) as scoring,
    ):
        list(scoring)
    assert caught.value.__notes__ == ["Pipeline stage: score"]
    assert tools.ledger.records() == {}
    assert no_threads_left()


def test_an_error_of_the_reader_ends_everything(job: Job, plan: Plan) -> None:
    def shards() -> Iterator[Any]:
        yield from plan.shards[:2]
        raise LookupError("no more shards")

    with (
        pytest.raises(LookupError, match="no more shards") as caught,
        ShardScoring(shards(), tools_for(job, plan)) as scoring,
    ):
        list(scoring)
    assert caught.value.__notes__ == ["Pipeline stage: read"]
    assert no_threads_left()


@pytest.mark.parametrize("num_records", [0, 1, 5])
def test_whoever_leaves_early_leaves_no_threads(job: Job, plan: Plan, num_records: int) -> None:
    tools = tools_for(job, plan, decoder=LateDecoder)
    with ShardScoring(plan.shards, tools) as scoring:
        records = iter(scoring)
        for _ in range(num_records):
            next(records)
    assert no_threads_left()


@pytest.mark.parametrize("num_blocks", [1, 4, 25])
def test_a_closed_stream_leaves_no_threads(long_job: Job, num_blocks: int) -> None:
    plan = a_plan(long_job)
    scoring = Slow(0.002, 0.001).scoring(long_job, plan)
    stream: Any = scoring.score(blocks_of(long_job, plan, 4))
    with closing(stream):
        for _ in range(num_blocks):
            next(stream)
    assert no_threads_left()


def test_whoever_waits_for_shards_can_still_be_stopped(job: Job, plan: Plan) -> None:
    """As a lane is whose next shards do not come, and whose writer has failed."""
    never = threading.Event()

    def shards() -> Iterator[Any]:
        yield plan.shards[0]
        yield None
        never.wait(0.3)

    with ShardScoring(shards(), tools_for(job, plan)) as scoring:
        assert next(iter(scoring)).shard == 0
    assert no_threads_left()
