from __future__ import annotations

import numpy as np
import pytest

from engines.gate import GateSpec, compare
from engines.runner import Outputs


def classes(ids: list[int], probabilities: list[float]) -> Outputs:
    return np.array(ids, np.int32)[:, None], np.array(probabilities, np.float32)[:, None]


def scores(*columns: list[float]) -> Outputs:
    return (np.array(columns, np.float32).T,)


def test_agreement_of_classes_is_the_share_of_equal_best_classes() -> None:
    found = compare(
        "classes", classes([1, 2, 3, 4], [0.5] * 4), classes([1, 2, 3, 9], [0.5, 0.5, 0.5, 0.1])
    )
    assert (found.num_rows, found.agreement) == (4, 0.75)
    assert found.max_abs_diff == pytest.approx(0.4)
    assert found.mean_abs_diff == pytest.approx(0.1)


def test_the_gate_admits_exactly_its_limit() -> None:
    found = compare("classes", classes([1, 2], [0.5, 0.5]), classes([1, 9], [0.5, 0.5]))
    assert found.passes(GateSpec(min_agreement=0.5))
    assert not found.passes(GateSpec(min_agreement=0.51))


def test_agreement_of_scores_is_that_of_the_worst_column() -> None:
    rising, falling = [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]
    found = compare("scores", scores(rising, rising), scores(rising, falling))
    assert found.agreement == 0.0


def test_scores_on_another_scale_or_shifted_do_not_agree() -> None:
    fp32 = [0.1, 0.2, 0.3, 0.4]
    for wrong in ([value * 2 for value in fp32], [value + 0.5 for value in fp32]):
        assert compare("scores", scores(fp32), scores(wrong)).agreement == 0.0
    slightly_off = [value + 0.01 for value in fp32]
    assert compare("scores", scores(fp32), scores(slightly_off)).agreement == pytest.approx(0.992)


def test_scores_that_are_not_numbers_never_pass() -> None:
    found = compare("scores", scores([0.0, 1.0, 2.0]), scores([0.0, 1.0, float("nan")]))
    assert found.agreement == 0.0


@pytest.mark.parametrize(("value", "expected"), [(1.0, 1.0), (3.0, 0.0)])
def test_constant_scores_agree_only_when_they_are_equal(value: float, expected: float) -> None:
    found = compare("scores", scores([1.0, 1.0, 1.0]), scores([value] * 3))
    assert found.agreement == expected
