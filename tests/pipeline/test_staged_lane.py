"""A real lane whose decoder and engine are stages, as on a GPU: slow ones, and lost devices."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_cases import LAYOUT, a_job, a_plan, job_data, users, write_input
from staged_cases import BLOCK_ROWS, BROKEN, SLOW, UNLUCKY, WAS_UNLUCKY

from pipeline.errors import LaneError
from pipeline.lane import Lane, LaneDevice
from pipeline.lane_messages import LaneSetup, WatchLimits
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.storage import open_storage

pytestmark = pytest.mark.timeout(120)
NUM_ROWS, SHARD_ROWS = 400, 200
ENGINE: Any = SimpleNamespace(manifest=SimpleNamespace(device=SimpleNamespace(kind="gpu")))
"""Of a device: stages are side by side."""


@pytest.fixture
def a_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Lane, Plan]]]:
    """Opened, for rows of which some have another first feature."""
    monkeypatch.setenv(WAS_UNLUCKY, str(tmp_path / "was-unlucky"))
    lanes: list[Lane] = []

    def start(first_feature: dict[int, float], hang_s: float) -> tuple[Lane, Plan]:
        table = users(NUM_ROWS)
        values = [first_feature.get(row, 0.0) for row in range(NUM_ROWS)]
        table = table.set_column(1, "f0", pa.array(values, pa.float32()))
        write_input(tmp_path / "in", table, rows_per_group=SHARD_ROWS)
        job = a_job(job_data(tmp_path), lanes={"shard_rows": SHARD_ROWS})
        plan = a_plan(job)
        lane = Lane(LaneDevice(name="gpu0", num_threads=1), ("staged_cases",))
        lanes.append(lane)
        lane.open(
            LaneSetup(
                job=job,
                engine=ENGINE,
                feature_columns=plan.feature_columns,
                num_features=plan.num_features,
                layout=LAYOUT,
                run_id="run",
                attempt="attempt",
                num_threads=1,
                limits=WatchLimits(hang_s=hang_s, rows_per_s=1e9, max_rss_bytes=1 << 40),
            )
        )
        return lane, plan

    yield start
    for lane in lanes:
        lane.abort()


def quarantined(tmp_path: Path) -> dict[int, dict[str, Any]]:
    output = open_storage(str(tmp_path / "out"))
    ledger, found = Ledger(output, "users", "run"), {}
    for record in ledger.records().values():
        if record.quarantine:
            (data,) = output.read_many([ledger.part_path(record.quarantine)])
            found |= {row["row"]: row for row in pq.read_table(io.BytesIO(data)).to_pylist()}
    return found


def test_blocks_that_wait_behind_a_slow_decoder_are_not_hung(
    a_lane: Callable[..., tuple[Lane, Plan]], tmp_path: Path
) -> None:
    """Each takes 0.8 s to decode, and three wait for the next in the runner."""
    slow = dict.fromkeys(range(SHARD_ROWS, SHARD_ROWS + 8 * BLOCK_ROWS), SLOW)
    lane, plan = a_lane(slow, hang_s=1.8)
    assert sum(record.num_scored for record in lane.score(plan.shards)) == NUM_ROWS
    assert lane.num_restarts == 0
    assert not quarantined(tmp_path)
    assert lane.ceilings is not None
    assert lane._watchdog is not None
    assert lane._watchdog.limits.rows_per_s == lane.ceilings.decode_per_sec  # the engine is faster


def test_a_device_that_is_lost_once_costs_a_process_and_no_row(
    a_lane: Callable[..., tuple[Lane, Plan]], tmp_path: Path
) -> None:
    lane, plan = a_lane({250: UNLUCKY}, hang_s=60)
    assert sum(record.num_scored for record in lane.score(plan.shards)) == NUM_ROWS
    assert lane.num_restarts == 1
    assert not quarantined(tmp_path)


def test_a_row_that_costs_the_device_is_found_and_quarantined(
    a_lane: Callable[..., tuple[Lane, Plan]], tmp_path: Path
) -> None:
    lane, plan = a_lane({250: BROKEN}, hang_s=60)
    assert sum(record.num_scored for record in lane.score(plan.shards)) == NUM_ROWS - 1
    ((row, found),) = quarantined(tmp_path).items()
    assert (row, found["reason"]) == (250, "crashed")
    assert "cudaErrorIllegalAddress" in found["message"]


def test_a_device_that_serves_no_process_ends_the_lane_in_its_words(
    a_lane: Callable[..., tuple[Lane, Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.suspects.MAX_POISON_ROWS", 0)
    lane, plan = a_lane(dict.fromkeys(range(NUM_ROWS), BROKEN), hang_s=60)
    with pytest.raises(LaneError, match="exit code 3: CUDA, cudaEventSync"):
        lane.score(plan.shards)
