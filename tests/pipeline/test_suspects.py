"""What a lane learns from the deaths of its processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.lane_messages import PoisonRow, Suspect
from pipeline.suspects import MAX_POISON_ROWS, MAX_UNEXPLAINED, MORE_PATIENCE, Suspects

SHARD: Any = SimpleNamespace(index=7)


def rows(first: int, count: int) -> Suspect:
    return Suspect(shard=SHARD, first_row=first, num_rows=count)


def search(num_rows: int, poison: set[int]) -> tuple[Suspects, int]:
    """Processes that die of the poison rows that are left, until one lives; and their number."""
    suspects, num_deaths = Suspects(), 0
    while True:
        known = {row.row for row in suspects.poison}
        trial = next(iter(suspects.to_try), rows(0, num_rows))
        span = range(trial.first_row, trial.first_row + trial.num_rows)
        if (poison - known) & set(span):
            suspects.died([trial], "crashed", "exit code -11 (SIGSEGV)")
            num_deaths += 1
        elif suspects.to_try:
            suspects.cleared()
        else:
            return suspects, num_deaths
        assert not suspects.is_hopeless
        assert num_deaths < 200


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 100])
def test_every_poison_row_is_found_and_no_other(num_rows: int) -> None:
    for row in range(num_rows):
        suspects, num_deaths = search(num_rows, {row})
        assert [found.row for found in suspects.poison] == [row]
        assert num_deaths <= num_rows.bit_length() + 2
        assert suspects.poison[0] == PoisonRow(
            shard=7, row=row, reason="crashed", message="exit code -11 (SIGSEGV)"
        )


@pytest.mark.parametrize("poison", [{0, 1}, {0, 15}, {3, 4, 5}, set(range(16))])
def test_several_poison_rows_of_a_block_are_all_found(poison: set[int]) -> None:
    suspects, _ = search(16, poison)
    assert {found.row for found in suspects.poison} == poison


def test_a_process_that_was_killed_from_outside_costs_no_row() -> None:
    suspects = Suspects()
    suspects.died([rows(0, 16), rows(16, 16)], "crashed", "exit code -9 (SIGKILL)")
    assert suspects.to_try == [rows(0, 16), rows(16, 16)]
    suspects.cleared()
    suspects.cleared()
    assert not suspects.to_try
    assert not suspects.poison
    assert not suspects.is_hopeless


def test_only_a_hang_that_no_row_explains_gives_the_next_process_more_time() -> None:
    suspects = Suspects()
    suspects.died([rows(0, 2)], "crashed", "exit code -9 (SIGKILL)")
    suspects.cleared()
    assert suspects.patience == 1
    suspects.died([rows(0, 2)], "hung", "no answer")
    suspects.died([rows(0, 2)], "hung", "no answer")
    suspects.cleared()
    suspects.cleared()
    suspects.committed()
    assert suspects.patience == MORE_PATIENCE  # trials do not count
    suspects.died([rows(2, 1)], "hung", "no answer")
    suspects.died([rows(2, 1)], "hung", "no answer")
    assert [row.row for row in suspects.poison] == [2]
    assert suspects.patience == 1


def test_deaths_in_a_row_that_nothing_explains_are_hopeless() -> None:
    suspects = Suspects()
    for _ in range(MAX_UNEXPLAINED):
        suspects.died([], "crashed", "exit code 1")
        assert not suspects.is_hopeless
    suspects.died([], "crashed", "exit code 1")
    assert suspects.is_hopeless


def test_rows_that_only_kill_in_company_are_not_tried_for_ever() -> None:
    suspects = Suspects()
    for _ in range(MAX_UNEXPLAINED + 1):
        assert not suspects.is_hopeless
        suspects.died([rows(0, 2)], "out_of_memory", "too much")
        suspects.cleared()
    assert suspects.is_hopeless


def reading(first: int, count: int) -> Suspect:
    return Suspect(shard=SHARD, first_row=first, num_rows=count, is_read=True)


def test_row_groups_that_kill_their_reader_are_poison_as_a_whole() -> None:
    suspects = Suspects()
    suspects.died([rows(0, 8), reading(0, 100)], "out_of_memory", "too much")
    assert suspects.to_try == [reading(0, 100), rows(0, 8)]
    for first in (20, 60):
        suspects.died([reading(first, 20)], "out_of_memory", "too much")
        assert suspects.to_try == [reading(0, 100), rows(0, 8)]  # the other groups are to be tried
    assert [(row.row, row.group_rows) for row in suspects.poison] == [(20, 20), (60, 20)]
    suspects.cleared()
    suspects.cleared()
    assert not suspects.to_try
    assert not suspects.is_hopeless


def test_a_process_that_dies_before_it_reads_explains_nothing() -> None:
    suspects = Suspects()
    suspects.died([reading(0, 100)], "crashed", "exit code 1")
    for _ in range(MAX_UNEXPLAINED):
        assert not suspects.is_hopeless
        suspects.died([], "crashed", "exit code 1")
    assert suspects.is_hopeless
    assert not suspects.poison


def test_a_commit_forgives_earlier_deaths() -> None:
    suspects = Suspects()
    for _ in range(3 * MAX_UNEXPLAINED):
        suspects.died([], "crashed", "exit code -9 (SIGKILL)")
        suspects.committed()
    assert not suspects.is_hopeless


def test_a_decoder_that_kills_with_every_row_is_hopeless() -> None:
    suspects = Suspects()
    for row in range(MAX_POISON_ROWS + 1):
        assert not suspects.is_hopeless
        suspects.died([rows(row, 1)], "crashed", "exit code -11")
        suspects.died([rows(row, 1)], "crashed", "exit code -11")
    assert suspects.is_hopeless
