"""Lanes: real child processes that die, hang up, fail, and are replaced."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pipeline_cases import LAYOUT, LIMITS, a_job, a_plan, job_data, write_input

from engines.devices import this_cpu
from engines.errors import EngineCorruptError
from engines.manifest import StoredEngine
from engines.model import fingerprint_model
from flows.demo_data import write_users
from pipeline.config import Job
from pipeline.engine import get_engine, request_for
from pipeline.errors import InputChangedError, Interrupted, LaneError
from pipeline.lane import Lane, LaneDevice
from pipeline.lane_messages import LaneSetup
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.storage import open_storage
from pipeline.suspects import MAX_UNEXPLAINED
from tests.processes import is_alive

DATE = "2026-11-20"
SHARD_ROWS = 1_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 users in groups of 1,000, and the demo's ranking model."""
    import pyarrow.parquet as pq

    from engines.demo_models import write_ranking_onnx

    root = tmp_path_factory.mktemp("lane")
    write_users(root / "raw", DATE, num_rows=20_000, num_files=1)
    table = pq.read_table(root / "raw" / f"dt={DATE}" / "users-0.parquet")
    write_input(root / "in", table, rows_per_group=SHARD_ROWS)
    write_ranking_onnx(root / "model.onnx")
    return root


@pytest.fixture(scope="module")
def engine(demo: Path) -> StoredEngine:
    job = job_for(demo, demo)
    plan = a_plan(job)
    request = request_for(job, plan.num_features, this_cpu(1))
    fingerprint = fingerprint_model(request.model)
    return get_engine(job, plan, request, fingerprint, lambda _: None).engine


def job_for(demo: Path, output: Path) -> Job:
    return a_job(
        job_data(demo),
        model={"source": str(demo / "model.onnx")},
        output={"uri": str(output / "out")},
        engine={
            "store": str(demo / "engines"),
            "calibration": {"rows": 64},
            "gate": {"rows": 64, "min_agreement": 0.9},
        },
        lanes={"shard_rows": SHARD_ROWS},
    )


@pytest.fixture
def job(demo: Path, tmp_path: Path) -> Job:
    return job_for(demo, tmp_path)


@pytest.fixture
def plan(job: Job) -> Plan:
    return a_plan(job)


@pytest.fixture
def setup(job: Job, plan: Plan, engine: StoredEngine) -> LaneSetup:
    return LaneSetup(
        job=job,
        engine=engine,
        feature_columns=plan.feature_columns,
        num_features=plan.num_features,
        layout=LAYOUT,
        run_id="run",
        attempt="attempt",
        num_threads=1,
        limits=LIMITS,
    )


@pytest.fixture
def start_lane() -> Iterator[Callable[[], Lane]]:
    lanes: list[Lane] = []

    def start() -> Lane:
        lanes.append(Lane(LaneDevice(name="cpu", num_threads=1)))
        return lanes[-1]

    yield start
    for lane in lanes:
        lane.abort()


def ledger_of(job: Job) -> Ledger:
    return Ledger(open_storage(job.output.uri), job.name, "run")


def child_of(lane: Lane) -> int:
    pid = lane._process.pid
    assert pid is not None
    return pid


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_a_lane_scores_its_shards_and_ends(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan, job: Job
) -> None:
    lane = start_lane()
    lane.open(setup)
    records = lane.score(plan.shards)
    assert [record.shard for record in records] == [shard.index for shard in plan.shards]
    assert ledger_of(job).records() == {record.shard: record for record in records}
    lane.close()
    assert not is_alive(child_of(lane))
    times = lane.times()
    assert list(times) == ["read", "decode", "infer", "write"]
    assert times["write"].items == plan.num_rows
    assert lane.num_restarts == 0
    assert lane.rows_begun == plan.num_rows
    assert lane.ceilings is not None
    assert lane.ceilings.engine_per_sec > 0


