"""The accuracy gate and the race: what an engine answers against fp32, and how fast it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt

from engines.errors import AccuracyError
from engines.metrics import BY_CHANCE, explained_variance, task_metric
from engines.model import Head
from engines.runner import LOGITS, Array, Runner, check_answers

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
ROUNDING = 1e-9
"""Of differences between two metrics."""
MIN_ROWS = 8
"""With fewer held-out rows int8 passes by luck; a job may not ask for fewer either."""
MAY_INVENT = (2, 0.01)
"""Rows, and share of them, that an engine may answer although fp32 does not."""
RACE_ROUNDS = 5
RACE_S = 0.25
"""Seconds for each runner in each round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """What an engine must reach on held-out rows before it may score."""

    num_rows: int = 512
    min_agreement: float = 0.97
    min_cosine: float = 0.98
    max_divergence: float = 0.05
    max_metric_loss: float = 0.005
    """Of the task's metric (0.005: half a point of accuracy), where rows have labels."""
    label: str | None = None
    """Column that the labels come from."""


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
    cosine: float | None = None
    """Mean cosine between the logits of a row; None for scores."""
    divergence: float | None = None
    """Mean Kullback-Leibler divergence of a row's probabilities from fp32's, nats; None for
    scores."""
    metric_name: str | None = None
    """`accuracy`, `AUC` or `R2`; None without labels, or where fp32's is no better than chance."""
    metric: float | None = None
    reference_metric: float | None = None
    """The same metric of fp32."""
    num_invented: int = 0
    """Further rows that fp32 has no finite answer to and the engine has: NaN is lost in int8."""

    @property
    def metric_loss(self) -> float:
        """What the task's metric lost against fp32; 0 without labels."""
        if self.metric is None or self.reference_metric is None:
            return 0.0
        return self.reference_metric - self.metric

    def failures(self, gate: GateSpec) -> tuple[str, ...]:
        """What is not reached, such as `agreement 0.9312 < 0.97`; empty: it passes."""
        misses = []
        if not np.isfinite(self.max_abs_diff):
            misses.append("answers that are not finite")
        if not self.agreement >= gate.min_agreement:
            misses.append(f"agreement {self.agreement:.4f} < {gate.min_agreement}")
        if self.cosine is not None and not self.cosine >= gate.min_cosine:
            misses.append(f"cosine {self.cosine:.4f} < {gate.min_cosine}")
        if self.divergence is not None and not self.divergence <= gate.max_divergence:
            misses.append(f"divergence {self.divergence:.4f} > {gate.max_divergence}")
        if not self.metric_loss <= gate.max_metric_loss + ROUNDING:
            loss = f"{self.metric_name} loss {self.metric_loss:.4f}"
            misses.append(f"{loss} > {gate.max_metric_loss}")
        if self.num_invented > max(MAY_INVENT[0], MAY_INVENT[1] * self.num_rows):
            misses.append(f"answers to {self.num_invented} rows that fp32 has none to")
        return tuple(misses)


Answers = dict[str, Array]
"""An engine's outputs by name, one entry a row."""


def answered(reference: Answers) -> npt.NDArray[np.bool_]:
    """Which rows fp32 has a finite answer to: bool [rows].

    A zero under a logarithm is the row's fault: there is nothing to compare with, nor to round.

    Raises:
        AccuracyError: It has one to none.
    """
    known = _have_answers(reference)
    if not known.any():
        raise AccuracyError(
            f"fp32: a finite answer to none of {len(known)} rows; expected some to compare with. "
            "Look at the model and the rows."
        )
    return known


def _have_answers(answers: Answers) -> npt.NDArray[np.bool_]:
    """For each row; a class behind a mask has a logit of -inf, and a probability all the same."""
    judged = [array for name, array in answers.items() if name != LOGITS]
    return np.asarray(np.logical_and.reduce([finite_rows(array) for array in judged]))


def say_unanswered(known: npt.NDArray[np.bool_], which: str) -> None:
    """Warn of the rows that are left out, if any; `which` says what they were for."""
    if not known.all():
        what = "%d of %d %s rows: left out: fp32 has no finite answer to them"
        log.warning(what, (~known).sum(), len(known), which)


def finite_rows(array: Array) -> npt.NDArray[np.bool_]:
    """Which rows hold finite values only: bool [rows], of an array [rows, ...]."""
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))


def compare(
    head: Head, reference: Answers, found: Answers, labels: Array | None = None
) -> Accuracy:
    """Judge answers against the reference's, on the rows that it has an answer to.

    Args:
        head: The model's head.
        reference: Answers of fp32, with `logits` [rows, C] for classes.
        found: Answers of the engine.
        labels: float64 [rows], NaN where a row has none; None: no label column.

    Raises:
        AccuracyError: The reference has a finite answer to no row.
    """
    known = answered(reference)
    num_invented = int((_have_answers(found) & ~known).sum())
    reference, found = ({k: v[known] for k, v in each.items()} for each in (reference, found))
    labels = None if labels is None else labels[known]
    if head == "classes":
        accuracy = _compare_classes(reference, found)
    else:
        accuracy = _compare_scores(reference["score"], found["score"])
    accuracy = replace(accuracy, num_invented=num_invented)
    if labels is None or not np.isfinite(accuracy.max_abs_diff):
        return accuracy
    ours, theirs = (task_metric(head, answers, labels) for answers in (found, reference))
    if ours is None or theirs is None or theirs[1] <= BY_CHANCE[theirs[0]]:
        return accuracy  # where fp32 knows nothing, nothing can be lost
    return replace(accuracy, metric_name=ours[0], metric=ours[1], reference_metric=theirs[1])


