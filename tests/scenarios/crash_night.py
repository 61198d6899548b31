"""A whole night in one process, which is forked for each trial: so thousands of them are cheap.

Plan, probe, ledger, stages, commits and publication are the product's own; the engine is a sum, and
the lane's process is left out. A trial's night is disturbed once (see `disturb`), then the same
night is run again undisturbed, and its output is recounted by `score verify`'s code.

    python crash_night.py FOLDER exit|once|forever FIRST LAST STEP    at the n-th operation on files
    python crash_night.py FOLDER kill SEED COUNT                      SIGKILL at random moments

Prints a JSON object for each trial.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pipeline_cases import DATE, SumRunner, a_job, a_plan, job_data, scoring_tools, write_input

from pipeline.config import Job
from pipeline.ledger import Attempt, Ledger, utc_now
from pipeline.publish import check_complete, draft_of, publish
from pipeline.score_shards import ShardScoring
from pipeline.storage import open_storage, probe
from pipeline.verify import verify_published
from pipeline.versions import find_published, published_folder, settle

NUM_ROWS, NUM_SHARDS, BAD_ROW = 100, 10, 37
RUN = "run"
PATIENCE_S = 30.0
CRASHED = 9
EVENTS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def job_in(folder: Path, output: Path) -> Job:
    """Ten shards of ten users, one of whom has no feature."""
    ids = np.arange(NUM_ROWS)
    features = ids.astype(np.float32)
    missing = np.where(ids == BAD_ROW, np.nan, features)
    if not (folder / "in").exists():
        table = pa.table({"user_id": ids, "f0": missing, "f1": 2 * features})
        write_input(folder / "in", table.cast(table.schema), rows_per_group=NUM_ROWS // NUM_SHARDS)
    return a_job(
        job_data(folder),
        output={"uri": str(output)},
        lanes={"shard_rows": NUM_ROWS // NUM_SHARDS},
        limits={"max_quarantined": 0.5},
    )


def night(job: Job) -> None:
    """Score what has no commit record, and publish: the steps of `pipeline/run.py`."""
    output = open_storage(job.output.uri)
    published = find_published(output, job.name, DATE)
    if published is not None:
        settle(output, published)
        return
    plan = a_plan(job)
    probe(output, f"{job.name}/_runs")
    ledger = Ledger(output, job.name, RUN)
    attempt = Attempt(id=uuid.uuid4().hex, started_at=utc_now(), host="here", pid=os.getpid())
    ledger.open({"run_id": RUN}, attempt)
    done = ledger.records()
    todo = [shard for shard in plan.shards if shard.index not in done]
    # In a bucket, commits side by side: more of them may be cut short.
    tools = scoring_tools(job, plan, SumRunner(), owner=attempt.id, rows_side_by_side=NUM_ROWS)
    with ShardScoring(todo, tools) as scoring:
        committed = [record.shard for record in scoring]
    assert not set(committed) & set(done), "a committed shard was scored again"
    records = ledger.records()
    check_complete(plan, records)
    num_scored = sum(record.num_scored for record in records.values())
    facts = {"rows": NUM_ROWS, "scored": num_scored, "quarantined": NUM_ROWS - num_scored}
    report: Any = SimpleNamespace(**facts, to_dict=lambda: {"unreadable_files": []})
    publish(draft_of(job, plan, ledger, records, report), output)


def disturb(folder: Path, how: str, number: int) -> None:
    """From the `number`-th operation that changes files below a folder on: exit, stop or fail."""
    count = itertools.count(1)

    def operation(what: str) -> None:
        at = next(count)
        if how == "exit" and at == number:
            os._exit(CRASHED)
        if how == "stop" and at == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        if (how == "once" and at == number) or (how == "forever" and at >= number):
            raise OSError(errno.ENOSPC, "No space left on device", what)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        operation(event)

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        operation("fsync")
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def forked(work: Callable[[], None], kill_after_s: float | None = None) -> int:
    """Exit code of a child that does the work; 1: it raised; -9 when it was killed in time.

    Raises:
        TimeoutError: It was still at it after `PATIENCE_S`.
    """
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            if os.environ.get("CRASH_NIGHT_TALKS"):
                traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + PATIENCE_S
    kill_at = time.monotonic() + kill_after_s if kill_after_s is not None else None
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if kill_at is not None and time.monotonic() >= kill_at:
            os.kill(pid, signal.SIGKILL)
            kill_at = None
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError("it hangs")
        time.sleep(0.001)


def problem_of(job: Job, folder: Path) -> str | None:
    """What is wrong after the undisturbed night; None: nothing."""
    verdict = verify_published(job.output.uri, job.name, DATE)
    counted = (verdict["rows"], verdict["scored"], verdict["quarantined"])
    if counted != (NUM_ROWS, NUM_ROWS - 1, 1):
        return f"rows, scored, quarantined: {counted}"
    found = {}
    for part in (folder / published_folder(job.name, DATE)).glob("*.parquet"):
        table = pq.read_table(part)
        found |= dict(zip(table["user_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    expected = {row: 3.0 * row for row in range(NUM_ROWS) if row != BAD_ROW}
    return None if found == expected else "other scores"


def partly_visible(job: Job, output: Path) -> str | None:
    """What a reader would see too early; None: all or nothing."""
    folder = output / published_folder(job.name, DATE)
    parts = len(list(folder.glob("*.parquet")))
    whole = (folder / "_MANIFEST.json").exists()
    if parts != (NUM_SHARDS if whole else 0):
        return f"a reader sees {parts} parts, and {'a' if whole else 'no'} manifest"
    return None


def trial(folder: Path, disturbed: Callable[[Job, Path], int]) -> dict[str, Any]:
    """One disturbed night and the same one again."""
    output = folder / f"out-{uuid.uuid4().hex[:8]}"
    job = job_in(folder, output)
    result: dict[str, Any] = {"code": None, "problem": None}
    try:
        result["code"] = disturbed(job, output)
        problem = partly_visible(job, output)
        if not problem and (code := forked(lambda: night(job))):
            problem = f"the same night again: exit code {code}"
        result["problem"] = problem or problem_of(job, output)
    except Exception as error:
        result["problem"] = repr(error)
    if not result["problem"]:
        shutil.rmtree(output)
    return result


def at_operations(folder: Path, how: str, numbers: range) -> Iterator[dict[str, Any]]:
    """A trial for each number, until a night is over before it comes to so many operations."""
    for number in numbers:

        def disturbed(job: Job, output: Path, number: int = number) -> int:
            def work() -> None:
                disturb(output, how, number)
                night(job)

            return forked(work)

        result = trial(folder, disturbed)
        yield {"number": number, **result}
        if result["code"] == 0 and how != "once":
            return


def at_random(folder: Path, seed: int, num_kills: int) -> Iterator[dict[str, Any]]:
    """Nights that are killed at random moments, again and again, until all kills are used."""
    rng = random.Random(seed)
    usual_s = PATIENCE_S

    def undisturbed(job: Job, _: Path) -> int:
        nonlocal usual_s
        started = time.monotonic()
        code = forked(lambda: night(job))
        usual_s = time.monotonic() - started
        return code

    for _ in range(2):  # the first trial imports here what every child needs
        trial(folder, undisturbed)
    left = num_kills
    while left > 0:

        def disturbed(job: Job, output: Path) -> int:
            nonlocal left
            code = -signal.SIGKILL
            while code == -signal.SIGKILL and left > 0:
                code = forked(lambda: night(job), rng.uniform(0, usual_s))
                left -= code == -signal.SIGKILL
                assert code in (0, -signal.SIGKILL), code
                assert not (seen := partly_visible(job, output)), seen
            return code

        result = trial(folder, disturbed)
        yield {"left": left, **result}


def main() -> None:
    """See above."""
    folder, how = Path(sys.argv[1]), sys.argv[2]
    numbers = [int(text) for text in sys.argv[3:]]
    found = at_random(folder, *numbers) if how == "kill" else None
    for result in found or at_operations(folder, how, range(*numbers)):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
