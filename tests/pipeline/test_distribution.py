"""The distribution of scores: counted a shard, summed a night, compared between nights."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline import distribution
from pipeline.distribution import (
    ACCURACY,
    MAX_VALUES,
    NIGHT_CLASSES,
    NOT_FINITE,
    OTHERS,
    SHARD_CLASSES,
    Scores,
    add,
    as_text,
    count_scores,
    expected_by_chance,
    from_text,
    shifts,
)


def night(values: np.ndarray, classes: np.ndarray | None = None) -> Scores:
    """One shard as a night: what is compared is what was kept."""
    found = add([from_text(count_scores(values.astype(np.float32), classes), len(values))])
    assert found is not None
    return found


def normal(num_rows: int, seed: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, num_rows)


def middle_of(bin_: int) -> float:
    size = distribution.SMALLEST_SCORE * math.exp((abs(bin_) - 0.5) * distribution.LOG_GAMMA)
    return math.copysign(size, bin_) if bin_ else 0.0


def test_a_score_is_known_by_its_bin_to_the_promised_accuracy() -> None:
    values = np.float32([-3e5, -1.0, -0.02, 0.0, 1e-12, 3e-4, 0.5, 0.97, 8e7])
    counted = from_text(count_scores(values))
    assert counted.num_values == len(values)
    bins = [key for key, count in counted.bins.items() for _ in range(round(count))]
    assert bins == sorted(bins), "bins are in the order of their scores"
    for value, key in zip(values.tolist(), bins, strict=True):
        assert middle_of(key) == pytest.approx(value, rel=ACCURACY * 1.01, abs=1e-9)


def test_what_is_not_finite_has_a_bin_of_its_own() -> None:
    values = np.float32([np.nan, np.inf, -np.inf, 1.0])
    assert from_text(count_scores(values)).bins[NOT_FINITE] == 3
    classes = np.zeros(4, np.int32)
    assert from_text(count_scores(values, classes)).bins == {19: 1, NOT_FINITE: 3}


def test_a_shard_without_rows_counts_nothing() -> None:
    assert count_scores(np.empty(0, np.float32)) == ""
    assert add([]) is None


def test_probabilities_have_twenty_bins_and_one_belongs_to_the_last() -> None:
    text = count_scores(np.float32([0.0, 0.049, 0.051, 0.5, 0.999, 1.0]), np.arange(6))
    assert from_text(text).bins == {0: 2, 1: 1, 10: 1, 19: 2}


def test_only_the_most_frequent_classes_of_a_shard_are_named() -> None:
    classes = np.repeat(np.arange(30), np.arange(30, 0, -1))
    counted = from_text(count_scores(np.full(len(classes), 0.5, np.float32), classes))
    assert set(counted.classes) == {*range(SHARD_CLASSES), OTHERS}
    assert counted.classes[0] == 30
    assert counted.classes[OTHERS] == sum(range(1, 11))


def test_a_night_keeps_more_classes_and_reads_back() -> None:
    shards = [
        count_scores(np.full(40, 0.25, np.float32), np.arange(first, first + 40) % 70)
        for first in range(0, 70, 5)
    ]
    total = add(from_text(text) for text in shards)
    assert total is not None
    kept = from_text(as_text(total), num_values=total.num_values)
    assert len(kept.classes) == NIGHT_CLASSES + 1
    assert sum(kept.classes.values()) == sum(total.classes.values()) == 14 * 40
    assert kept.bins == {5: 14 * 40}


def test_shards_count_by_their_rows_however_many_values_were_taken() -> None:
    large = from_text(count_scores(np.full(16_384, 0.25, np.float32)), 1 << 20)
    small = from_text(count_scores(np.full(16_384, 4.0, np.float32)), 16_384)
    total = add([large, small])
    assert total is not None
    assert sorted(total.bins.values()) == [16_384, 1 << 20]
    # The large shard's values weigh 64 times as much, so they tell about as much as all together.
    assert MAX_VALUES < total.num_values < MAX_VALUES * 1.04


def test_the_index_is_the_sum_over_groups_of_difference_times_log_ratio() -> None:
    classes = {
        name: np.repeat([1, 2], counts) for name, counts in (("a", (500, 500)), ("b", (900, 100)))
    }
    past, found = (night(np.full(1_000, 0.5), classes[name]) for name in "ab")
    moved = shifts(past, found)
    by_hand = 0.4 * math.log(0.9 / 0.5) - 0.4 * math.log(0.1 / 0.5)
    assert moved["classes"].psi == pytest.approx(by_hand, rel=0.01)
    assert moved["probability"].psi == 0


def test_nothing_moves_between_equal_nights() -> None:
    values = normal(5_000, 0)
    assert shifts(night(values), night(values))["scores"].psi == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("num_past", "num_found"), [(100, 60), (2_000, 300), (50_000, 16_000)])
def test_chance_alone_stays_below_what_is_allowed_for_it(num_past: int, num_found: int) -> None:
    over = 0
    found = []
    for seed in range(100):
        moved = shifts(night(normal(num_past, seed)), night(normal(num_found, seed + 1_000)))
        found.append(moved["scores"].psi)
        over += moved["scores"].psi > moved["scores"].chance
    assert over <= 3
    mean = 9 * (1 / min(num_past, MAX_VALUES) + 1 / min(num_found, MAX_VALUES))
    assert np.mean(found) == pytest.approx(mean, rel=0.35), "Yurdakul and Naranjo's mean"


@pytest.mark.parametrize("mean", [0.7, -0.7])
def test_scores_that_move_by_most_of_a_deviation_are_a_major_shift(mean: float) -> None:
    moved = shifts(night(normal(20_000, 1)), night(normal(20_000, 2, mean)))["scores"]
    # Of two normal distributions at a distance d the index is d squared, less what tenths lose.
    assert moved.psi == pytest.approx(mean**2, rel=0.15)
    assert moved.psi - moved.chance > 0.25


def test_scores_that_are_not_finite_are_a_shift_of_their_own() -> None:
    values = normal(2_000, 3)
    broken = np.where(np.arange(2_000) % 10, normal(2_000, 4), np.nan)
    assert shifts(night(values), night(broken))["scores"].psi > 0.5


def test_a_value_that_half_of_the_rows_have_is_one_group() -> None:
    def mostly_zero(seed: int, share: float) -> Scores:
        rng = np.random.default_rng(seed)
        return night(np.where(rng.random(8_000) < share, 0.0, rng.exponential(1.0, 8_000)))

    same, other = (shifts(mostly_zero(1, 0.5), mostly_zero(2, s))["scores"] for s in (0.5, 0.8))
    assert same.psi < same.chance
    assert other.psi == pytest.approx(0.3 * math.log(1.6) - 0.3 * math.log(0.4), rel=0.1)


ALMOST_ALL = np.r_[np.linspace(0.01, 0.5, 900), np.ones(9_100)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.zeros(10_000), np.full(10_000, 0.9)),
        (np.full(10_000, 0.5), np.full(10_000, 0.001)),
        (np.full(10_000, 0.5), np.full(10_000, -0.5)),
        (ALMOST_ALL, np.linspace(0.01, 0.5, 10_000)),
        (-ALMOST_ALL, -np.linspace(0.01, 0.5, 10_000)),
        (np.repeat([0.1, 0.9], [500, 9_500]), np.full(10_000, 0.1)),
        (np.repeat([0.1, 0.9], [9_500, 500]), np.full(10_000, 0.9)),
    ],
)
def test_scores_that_leave_a_value_which_nearly_all_had_are_a_major_shift(
    before: np.ndarray, after: np.ndarray
) -> None:
    past = add([night(before)] * 7)
    assert past is not None
    moved, same = (shifts(past, night(each))["scores"] for each in (after, before))
    assert moved.psi - moved.chance > 1
    assert same.psi == pytest.approx(0, abs=1e-4)


def test_scores_beyond_all_of_the_past_are_a_shift() -> None:
    values = normal(10_000, 5)
    beyond = np.where(np.arange(10_000) % 12, normal(10_000, 6), 1e9)
    moved = shifts(night(values), night(beyond))["scores"]
    assert moved.psi - moved.chance > 0.25


def test_a_class_that_was_never_seen_is_a_shift() -> None:
    rng = np.random.default_rng(0)
    known, new = rng.integers(0, 10, 4_000), rng.integers(0, 10, 4_000)
    moved = shifts(
        night(np.full(4_000, 0.5), known),
        night(np.full(4_000, 0.5), np.where(np.arange(4_000) % 3, new, 77)),
    )
    assert moved["classes"].psi > 1


def test_few_values_are_allowed_more_chance() -> None:
    assert expected_by_chance(10, 1e9, 1e9) < 1e-6
    assert expected_by_chance(10, 100, 100) == pytest.approx(0.02 * (9 + 3 * math.sqrt(18)))
