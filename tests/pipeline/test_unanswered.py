"""Rows without an answer cost themselves, and nothing beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_cases import (
    SumRunner,
    a_job,
    a_plan,
    job_data,
    scoring_tools,
    users,
    write_input,
)

from engines.runner import Outputs
from pipeline.blocks import Array
from pipeline.score_shards import ShardScoring
from pipeline.unanswered import run_batch

NUM_ROWS = 30
REFUSED = (3, 4, 5, 6, 7, 21, 29)
BATCH = np.arange(8, dtype=np.float32).reshape(4, 2)


class Refusing(SumRunner):
    """Refuses batches with one of some values in the first column, as ONNX Runtime does of ids."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        self._values = values

    def run(self, batch: Array) -> Outputs:
        refused = set(batch[:, 0].tolist()) & set(self._values)
        if refused:
            raise RuntimeError(f"{len(refused)} of them out of bounds")
        return self._score(batch)


@pytest.mark.parametrize("values", [(), (0.0,), (6.0,), (2.0, 4.0), (0.0, 2.0, 4.0, 6.0)], ids=str)
def test_of_a_batch_the_rows_are_found_that_are_refused(values: tuple[float, ...]) -> None:
    batch, tries = BATCH + 1, []
    (scores,), refused = run_batch(
        Refusing(tuple(value + 1 for value in values)), batch, lambda: tries.append(1)
    )
    assert [batch[row, 0] - 1 for row in refused] == list(values)
    assert set(refused.values()) <= {"the engine refuses it: 1 of them out of bounds"}
    others = [row for row in range(4) if row not in refused]
    np.testing.assert_array_equal(scores[others, 0], batch.sum(axis=1)[others])
    assert len(tries) <= 7


def test_what_is_said_of_any_row_is_no_fault_of_the_rows() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        run_batch(Refusing((0.0, 6.0)), BATCH, lambda: None)


def test_an_error_that_does_not_come_again_costs_no_row() -> None:
    class Once(SumRunner):
        has_failed = False

        def run(self, batch: Array) -> Outputs:
            self.has_failed, failed = True, self.has_failed
            if not failed:
                raise MemoryError
            return self._score(batch)

    (scores,), refused = run_batch(Once(), BATCH, lambda: None)
    np.testing.assert_array_equal(scores[:, 0], BATCH.sum(axis=1))
    assert not refused


class Logarithm(SumRunner):
    """Has no number for negative rows, and none that is finite for those of zeros."""

    def _score(self, batch: Array) -> Outputs:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (np.log(batch.sum(axis=1, keepdims=True)),)


def scored_and_bad(root: Path, runner: SumRunner, threads: int | None) -> tuple[set[int], Any]:
    """Ids of the rows in parts, and the rows in quarantine by their number."""
    job = a_job(job_data(root))
    plan = a_plan(job)
    tools = scoring_tools(job, plan, runner, core_threads=threads)
    with ShardScoring(plan.shards, tools) as scoring:
        records = list(scoring)
    parts = root / "out" / "users" / "_runs" / "run" / "parts"
    bad = [record.quarantine for record in records if record.quarantine]
    scored = [pq.read_table(parts / record.part.name) for record in records]
    rows = pa.concat_tables(pq.read_table(parts / part.name) for part in bad).to_pylist()
    return set(pa.concat_tables(scored)["user_id"].to_pylist()), {row["row"]: row for row in rows}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_that_the_engine_refuses_is_one_in_quarantine(tmp_path: Path, threads: int) -> None:
    write_input(tmp_path / "in", users(NUM_ROWS))
    scored, bad = scored_and_bad(tmp_path, Refusing(tuple(map(float, REFUSED))), threads)
    assert scored == set(range(NUM_ROWS)) - set(REFUSED)
    assert set(bad) == set(REFUSED)
    row = bad[21]
    assert (row["stage"], row["reason"]) == ("infer", "engine_refused")
    assert row["sha256"] == hashlib.sha256(np.float32([21, 42]).tobytes()).hexdigest()


@pytest.mark.parametrize("threads", [None, 3], ids=["stages", "cores"])
def test_a_row_whose_answer_is_no_number_is_one_in_quarantine(
    tmp_path: Path, threads: int | None
) -> None:
    write_input(tmp_path / "in", users(NUM_ROWS, first=-2))
    runner = Logarithm()
    runner.run = runner._score  # type: ignore[attr-defined]
    scored, bad = scored_and_bad(tmp_path, runner, threads)
    assert scored == set(range(1, NUM_ROWS - 2))
    said = {row: (why["reason"], why["message"]) for row, why in bad.items()}
    assert said == {
        0: ("answer_not_finite", "the engine's answer is NaN"),
        1: ("answer_not_finite", "the engine's answer is NaN"),
        2: ("answer_not_finite", "the engine's answer is infinite"),
    }
