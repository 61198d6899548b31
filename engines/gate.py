"""The accuracy gate and the race: what an engine answers against fp32, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from engines.model import Head
from engines.runner import Array, Outputs, Runner

RACE_ROUNDS = 5
RACE_S = 0.25
"""Seconds for each runner in each round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """What an engine must reach on held-out rows before it may score."""

    num_rows: int = 512
    min_agreement: float = 0.97


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How the answers of an engine compare with those of fp32 on the same held-out rows."""

    num_rows: int
    agreement: float
    """Classes: share of rows with the same best class. Scores: the lowest share of variance
    that is explained (R squared) of any output column; a shift or another scale costs too."""
    mean_abs_diff: float
    """Of the best class's probability, or of the scores."""
    max_abs_diff: float

    def passes(self, gate: GateSpec) -> bool:
        """Whether the agreement is high enough."""
        return self.agreement >= gate.min_agreement


def compare(head: Head, reference: Outputs, found: Outputs) -> Accuracy:
    """Judge outputs [rows, k] against the reference's."""
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.abs(found[-1].astype(np.float64) - reference[-1].astype(np.float64))
    if head == "classes":
        difference = difference[:, 0]
    if not np.isfinite(difference).all():  # NaN scores agree with nothing
        agreement = 0.0
    elif head == "classes":
        agreement = float(np.mean(reference[0][:, 0] == found[0][:, 0]))
    else:
        columns = range(reference[0].shape[1])
        agreement = min(_explained(reference[0][:, i], found[0][:, i]) for i in columns)
    return Accuracy(
        num_rows=len(reference[0]),
        agreement=agreement,
        mean_abs_diff=float(difference.mean()),
        max_abs_diff=float(difference.max()),
    )


def _explained(expected: Array, found: Array) -> float:
    if np.ptp(expected) == 0:  # no variance to explain: constant scores agree or do not
        return 1.0 if np.allclose(expected, found, rtol=1e-2) else 0.0
    error = np.mean(np.square(expected.astype(np.float64) - found))
    return max(0.0, 1.0 - float(error / np.var(expected, dtype=np.float64)))


def run_rows(runner: Runner, rows: Array) -> Outputs:
    """Outputs for any number of rows; the last batch is padded."""
    outputs = list(runner.infer(_batches(rows, runner.batch_size)))
    return tuple(np.concatenate(parts)[: len(rows)] for parts in zip(*outputs, strict=True))


def _batches(rows: Array, batch_size: int) -> Iterator[Array]:
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        if len(batch) < batch_size:
            batch = np.resize(batch, (batch_size, *batch.shape[1:]))
        yield batch


def race(runners: Mapping[str, Runner], rows: Array) -> dict[str, float]:
    """Rows per second of each runner: alone, in interleaved rounds, medians."""
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(RACE_ROUNDS):
        for name, runner in runners.items():
            speeds[name].append(_rate(runner, rows))
    return {name: median(values) for name, values in speeds.items()}


def _rate(runner: Runner, rows: Array) -> float:
    """Rows per second over one stream of full batches, `RACE_S` long."""
    batch = np.ascontiguousarray(np.resize(rows, (runner.batch_size, *rows.shape[1:])))
    started = time.perf_counter()

    def until_time_is_up() -> Iterator[Array]:
        while time.perf_counter() - started < RACE_S:
            yield batch

    num_batches = sum(1 for _ in runner.infer(until_time_is_up()))
    return num_batches * runner.batch_size / (time.perf_counter() - started)
