"""Scores as a histogram that people can read: a few even bins of the fine ones that are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.distribution import (
    LOG_GAMMA,
    NOT_FINITE,
    NUM_PROBABILITY_BINS,
    SMALLEST_SCORE,
    Scores,
)

NUM_BINS = 30
TAIL = 0.002
"""Share of rows at each end that the first and the last bin take in, however far away they are:
one outlier would otherwise press all others into one bin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Shares of rows by even bins."""

    first: float
    """Lower end of the first bin."""
    last: float
    """Upper end of the last one."""
    shares: tuple[tuple[float, ...], ...]
    """For each of the distributions the share of its rows in each bin; those without a finite score
    are in none."""
    is_cut: bool
    """Whether the bins at the ends hold what lies farther out, too."""


def histogram(several: Sequence[Scores]) -> Histogram:
    """Distributions in the same bins: probabilities from 0 to 1, scores where their rows are.

    Args:
        several: At least one, each with rows; all of classes, or all of scores.
    """
    if several[0].classes:
        bins = range(NUM_PROBABILITY_BINS)
        shares = tuple(_shares(each, {key: key for key in bins}, len(bins)) for each in several)
        return Histogram(first=0.0, last=1.0, shares=shares, is_cut=False)
    ends = [_ends(each.bins) for each in several]
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    width = (last - first) / NUM_BINS or 1.0
    keys = {key for each in several for key in each.bins if key != NOT_FINITE}
    place = {
        key: min(max(math.floor((_score(key) - first) / width), 0), NUM_BINS - 1) for key in keys
    }
    is_cut = any(not first <= _score(key) <= last for key in keys)
    shares = tuple(_shares(each, place, NUM_BINS) for each in several)
    return Histogram(first=first, last=last, shares=shares, is_cut=is_cut)


def _ends(bins: Mapping[int, float]) -> tuple[float, float]:
    """Scores between which all but the tails are; the same twice where all are equal."""
    finite = sorted(key for key in bins if key != NOT_FINITE)
    total = sum(bins[key] for key in finite)
    inner, below = [], 0.0
    for key in finite:
        below += bins[key]
        if below > total * TAIL and below - bins[key] < total * (1 - TAIL):
            inner.append(_score(key))
    return (inner[0], inner[-1]) if inner else (0.0, 0.0)


def _score(key: int) -> float:
    """Of a bin of `distribution.py`: the middle of its ends."""
    if key == 0:
        return 0.0
    size = SMALLEST_SCORE * math.exp((abs(key) - 0.5) * LOG_GAMMA)
    return math.copysign(size, key)


def _shares(scores: Scores, place: Mapping[int, int], num_bins: int) -> tuple[float, ...]:
    counts = [0.0] * num_bins
    for key, count in scores.bins.items():
        if key != NOT_FINITE:
            counts[place[key]] += count
    total = scores.num_rows
    return tuple(count / total for count in counts)
