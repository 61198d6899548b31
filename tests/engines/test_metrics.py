"""The task's metrics: what scikit-learn computes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

from engines.metrics import explained_variance, roc_auc, task_metric, unexplained
from engines.runner import Array

NAN = float("nan")


def classes(best: Array) -> dict[str, Array]:
    """Two classes a row: the best one, and one that must not count."""
    return {"class_id": np.stack([best, best + 1], axis=1).astype(np.int32)}


@pytest.mark.parametrize("num_levels", [3, 17, 10_000], ids=["many ties", "ties", "no ties"])
def test_auc_is_that_of_scikit_learn(num_levels: int) -> None:
    rng = np.random.default_rng(num_levels)
    positive = rng.random(500) < 0.3
    scores = np.floor((rng.random(500) + 0.2 * positive) * num_levels)
    assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert roc_auc(-scores, positive) == pytest.approx(1 - roc_auc(scores, positive), abs=1e-12)


def test_equal_scores_have_an_auc_of_a_half() -> None:
    assert roc_auc(np.ones(9), np.arange(9) < 4) == 0.5


@pytest.mark.parametrize("noise", [0.0, 0.5, 5.0])
def test_explained_variance_is_r_squared_but_never_below_zero(noise: float) -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal(300).astype(np.float32)
    found = (expected + noise * rng.standard_normal(300)).astype(np.float32)
    wanted = max(0.0, r2_score(expected.astype(float), found.astype(float)))
    assert explained_variance(expected, found) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("magnitude", "wrong"), [(1.0, 1e-4), (1e5, 10.0), (1e-9, 1e-13)])
def test_what_varies_by_rounding_alone_is_explained_by_what_rounds_otherwise(
    magnitude: float, wrong: float
) -> None:
    rng = np.random.default_rng(0)

    def rounded() -> Array:
        noise = 1 + 3e-7 * rng.standard_normal(300)
        return np.asarray(magnitude * noise, np.float32)

    expected = rounded()
    assert explained_variance(expected, rounded()) > 0.99
    assert explained_variance(expected, expected + np.float32(wrong)) == 0.0


def test_zeros_are_explained_by_zeros_alone() -> None:
    expected, found = np.zeros((9, 3)), np.zeros((9, 3))
    found[4, 1], found[5, 2] = 1e-30, NAN
    assert explained_variance(expected, found).tolist() == [1.0, 0.0, 0.0]


def test_variance_seen_elsewhere_counts_where_it_is_larger() -> None:
    expected = np.array([[0.0, 0.0], [2.0, 20.0]])
    lost = unexplained(expected, expected + 2, np.array([16.0, 1.0]))
    assert lost.mean(axis=0).tolist() == [0.25, 0.04]


def test_accuracy_of_classes_is_that_of_the_best_one() -> None:
    rng = np.random.default_rng(1)
    labels, best = rng.integers(0, 4, (2, 200))
    found = task_metric("classes", classes(best), labels.astype(np.float64))
    assert found == ("accuracy", accuracy_score(labels, best))


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ([0, 1, 1, 0, 1], "AUC"),
        ([-1, 1, 1, -1, 1], "AUC"),
        ([2, 1, 1, 2, 1], "AUC"),
        ([0, 1, 2, 0, 1], "R2"),
        ([0.5, 1, 1, 0, 1], "R2"),
    ],
    ids=["0 and 1", "-1 and 1", "1 and 2", "counts", "a share"],
)
def test_the_metric_of_scores_follows_from_the_labels(labels: list[float], name: str) -> None:
    scores = {"score": np.array([[0.1], [0.9], [0.3], [0.4], [0.8]], np.float32)}
    found = task_metric("scores", scores, np.array(labels, np.float64))
    assert found is not None
    column = scores["score"][:, 0]
    wanted = roc_auc_score(labels, column) if name == "AUC" else max(0, r2_score(labels, column))
    assert found == (name, pytest.approx(wanted))


def test_only_the_first_score_counts() -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0])
    good, bad = np.array([0.1, 0.9, 0.2, 0.8]), np.array([0.9, 0.1, 0.8, 0.2])
    both = {"score": np.stack([good, bad], axis=1)}
    assert task_metric("scores", both, labels) == ("AUC", 1.0)


@pytest.mark.parametrize("head", ["classes", "scores"])
def test_rows_without_a_label_are_left_out(head: str) -> None:
    outputs = classes(np.array([1, 0, 1, 9]))
    outputs["score"] = np.array([[0.8], [0.1], [0.9], [NAN]])
    labels = np.array([1.0, 0.0, 1.0, NAN])
    found = task_metric(head, outputs, labels)
    assert found == ("accuracy" if head == "classes" else "AUC", 1.0)


@pytest.mark.parametrize(
    ("head", "labels"),
    [("classes", [NAN, NAN]), ("scores", [NAN, NAN]), ("scores", [1, 1]), ("scores", [0.3, NAN])],
    ids=["no class", "no target", "one class", "one target"],
)
def test_labels_that_say_nothing_give_no_metric(head: str, labels: list[float]) -> None:
    outputs = classes(np.array([1, 0])) | {"score": np.array([[0.8], [0.1]])}
    assert task_metric(head, outputs, np.array(labels, np.float64)) is None
