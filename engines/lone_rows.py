"""Answers to many rows of which some end the whole batch: an id that a model's table has not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engines.errors import EngineError
from engines.gate import Answers
from engines.model import shown
from engines.runner import Array

log = logging.getLogger(__name__)

NOT_THE_ROWS = (EngineError, MemoryError, OSError)
"""Errors that say nothing of the rows."""
PATIENCE = 16
"""Rows at the front that may fail one after the other; then it is the graph that does."""


def run_apart(
    run: Callable[[Array], Answers], rows: Array
) -> tuple[Answers, npt.NDArray[np.bool_]]:
    """Answers to the rows that can be computed; batches that fail are halved down to single rows.

    Args:
        run: Computes any number of rows; raises if one of them cannot be computed.
        rows: At least one, in random order.

    Returns:
        Answers to the rows that could be, and which these are: bool [rows].

    Raises:
        Exception: That of the first failure, if it is not the rows' fault or all of them fail.
    """
    found: list[Answers] = []
    ran = np.ones(len(rows), bool)
    problem = None
    waiting = [(0, len(rows))]
    while waiting:
        start, stop = waiting.pop()
        try:
            found.append(run(rows[start:stop]))
        except NOT_THE_ROWS:
            raise
        except Exception as error:  # the runtime may raise anything
            problem = problem or error
            if stop - start > 1:
                middle = (start + stop) // 2
                waiting += [(middle, stop), (start, middle)]
                continue
            ran[start] = False
            if not found and (not waiting or stop == PATIENCE):
                raise problem from None
    if problem is not None:
        lost = len(rows) - ran.sum()
        log.warning("fp32: %d of %d rows: left out: %s", lost, len(rows), shown(problem))
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}, ran


def with_gaps(answers: Answers, ran: npt.NDArray[np.bool_]) -> Answers:
    """Answers to all rows, of `run_apart`'s: NaN, or 0 for integers, where a row has none."""
    filled = {}
    for name, array in answers.items():
        gap = np.nan if np.issubdtype(array.dtype, np.floating) else 0
        filled[name] = np.full((len(ran), *array.shape[1:]), gap, array.dtype)
        filled[name][ran] = array
    return filled