def test_several_callers_share_a_lane(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan, job: Job
) -> None:
    lane = start_lane()
    lane.open(setup)
    halves = (plan.shards[:7], plan.shards[7:])
    threads = [threading.Thread(target=lane.score, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ledger_of(job).records()) == len(plan.shards)
    assert lane.num_pending == 0


def test_one_shard_after_the_other_is_enough(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan
) -> None:
    """Nothing waits in the stages for the next shard to push it out."""
    lane = start_lane()
    lane.open(setup)
    for shard in plan.shards[:4]:
        (record,) = lane.score([shard])
        assert record.num_rows == SHARD_ROWS


def test_a_killed_child_is_replaced_and_the_work_is_finished(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan, job: Job
) -> None:
    lane = start_lane()
    lane.open(setup)
    first = child_of(lane)

    def kill_when_half_done() -> None:
        wait_for(lambda: len(ledger_of(job).records()) >= 3)
        os.kill(first, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_half_done)
    killer.start()
    records = lane.score(plan.shards * 1)
    killer.join()
    lane.close()
    assert lane.rows_begun >= plan.num_rows
    assert [record.shard for record in records] == [shard.index for shard in plan.shards]
    assert sorted(ledger_of(job).records()) == [shard.index for shard in plan.shards]


def test_a_child_that_dies_while_it_has_nothing_to_do_is_replaced(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan
) -> None:
    lane = start_lane()
    lane.open(setup)
    lane.score(plan.shards[:1])
    first = child_of(lane)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not is_alive(first))
    time.sleep(0.3)
    (record,) = lane.score(plan.shards[1:2])
    assert record.shard == 1
    assert lane.num_restarts == 1


def test_a_child_that_dies_again_and_again_stops_the_lane(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan
) -> None:
    lane = start_lane()
    lane.open(setup)
    done = threading.Event()

    def kill_all() -> None:
        while not done.wait(0.05):
            pid = child_of(lane)
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(LaneError, match=rf"died {MAX_UNEXPLAINED + 1} times, .*-9 \(SIGKILL"):
            lane.score(plan.shards)
    finally:
        done.set()
        killer.join()
    with pytest.raises(LaneError, match="died"):  # whoever comes later is told the same
        lane.score(plan.shards)


def test_a_child_that_dies_before_it_has_an_engine_stops_the_lane(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan
) -> None:
    lane = start_lane()
    os.kill(child_of(lane), signal.SIGKILL)
    lane._receiver.join(10)
    lane.open(setup)
    with pytest.raises(LaneError, match="died 1 times"):
        lane.score(plan.shards)


def test_abort_ends_the_child_and_whoever_waits(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan
) -> None:
    lane = start_lane()
    lane.open(setup)
    raised: list[BaseException] = []

    def score() -> None:
        try:
            lane.score(plan.shards)
        except BaseException as error:
            raised.append(error)

    waiting = threading.Thread(target=score)
    waiting.start()
    wait_for(lambda: lane.num_pending > 0)
    pid = child_of(lane)
    started = time.monotonic()
    lane.abort()
    waiting.join(5)
    assert not waiting.is_alive()
    assert [type(error) for error in raised] == [Interrupted]
    assert not is_alive(pid)
    assert time.monotonic() - started < 5
    assert lane.num_restarts == 0
    with pytest.raises(Interrupted):
        lane.score(plan.shards)
    lane.abort()  # again is fine


def test_a_drained_lane_finishes_what_it_is_at_and_leaves_the_rest(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan, job: Job
) -> None:
    lane = start_lane()
    lane.open(setup)
    many = [dataclasses.replace(plan.shards[0], index=index) for index in range(2_000)]
    futures = lane.submit(many)
    futures[0].result(60)
    started = time.monotonic()
    lane.drain()
    while not lane.wait(0.1):
        assert time.monotonic() - started < 20
    lane.abort()
    committed = [future for future in futures if future.exception() is None]
    assert 0 < len(committed) < len(many)
    assert sorted(ledger_of(job).records()) == list(range(len(committed)))
    with pytest.raises(Interrupted):
        futures[-1].result()
    assert lane.num_restarts == 0


def test_a_lane_without_an_engine_drains_at_once(start_lane: Callable[[], Lane]) -> None:
    lane = start_lane()
    lane.drain()
    assert lane.wait(20)


def test_signals_to_the_whole_group_leave_the_decision_to_the_parent(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan
) -> None:
    lane = start_lane()
    lane.open(setup)
    lane.score(plan.shards[:1])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child_of(lane), number)
    assert [record.shard for record in lane.score(plan.shards[1:3])] == [1, 2]
    assert lane.num_restarts == 0


def test_a_lane_that_was_never_opened_closes(start_lane: Callable[[], Lane]) -> None:
    lane = start_lane()
    lane.close()
    assert not is_alive(child_of(lane))


@pytest.fixture
def kept_lane() -> Iterator[Lane]:
    lane = Lane(LaneDevice(name="cpu", num_threads=1), is_kept=True)
    yield lane
    lane.abort()
    assert not is_alive(child_of(lane))


