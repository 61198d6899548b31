"""How scores are distributed: small counts for each shard, their sum for a night, and the PSI.

Commit records and reports keep the counts as text: `4:10 19:90` are rows by bin, in order of their
values; for classes the bins are those of the best class's probability, and `;281:60 -1:40` says how
many rows the most frequent classes have, and all others (-1).

Scores are counted in logarithmic bins, as in DDSketch: Masson, Rim and Lee, DDSketch: a fast and
fully-mergeable quantile sketch with relative-error guarantees, PVLDB 12(12), 2019.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.blocks import Array

ACCURACY = 0.01
"""Relative, of a score that is known by its bin only. Coarser bins hide a shift of scores that lie
near to each other: with 5 % those of the features demo fill three groups instead of ten."""
LOG_GAMMA = math.log((1 + ACCURACY) / (1 - ACCURACY))
SMALLEST_SCORE = 1e-9
"""Scores that are not larger count as zero."""
NOT_FINITE = 1_000_000
"""Bin of NaN and infinity: behind all others."""
NUM_PROBABILITY_BINS = 20
MAX_VALUES = 16_384
"""Of a shard, evenly over its rows: a quantile of so many is known to less than one per cent."""
SHARD_CLASSES = 20
NIGHT_CLASSES = 50
OTHERS = -1
NUM_TENTHS = 10
COMPARED_CLASSES = 10
SMOOTHING = 0.5
"""Values added to each group, so that an empty one has a logarithm."""
CHANCE_DEVIATIONS = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Rows by bin and by class."""

    bins: Mapping[int, float]
    classes: Mapping[int, float]
    """Empty where the model gives scores."""
    num_values: float
    """Values that were counted for them."""

    @property
    def num_rows(self) -> float:
        """Rows that they stand for."""
        return sum(self.bins.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """The population stability index of two distributions."""

    psi: float
    chance: float
    """What it may be where nothing has changed; see `expected_by_chance`."""


def stride_for(num_rows: int) -> int:
    """Of a shard's rows every so-manieth is counted."""
    return max(1, -(-num_rows // MAX_VALUES))


def count_scores(values: Array, class_ids: Array | None = None) -> str:
    """Counts as text; empty without values.

    Args:
        values: [rows] scores, or probabilities of the best classes.
        class_ids: [rows] best classes; None: the model gives scores.
    """
    if len(values) == 0:
        return ""
    values = values.astype(np.float64)
    if class_ids is None:
        return _text(_count(_score_bins(values)))
    classes = _most_frequent(_count(class_ids), SHARD_CLASSES)
    return f"{_text(_count(_probability_bins(values)))};{_text(classes)}"


def _score_bins(values: npt.NDArray[np.float64]) -> Array:
    """Bins in the order of their values: negative, zero, positive; then what is not finite."""
    finite = np.isfinite(values)
    sizes = np.abs(np.where(finite, values, 0.0))
    bins = np.ceil(np.log(np.maximum(sizes / SMALLEST_SCORE, 1.0)) / LOG_GAMMA)
    return np.where(finite, np.copysign(bins, values), NOT_FINITE).astype(np.int64)


def _probability_bins(values: npt.NDArray[np.float64]) -> Array:
    finite = np.isfinite(values)
    bins = np.floor(np.where(finite, values, 0.0) * NUM_PROBABILITY_BINS)
    bins = np.clip(bins, 0, NUM_PROBABILITY_BINS - 1)
    return np.where(finite, bins, NOT_FINITE).astype(np.int64)


def _count(keys: Array) -> dict[int, float]:
    found, counts = np.unique(keys, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _most_frequent(counts: Mapping[int, float], most: int) -> dict[int, float]:
    """The most frequent classes, and the sum of the others."""
    named = {key: count for key, count in counts.items() if key != OTHERS}
    kept = dict(sorted(named.items(), key=lambda item: (-item[1], item[0]))[:most])
    others = sum(counts.values()) - sum(kept.values())
    return kept | ({OTHERS: others} if others else {})


def _text(counts: Mapping[int, float]) -> str:
    return " ".join(f"{key}:{round(count)}" for key, count in counts.items())


def _parse(text: str) -> dict[int, float]:
    pairs = (pair.split(":") for pair in text.split())
    return {int(key): float(count) for key, count in pairs}


def as_text(scores: Scores) -> str:
    """The counts of a night, with its most frequent classes."""
    bins = _text(dict(sorted(scores.bins.items())))
    if not scores.classes:
        return bins
    return f"{bins};{_text(_most_frequent(scores.classes, NIGHT_CLASSES))}"


def from_text(text: str, num_rows: int | None = None, num_values: float | None = None) -> Scores:
    """Counts that were kept as text.

    Args:
        text: What `count_scores` or `as_text` wrote.
        num_rows: Rows that the counts shall stand for; None: as many as were counted.
        num_values: Values that they rest on; None: as many as were counted.
    """
    bins, _, classes = text.partition(";")
    counts, by_class = _parse(bins), _parse(classes)
    counted = sum(counts.values())
    weight = 1.0 if num_rows is None else num_rows / counted
    return Scores(
        bins={key: count * weight for key, count in counts.items()},
        classes={key: count * weight for key, count in by_class.items()},
        num_values=counted if num_values is None else num_values,
    )


def add(several: Iterable[Scores]) -> Scores | None:
    """The sum over shards or nights; None without any.

    Values stand for different numbers of rows: together they tell as much as Kish's effective
    number of them (Kish, Survey Sampling, 1965, 11.7).
    """
    bins: Counter[int] = Counter()
    classes: Counter[int] = Counter()
    num_rows = squares = 0.0
    for scores in several:
        bins.update(scores.bins)
        classes.update(scores.classes)
        num_rows += scores.num_rows
        squares += scores.num_rows**2 / scores.num_values
    if not num_rows:
        return None
    return Scores(bins=bins, classes=classes, num_values=num_rows**2 / squares)


def shifts(past: Scores, found: Scores) -> dict[str, Shift]:
    """How far scores have moved: `scores` by the past's tenths; or `probability` and `classes`."""
    if not past.classes:
        edges = _tenths(past.bins)
        return {
            "scores": _shift(past, found, *(_grouped(each.bins, edges) for each in (past, found)))
        }
    known = set(_most_frequent(past.classes, COMPARED_CLASSES)) - {OTHERS}
    classes = (_merged(each.classes, known) for each in (past, found))
    return {
        "probability": _shift(past, found, past.bins, found.bins),
        "classes": _shift(past, found, *classes),
    }


def _tenths(bins: Mapping[int, float]) -> list[int]:
    """The last bin of each tenth of the rows.

    A bin that holds a tenth or more is a group of its own, however much of the past it is; what
    lies beyond the past's last bin is another.
    """
    finite = sorted(bins.keys() - {NOT_FINITE})
    total = sum(bins[key] for key in finite)
    edges = set(finite[-1:])
    below, tenth = 0.0, 1
    for key in finite:
        if bins[key] >= total / NUM_TENTHS:
            edges |= {key - 1, key}
        below += bins[key]
        if below >= total * tenth / NUM_TENTHS:
            edges.add(key)
            tenth = math.floor(below / total * NUM_TENTHS) + 1
    return sorted(edges)


def _grouped(bins: Mapping[int, float], edges: Sequence[int]) -> dict[int, float]:
    groups: Counter[int] = Counter()
    for key, count in bins.items():
        group = NOT_FINITE if key == NOT_FINITE else bisect_left(edges, key)
        groups[group] += count  # type: ignore[assignment]  # as above
    return dict(groups)


def _merged(classes: Mapping[int, float], known: Iterable[int]) -> dict[int, float]:
    kept = {key: classes.get(key, 0.0) for key in known}
    return kept | {OTHERS: sum(classes.values()) - sum(kept.values())}


def _shift(
    past: Scores, found: Scores, past_groups: Mapping[int, float], groups: Mapping[int, float]
) -> Shift:
    names = sorted(past_groups.keys() | groups.keys())
    expected = _shares([past_groups.get(name, 0.0) for name in names], past.num_values)
    shares = _shares([groups.get(name, 0.0) for name in names], found.num_values)
    return Shift(
        psi=float(np.sum((shares - expected) * np.log(shares / expected))),
        chance=expected_by_chance(len(names), past.num_values, found.num_values),
    )


def _shares(counts: Sequence[float], num_values: float) -> npt.NDArray[np.float64]:
    values = np.array(counts) / sum(counts) * num_values + SMOOTHING
    return np.asarray(values / values.sum())


def expected_by_chance(num_groups: int, num_past: float, num_found: float) -> float:
    """What the index may be where both samples come from one distribution.

    It is then (1/N + 1/M) times a chi-squared variable of B - 1 degrees of freedom (Yurdakul and
    Naranjo, Statistical properties of the population stability index, Journal of Risk Model
    Validation 14(4), 2020): its mean, and three standard deviations.
    """
    freedom = num_groups - 1
    return (1 / num_past + 1 / num_found) * (freedom + CHANCE_DEVIATIONS * math.sqrt(2 * freedom))
