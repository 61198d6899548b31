"""Small real inputs, jobs and tools for the tests of the pipeline."""

from __future__ import annotations

import dataclasses
import io
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from engines.runner import Outputs, TensorSpec
from pipeline.blocks import Array
from pipeline.config import Job
from pipeline.lane_messages import WatchLimits
from pipeline.ledger import Ledger
from pipeline.part import OutputLayout
from pipeline.plan import Plan, make_plan
from pipeline.score_shards import ScoringTools
from pipeline.storage import open_storage
from pipeline.work_marks import WorkMarks

DATE = "2026-11-20"
LIMITS = WatchLimits(hang_s=30, rows_per_s=1_000, max_rss_bytes=1 << 40)
LAYOUT = OutputLayout(head="scores", class_names=(), compression="zstd", metadata={"run_id": "r"})


def users(num_rows: int, first: int = 0) -> pa.Table:
    """Ids and two features: f0 = id, f1 = 2 id."""
    ids = np.arange(first, first + num_rows)
    return pa.table(
        {"user_id": ids, "f0": ids.astype(np.float32), "f1": (2 * ids).astype(np.float32)}
    )


def write_input(
    root: Path,
    table: pa.Table,
    *,
    name: str = "part-0.parquet",
    folder: str = f"dt={DATE}",
    rows_per_group: int = 10,
) -> Path:
    """One Parquet file of the dataset at `root`."""
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True)
    return path


def job_data(root: Path) -> dict[str, Any]:
    """A features job as its file says it."""
    return {
        "name": "users",
        "input": {
            "uri": str(root / "in"),
            "passthrough": ["user_id"],
            "features": {"columns": ["f*"]},
        },
        "model": {"source": "model.onnx", "head": "scores"},
        "output": {"uri": str(root / "out")},
        "lanes": {"shard_rows": 20},
        "cost": {"instance": "c6i.large"},
    }


def images_data(root: Path) -> dict[str, Any]:
    """A pictures job as its file says it."""
    data = job_data(root)
    del data["input"]["features"]
    data["input"]["images"] = {"column": "image"}
    data["model"]["head"] = "classes"
    return data


def a_job(data: dict[str, Any], **sections: dict[str, Any]) -> Job:
    """The job, with values of some sections replaced."""
    merged = {**data, **{name: {**data.get(name, {}), **new} for name, new in sections.items()}}
    return Job.model_validate(merged)


def a_plan(job: Job) -> Plan:
    return make_plan(job, DATE, open_storage(job.input.uri))


class SumRunner:
    """Sums each row; keeps up to two batches in flight, as real runners do."""

    input = TensorSpec(name="x", dtype="float32", shape=(4, 2))
    outputs = (TensorSpec(name="score", dtype="float32", shape=(4, 1)),)

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size
        self.num_batches = 0

    def __enter__(self) -> SumRunner:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def infer(self, batches: Iterable[Array | None]) -> Iterator[Outputs]:
        in_flight: deque[Array] = deque()
        for batch in batches:
            if batch is not None:
                assert len(batch) == self.batch_size
                self.num_batches += 1
                in_flight.append(batch)
            while len(in_flight) > (0 if batch is None else 2):
                yield self._score(in_flight.popleft())
        while in_flight:
            yield self._score(in_flight.popleft())

    def _score(self, batch: Array) -> Outputs:
        return (batch.reshape(len(batch), -1).sum(axis=1, keepdims=True),)


def scoring_tools(job: Job, plan: Plan, runner: Any, **changes: Any) -> ScoringTools:
    """What a lane would hold for a features job."""
    from pipeline.decode_features import FeatureDecoder

    assert job.input.features is not None
    tools = {
        "source": open_storage(job.input.uri),
        "ledger": Ledger(open_storage(job.output.uri), job.name, "run"),
        "decoder": FeatureDecoder(job.input.features, plan.feature_columns, plan.num_features),
        "runner": runner,
        "layout": dataclasses.replace(LAYOUT, wider_types=plan.wider_types),
        "passthrough": job.input.passthrough,
        "owner": "attempt",
        "marks": WorkMarks(get_context("spawn")),
    }
    return ScoringTools(**{**tools, **changes})


def photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """Smooth colours, so that compression changes little."""
    y, x = np.mgrid[0:height, 0:width]
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(x / 17 + phase) + np.cos(y / 13 - phase) for phase in phases]
    return Image.fromarray(np.uint8(127 + 60 * np.stack(waves, axis=-1)))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def as_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def publish_night(job: Job, report: Any) -> Path:
    """Score the job's date with `SumRunner` and publish it; the published folder."""
    from pipeline.publish import draft_of, publish
    from pipeline.score_shards import ShardScoring

    plan = a_plan(job)
    tools = scoring_tools(job, plan, SumRunner())
    with ShardScoring(plan.shards, tools) as scoring:
        records = {record.shard: record for record in scoring}
    num_scored = sum(record.num_scored for record in records.values())
    numbers = {
        "rows": plan.num_rows,
        "scored": num_scored,
        "quarantined": plan.num_rows - num_scored,
    }
    named = dataclasses.replace(report, job=job.name, date=plan.date, **numbers)
    output = open_storage(job.output.uri)
    assert publish(draft_of(job, plan, tools.ledger, records, named), output)
    return Path(job.output.uri, job.name, f"dt={plan.date}")
