"""Where each microsecond of a row goes, from Parquet page to committed part, on a CPU.

    python -m benchmarks.profile_rows JOB --date D [--set key=value] [--rows 2000] [--threads 2]

Scores rows of a job with the very stages of a lane, in this process, with a clock around each step;
the engine must be in the store (`score engine build`). Steps exclude each other:
one that calls another is not charged for it. They are CPU seconds of the thread that works, which
others on the machine hardly change; inference is what is left of the process's CPU seconds, as
OpenVINO computes in threads of its own. What is left of the cores' time is idle, or was taken by
others. Writes a Markdown table to standard output.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any
from unittest import mock

from engines.devices import this_cpu
from engines.load import open_runner, probe_batch
from engines.manifest import StoredEngine
from engines.model import fingerprint_model
from engines.onnxrt import OnnxrtRunner
from engines.ovino import OpenVinoRunner
from pipeline import part
from pipeline.config import Job
from pipeline.decode_features import FeatureDecoder
from pipeline.decode_windows import WindowDecoder, _ThreadTools
from pipeline.engine import load_class_names, request_for, stored_engine
from pipeline.job_file import load_job
from pipeline.lane_child import keep_freed_memory, make_decoder
from pipeline.ledger import Ledger
from pipeline.local_storage import LocalStorage
from pipeline.part import OutputLayout
from pipeline.plan import Plan, Shard, make_plan
from pipeline.score_on_cores import CoreScoring
from pipeline.score_shards import ScoringTools, ShardScoring
from pipeline.screen_images import ImageScreen
from pipeline.storage import open_storage
from pipeline.work_marks import WorkMarks

STEPS: dict[str, tuple[Any, str]] = {
    "pre-screen": (ImageScreen, "screen"),
    "decode the window": (_ThreadTools, "_read"),
    "resize": (_ThreadTools, "_resize"),
    "copy pixels into the batch": (WindowDecoder, "decode"),
    "interleave columns": (FeatureDecoder, "_assemble"),
    "check features": (FeatureDecoder, "decode"),
    "bookkeeping of blocks": (CoreScoring, "_score_block"),
    "build the part": (part, "_to_parquet"),
    "hash the part": (Ledger, "_store"),
    "store part and record": (LocalStorage, "create"),
}
"""Step -> what is timed. `hash the part` is what is left of storing it."""
STEPS_OF_WRITING = ("build the part", "hash the part", "store part and record")
IDLE = "idle, or taken by others"
RUNNERS = {"openvino": OpenVinoRunner, "onnxruntime": OnnxrtRunner}
"""Runtime -> whose `run` is the inference."""


class Clock:
    """Exclusive CPU seconds of nested steps, over all threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open = threading.local()

    def timed(self, step: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, with its time on the clock."""

        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            inner: list[float] = getattr(self._open, "inner", [])
            self._open.inner = inner
            inner.append(0.0)
            started = time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                total_s = time.thread_time() - started
                self.seconds[step] += total_s - inner.pop()
                if inner:
                    inner[-1] += total_s

        return run


def score(
    job: Job, plan: Plan, engine: StoredEngine, num_rows: int, num_threads: int
) -> tuple[dict[str, float], int]:
    """Score about `num_rows` rows; core seconds of each step, `IDLE` included, and the rows."""
    clock = Clock()
    shards = list(_some(plan.shards, num_rows))
    runner = RUNNERS[engine.manifest.runtime]
    with ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory())
        for step, (owner, name) in {**STEPS, "inference": (runner, "run")}.items():
            timed = clock.timed(step, getattr(owner, name))
            opened.enter_context(mock.patch.object(owner, name, timed))
        decoder = make_decoder(
            job, plan.feature_columns, plan.num_features, num_threads, engine.manifest.batch_size
        )
        tools = ScoringTools(
            source=open_storage(job.input.uri),
            ledger=Ledger(open_storage(folder), job.name, "profile"),
            decoder=opened.enter_context(decoder),
            runner=opened.enter_context(open_runner(engine, num_threads)),
            layout=OutputLayout(
                head=job.model.head,
                class_names=load_class_names(job.model.class_names),
                compression=job.output.compression,
                metadata={},
            ),
            passthrough=job.input.passthrough,
            owner="profile",
            marks=WorkMarks(get_context("spawn")),
            core_threads=num_threads,
        )
        clock.seconds.clear()  # opening the engine ran its probe batch
        started, cpu_s = time.perf_counter(), time.process_time()
        with ShardScoring(shards, tools) as scoring:
            scored = sum(record.num_rows for record in scoring)
            elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
            times = scoring.times()
    del clock.seconds["inference"]  # of the threads that call: they only wait for OpenVINO's
    seconds = {"read": times["read"].cpu_s, **clock.seconds}
    written_s = sum(clock.seconds[step] for step in STEPS_OF_WRITING)
    seconds["write, the rest"] = max(0.0, times["write"].cpu_s - written_s)
    seconds["inference"] = max(0.0, cpu_s - sum(seconds.values()))
    seconds[IDLE] = max(0.0, elapsed_s * num_threads - cpu_s)
    return seconds, scored


def _some(shards: Sequence[Shard], num_rows: int) -> Iterator[Shard]:
    so_far = itertools.accumulate((shard.num_rows for shard in shards), initial=0)
    return (shard for shard, before in zip(shards, so_far, strict=False) if before < num_rows)


def inside_the_engine(engine: StoredEngine) -> dict[str, float]:
    """Shares of an engine's time: before its first layer, layers, after its last.

    Of OpenVINO's; others are not looked into.
    """
    if engine.manifest.runtime != "openvino":
        return {"all of it": 1.0}
    import openvino

    settings = {"PERF_COUNT": True, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().import_model(engine.artifact.read_bytes(), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(probe_batch(engine.manifest.input)))
    seconds: Counter[str] = Counter()
    for _ in range(30):
        request.infer()
        steps = [step for step in request.profiling_info if step.status.name == "EXECUTED"]
        is_layer = ["Conv" in step.node_type or "Fully" in step.node_type for step in steps]
        first, last = is_layer.index(True), len(steps) - 1 - is_layer[::-1].index(True)
        for number, step in enumerate(steps):
            before_or_after = "normalise and round" if number < first else "post-process"
            place = "layers" if first <= number <= last else before_or_after
            seconds[place] += step.real_time.total_seconds()
    return {place: value / seconds.total() for place, value in seconds.items()}


def table(seconds: dict[str, float], num_rows: int, shares: dict[str, float]) -> str:
    """Microseconds of a core for a row, the largest step first."""
    inference, idle_s = seconds.pop("inference", 0.0), seconds.pop(IDLE)
    seconds |= {f"inference: {place}": inference * share for place, share in shares.items()}
    total = sum(seconds.values())
    lines = ["| step | core us a row | share |", "|---|--:|--:|"]
    for step, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value:
            lines.append(f"| {step} | {value / num_rows * 1e6:,.3f} | {value / total:.1%} |")
    lines.append(f"| **all** | {total / num_rows * 1e6:,.3f} | 100 % |")
    lines.append(f"| {IDLE} | {idle_s / num_rows * 1e6:,.3f} | |")
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--date", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    job = load_job(args.job, args.set)
    plan = make_plan(job, args.date, open_storage(job.input.uri))
    device = this_cpu(args.threads)
    request = request_for(job, plan.num_features, device)
    found = stored_engine(job, request, fingerprint_model(request.model))
    if found is None:
        sys.exit(f"{args.job}: no engine in its store; build it: score engine build.")
    engine = found.engine
    score(job, plan, engine, args.rows // 4, args.threads)  # warms caches up
    seconds, num_rows = score(job, plan, engine, args.rows, args.threads)
    sys.stdout.write(
        f"{datetime.date.today()}, {device.name}, {args.threads} threads, {num_rows:,} rows, "
        f"{engine.manifest.runtime} {engine.manifest.precision} in batches of "
        f"{engine.manifest.batch_size}\n\n"
    )
    sys.stdout.write(table(seconds, num_rows, inside_the_engine(engine)) + "\n")


if __name__ == "__main__":
    main()
