"""Rows that end a whole batch are found, and the others are answered."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import EngineError
from engines.gate import Answers
from engines.lone_rows import PATIENCE, run_apart, with_gaps
from engines.runner import Array


class Doubling:
    """Doubles rows, but for batches with a negative one."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, rows: Array) -> Answers:
        self.num_calls += 1
        if (rows < 0).any():
            raise IndexError(f"row {rows.min()}")
        return {"id": rows[:, 0].astype(np.int32), "score": 2 * rows}


def rows_without(*bad: int, num_rows: int = 100) -> Array:
    rows = np.arange(num_rows, dtype=np.float32)[:, None]
    rows[list(bad)] = -1
    return rows


@pytest.mark.parametrize(
    "bad", [(), (0,), (99,), (0, 50, 51), tuple(range(15)), tuple(range(1, 100))]
)
def test_all_rows_but_those_are_answered_in_order(bad: tuple[int, ...]) -> None:
    rows = rows_without(*bad)
    answers, ran = run_apart(Doubling(), rows)
    assert set(np.flatnonzero(~ran)) == set(bad)
    np.testing.assert_array_equal(answers["score"], 2 * rows[ran])
    filled = with_gaps(answers, ran)
    np.testing.assert_array_equal(filled["score"], np.where(rows < 0, np.nan, 2 * rows))
    assert filled["id"].dtype == np.int32
    assert (filled["id"][~ran] == 0).all()


@pytest.mark.parametrize("num_rows", [1, 5, PATIENCE, 1000])
def test_where_no_row_can_be_run_the_first_failure_is_raised_soon(num_rows: int) -> None:
    double = Doubling()
    with pytest.raises(IndexError, match="row -1"):
        run_apart(double, rows_without(*range(num_rows), num_rows=num_rows))
    assert double.num_calls <= 2 * PATIENCE + 10


@pytest.mark.parametrize("kind", [EngineError, MemoryError, OSError])
def test_errors_that_say_nothing_of_the_rows_are_raised_at_once(kind: type[Exception]) -> None:
    calls: list[int] = []

    def fail(rows: Array) -> Answers:
        calls.append(len(rows))
        raise kind("no")

    with pytest.raises(kind, match="no"):
        run_apart(fail, rows_without())
    assert calls == [100]