def _compare_classes(reference: Answers, found: Answers) -> Accuracy:
    expected, logits = (answers["logits"].astype(np.float64) for answers in (reference, found))
    difference = _difference(reference["probability"][:, 0], found["probability"][:, 0])
    masked = np.isneginf(expected)  # a class that fp32 rules out: no number to compare with
    known, theirs = (np.where(masked, 0.0, array) for array in (expected, logits))
    finite = all(bool(np.isfinite(array).all()) for array in (known, theirs, difference))
    same = float(np.mean(reference["class_id"][:, 0] == found["class_id"][:, 0]))
    return Accuracy(
        num_rows=len(logits),
        agreement=same if finite else 0.0,  # NaN agrees with nothing
        mean_abs_diff=float(difference.mean()),
        max_abs_diff=float(difference.max()),
        cosine=_mean_cosine(known, theirs) if finite else 0.0,
        divergence=_mean_divergence(expected, logits) if finite else None,
    )


def _mean_cosine(expected: Floats, found: Floats) -> float:
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    products = np.sum(expected * found, axis=1) / np.where(norms > 0, norms, 1.0)
    # Logits that are all zero have no direction: equal ones agree.
    cosines = np.where(norms > 0, products, (expected == found).all(axis=1))
    return float(cosines.mean())


def _mean_divergence(expected: Floats, found: Floats) -> float:
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=~np.isneginf(log_p))
    return max(0.0, float(np.mean(np.sum(np.exp(log_p) * ratio, axis=1))))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _compare_scores(expected: Array, found: Array) -> Accuracy:
    difference = _difference(expected, found)
    agreement = 0.0
    if np.isfinite(difference).all():
        columns = range(expected.shape[1])
        agreement = min(_explained(expected[:, i], found[:, i]) for i in columns)
    return Accuracy(
        num_rows=len(expected),
        agreement=agreement,
        mean_abs_diff=float(difference.mean()),
        max_abs_diff=float(difference.max()),
    )


def _difference(expected: Array, found: Array) -> Floats:
    with np.errstate(invalid="ignore"):  # inf - inf
        return np.abs(found.astype(np.float64) - expected.astype(np.float64))


def _explained(expected: Array, found: Array) -> float:
    if np.ptp(expected) == 0:  # no variance to explain: constant scores agree or do not
        return 1.0 if np.allclose(expected, found, rtol=1e-2) else 0.0
    return float(explained_variance(expected, found))


def run_rows(runner: Runner, rows: Array) -> Answers:
    """Answers for any number of rows; the last batch is padded.

    Raises:
        ModelError: The engine has not one answer for each row of a batch.
    """
    outputs = []
    for answers in runner.infer(_batches(rows, runner.batch_size)):
        check_answers(answers, runner.outputs)
        outputs.append(answers)
    joined = (np.concatenate(parts)[: len(rows)] for parts in zip(*outputs, strict=True))
    return {spec.name: array for spec, array in zip(runner.outputs, joined, strict=True)}


def _batches(rows: Array, batch_size: int) -> Iterator[Array]:
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        if len(batch) < batch_size:
            batch = np.resize(batch, (batch_size, *batch.shape[1:]))
        yield batch


def race(
    runners: Mapping[str, Runner], rows: Array, num_cores: int | None = None
) -> dict[str, float]:
    """Rows per second of each runner: alone, in interleaved rounds, medians.

    Args:
        runners: Opened.
        rows: Rows of the engine's input.
        num_cores: Cores of a CPU that the runners compute on: the rates are those of as many cores
            that nobody else takes, by CPU seconds. A neighbour costs an engine time, but hardly
            any CPU time, and the choice is for all later nights. None: a device, by the clock.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(RACE_ROUNDS):
        for name, runner in runners.items():
            speeds[name].append(_rate(runner, rows, num_cores))
    return {name: median(values) for name, values in speeds.items()}


def _rate(runner: Runner, rows: Array, num_cores: int | None) -> float:
    """Rows per second over one stream of full batches, `RACE_S` long."""
    batch = np.ascontiguousarray(np.resize(rows, (runner.batch_size, *rows.shape[1:])))
    started, cpu_s = time.perf_counter(), time.process_time()

    def until_time_is_up() -> Iterator[Array]:
        while time.perf_counter() - started < RACE_S:
            yield batch

    num_rows = sum(runner.batch_size for _ in runner.infer(until_time_is_up()))
    if num_cores is None:
        return num_rows / (time.perf_counter() - started)
    return num_rows * num_cores / (time.process_time() - cpu_s)
