"""Metrics of a task, for inputs whose rows carry a label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engines.runner import Array

Floats = npt.NDArray[np.float64]

ROUNDING = 1e-5
"""Of the largest score: float32 runtimes that are right differ by less than a tenth of it. A column
that varies less holds nothing but rounding."""
BY_CHANCE = {"accuracy": 0.0, "AUC": 0.5, "R2": 0.0}
"""What answers reach that know nothing of the labels."""


def task_metric(head: str, outputs: dict[str, Array], labels: Floats) -> tuple[str, float] | None:
    """Name and value of the task's metric; higher is better.

    Args:
        head: `classes`: share of rows whose best class is the label. `scores`: area under the ROC
            curve when labels have two values, of which the larger is positive; explained variance
            (R squared) otherwise; both of the first score.
        outputs: The engine's outputs by name.
        labels: [rows]; rows whose label is NaN are left out.

    Returns:
        None when the labels say nothing: there are none, or they are all the same for a score.
    """
    known = np.isfinite(labels)
    labels = labels[known]
    if head == "classes":
        best = outputs["class_id"][known, 0]
        return ("accuracy", float(np.mean(best == labels))) if len(labels) else None
    if len(labels) == 0 or np.ptp(labels) == 0:
        return None
    scores = outputs["score"][known, 0].astype(np.float64)
    if np.isin(labels, (labels.min(), labels.max())).all():
        return "AUC", roc_auc(scores, labels == labels.max())
    return "R2", float(explained_variance(labels, scores))


def roc_auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Probability that a positive row scores higher than a negative one; ties count half."""
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = (last - (counts - 1) / 2)[inverse] if len(values) else inverse
    num_positive = int(positive.sum())
    num_negative = len(scores) - num_positive
    above = mean_rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def explained_variance(expected: Array, found: Array) -> Floats:
    """R squared of each column: 1 - mean squared error / variance; not below 0.

    Args and shapes are those of `unexplained`.
    """
    lost = unexplained(expected, found).mean(axis=0)
    return np.asarray(np.where(lost < 1.0, 1.0 - lost, 0.0))


def unexplained(expected: Array, found: Array, variance: Array | float = 0.0) -> Floats:
    """Squared errors as shares of their column's variance; the shape is that of `expected`.

    Args:
        expected: [rows] or [rows, columns], finite.
        found: The same shape; what is not finite explains nothing.
        variance: Of each column elsewhere; counts where it is larger than that of these rows.
    """
    expected = expected.astype(np.float64)
    rounding = np.square(ROUNDING * np.abs(expected).max(axis=0)) + np.finfo(np.float64).tiny
    varies = np.maximum(np.maximum(expected.var(axis=0), variance), rounding)
    with np.errstate(over="ignore"):  # errors where nothing varies
        return np.asarray(np.square(found - expected) / varies)
