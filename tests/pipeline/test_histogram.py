"""Fine bins of scores become a few that people can read, and no row is lost."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.distribution import count_scores, from_text
from pipeline.histogram import NUM_BINS, histogram


def scores(values: object) -> object:
    return from_text(count_scores(np.asarray(values, np.float32)))


def test_even_scores_have_even_bins() -> None:
    found = histogram([scores(np.linspace(0.1, 0.9, 9_000))])
    assert (found.first, found.last) == (pytest.approx(0.1, rel=0.03), pytest.approx(0.9, rel=0.03))
    (shares,) = found.shares
    assert len(shares) == NUM_BINS
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares[1:-1]) < 2.0 / NUM_BINS


def test_an_outlier_is_counted_at_the_end_and_presses_nothing_together() -> None:
    values = np.append(np.random.default_rng(0).normal(5.0, 1.0, 10_000), [1e6, -1e6])
    found = histogram([scores(values)])
    assert found.is_cut
    assert -2 < found.first < found.last < 12
    assert sum(found.shares[0]) == pytest.approx(1.0)


def test_nights_share_their_bins() -> None:
    found = histogram([scores(np.linspace(1, 2, 500)), scores(np.linspace(3, 4, 2_000))])
    now, before = (np.array(each) for each in found.shares)
    assert now.sum() == pytest.approx(before.sum()) == pytest.approx(1.0)
    assert not ((now > 0) & (before > 0)).any()
    assert np.flatnonzero(now).max() < np.flatnonzero(before).min()


def test_probabilities_lie_between_0_and_1() -> None:
    text = count_scores(np.array([0.02, 0.51, 0.52, 1.0], np.float32), np.array([3, 1, 1, 2]))
    found = histogram([from_text(text)])
    assert (found.first, found.last, found.is_cut) == (0.0, 1.0, False)
    (shares,) = found.shares
    assert [index for index, share in enumerate(shares) if share] == [0, 10, 19]
    assert shares[10] == 0.5


@pytest.mark.parametrize("value", [0.0, 7.5, -7.5])
def test_equal_scores_are_one_bin(value: float) -> None:
    found = histogram([scores(np.full(100, value))])
    assert max(found.shares[0]) == 1.0
    assert found.first == found.last == pytest.approx(value, rel=0.02)


def test_what_is_not_finite_is_in_no_bin() -> None:
    found = histogram([scores([1.0, 2.0, np.nan, np.inf])])
    assert sum(found.shares[0]) == pytest.approx(0.5)
    assert histogram([scores([np.nan])]).shares == ((0.0,) * NUM_BINS,)