def test_a_kept_lane_scores_one_run_after_the_other_in_one_process(
    kept_lane: Lane, setup: LaneSetup, plan: Plan, job: Job
) -> None:
    process, half = child_of(kept_lane), len(plan.shards) // 2
    for run_id, shards in (("run", plan.shards[:half]), ("other", plan.shards)):
        assert kept_lane.is_ready
        kept_lane.open(dataclasses.replace(setup, run_id=run_id))
        assert not kept_lane.is_ready
        records = kept_lane.score(shards)
        kept_lane.close()
        num_rows = sum(shard.num_rows for shard in shards)
        assert kept_lane.times()["write"].items == kept_lane.rows_begun == num_rows
        assert kept_lane.ceilings is not None
        ledger = Ledger(open_storage(job.output.uri), job.name, run_id)
        assert ledger.records() == {record.shard: record for record in records}
        assert child_of(kept_lane) == process
    with pytest.raises(Interrupted):
        kept_lane.score(plan.shards[:1])


def test_a_kept_lane_whose_process_dies_at_rest_is_not_ready_and_replaces_nothing(
    kept_lane: Lane, setup: LaneSetup, plan: Plan
) -> None:
    kept_lane.open(setup)
    kept_lane.score(plan.shards[:1])
    kept_lane.close()
    os.kill(child_of(kept_lane), signal.SIGKILL)
    wait_for(lambda: not kept_lane.is_ready)
    assert kept_lane.num_restarts == 0


def test_a_kept_lane_replaces_a_process_that_dies_in_its_second_run(
    kept_lane: Lane, setup: LaneSetup, plan: Plan
) -> None:
    kept_lane.open(setup)
    kept_lane.score(plan.shards[:1])
    kept_lane.close()
    kept_lane.open(dataclasses.replace(setup, run_id="other"))
    futures = kept_lane.submit(plan.shards)
    futures[0].result()
    os.kill(child_of(kept_lane), signal.SIGKILL)
    assert len({future.result().shard for future in futures}) == len(plan.shards)
    wait_for(lambda: kept_lane.num_restarts == 1)  # all may have been committed before it died
    kept_lane.close()
    assert kept_lane.is_ready


def test_a_lane_that_failed_is_not_kept(kept_lane: Lane, setup: LaneSetup, plan: Plan) -> None:
    shard = plan.shards[0]
    changed = dataclasses.replace(shard, file=dataclasses.replace(shard.file, version="other"))
    kept_lane.open(setup)
    with pytest.raises(InputChangedError):
        kept_lane.score([changed])
    assert not kept_lane.is_ready


def test_changed_input_is_reported_as_what_it_is(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan
) -> None:
    shard = plan.shards[2]
    changed = dataclasses.replace(shard, file=dataclasses.replace(shard.file, version="other"))
    lane = start_lane()
    lane.open(setup)
    with pytest.raises(InputChangedError, match="as when the run was planned"):
        lane.score([plan.shards[0], changed])


@pytest.mark.parametrize("num_shards", [1, 8])
def test_a_store_that_breaks_while_it_is_written_ends_the_lane(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan, job: Job, num_shards: int
) -> None:
    """The reader waits for more shards when the writer fails: that must not be for ever."""
    folder = Path(job.output.uri, job.name, "_runs", "run")
    folder.mkdir(parents=True)
    (folder / "parts").write_bytes(b"a file where a folder is needed")
    lane = start_lane()
    lane.open(setup)
    with pytest.raises(LaneError, match=r"FileExistsError|NotADirectoryError"):
        lane.score(plan.shards[:num_shards])
    wait_for(lambda: not is_alive(child_of(lane)), 10)


def test_a_changed_engine_is_refused(
    start_lane: Callable[[], Lane], setup: LaneSetup, plan: Plan, tmp_path: Path
) -> None:
    graph = setup.engine.artifact.read_bytes()
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / setup.engine.artifact.name).write_bytes(graph[:-1] + bytes([graph[-1] ^ 1]))
    lane = start_lane()
    lane.open(
        dataclasses.replace(setup, engine=dataclasses.replace(setup.engine, folder=str(folder)))
    )
    with pytest.raises(EngineCorruptError, match="sha256"):
        lane.score(plan.shards[:1])


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from pipeline.lane import Lane, LaneDevice
            if __name__ == "__main__":
                lane = Lane(LaneDevice(name="cpu", num_threads=1))
                print(lane._process.pid, flush=True)
                time.sleep(60)
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(1.5)  # long enough for the child to watch
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not is_alive(pid), 10)


def test_a_parent_that_forgets_its_lane_can_end(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            from pipeline.lane import Lane, LaneDevice
            if __name__ == "__main__":
                lane = Lane(LaneDevice(name="cpu", num_threads=1))
            """
        )
    )
    subprocess.run([sys.executable, str(script)], timeout=20, check=True, capture_output=True)


def test_the_store_of_the_lane_is_the_jobs(job: Job, engine: StoredEngine) -> None:
    assert Path(engine.folder).is_relative_to(job.engine.store)
