"""Rows that an engine has no answer to: it refuses their batch, or its answer is no number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from engines.runner import HostRunner, Outputs
from pipeline.blocks import Array, BadRow, ScoredBlock

STAGE = "infer"


def run_batch(
    runner: HostRunner, batch: Array, on_try: Callable[[], None]
) -> tuple[Outputs, dict[int, str]]:
    """Compute a batch without the rows for which the engine refuses it.

    An id beyond a table of embeddings is such a row: ONNX Runtime then computes nothing at all.

    Args:
        runner: Opened.
        batch: A full one.
        on_try: Is told before each try to find them, by halves: that takes longer than a batch.

    Returns:
        The outputs, and for each row that holds a placeholder's what the engine said of it.

    Raises:
        Exception: What the runner says of rows of zeros as well: it is not the rows' fault.
    """
    try:
        return runner.run(batch), {}
    except Exception:  # runtimes have exceptions of their own
        runner.run(np.zeros_like(batch))
    refused = dict(_refused(runner, batch, 0, len(batch), on_try))
    allowed = batch.copy()
    allowed[list(refused)] = 0
    return runner.run(allowed), refused


def _refused(
    runner: HostRunner, batch: Array, first: int, end: int, on_try: Callable[[], None]
) -> Iterator[tuple[int, str]]:
    """Those of the rows from `first` to `end` that are refused in a batch of their own."""
    on_try()
    try:
        runner.run(np.resize(batch[first:end], batch.shape))
    except Exception as error:
        if end - first == 1:
            yield first, f"the engine refuses it: {error}"
            return
        middle = (first + end) // 2
        yield from _refused(runner, batch, first, middle, on_try)
        yield from _refused(runner, batch, middle, end, on_try)


def without_numbers(block: ScoredBlock) -> ScoredBlock:
    """The block, its rows bad to which the engine answered NaN or an infinity."""
    bad_rows: dict[int, BadRow] = {}
    for output in block.outputs:
        if np.isfinite(output).all():  # nearly always
            continue
        for row in np.flatnonzero(~np.isfinite(output).all(axis=1)).tolist():
            what = "NaN" if np.isnan(output[row]).any() else "infinite"
            bad_rows[row] = BadRow(
                stage=STAGE,
                reason="answer_not_finite",
                message=f"the engine's answer is {what}",
                sha256="",
            )
    if not bad_rows:
        return block
    return dataclasses.replace(block, bad_rows=bad_rows | dict(block.bad_rows))
