"""The drift of an engine: what it published, against fp32, on a few rows of each night."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from statistics import NormalDist

import numpy as np

from engines.errors import EngineError
from engines.gate import Answers, finite_rows
from engines.manifest import StoredEngine
from engines.metrics import Floats, unexplained
from engines.reference import fp32_answers, has_reference
from pipeline.blocks import Array
from pipeline.config import Job
from pipeline.drift_sample import Sampled
from pipeline.report import Drift

log = logging.getLogger(__name__)

FEW_ROWS, MOST_ROWS = 32, 512
LARGE_NIGHT_ROWS = 100_000
ROWS_FOR_ONE = 3_000
"""Rows of a large night for each that is looked at."""
MIN_SCORES = 32
"""With fewer, the share of variance that is explained says little."""
LUCK = 0.00135
"""How often an engine that just reaches its gate may be stopped: one night in 740, as often as a
normal variable passes three standard deviations. Wilson's bound would do so ten times as often:
near a share of one it is too low for 32 rows. Of scores, see `_chance`."""
CLOSE = 1e-2
"""How near the gate wants a score that is always the same, as a share of it."""
NORMAL_SPREAD = 2.0
"""Variance of a normal variable's square, by its squared mean."""


def num_drift_rows(job: Job, num_rows: int) -> int:
    """How many rows of a night are looked at."""
    wanted = job.limits.drift_rows
    if wanted is None:
        large = min(max(num_rows // ROWS_FOR_ONE, FEW_ROWS), MOST_ROWS)
        wanted = FEW_ROWS if num_rows < LARGE_NIGHT_ROWS else large
    return min(wanted, num_rows)


def measure_drift(engine: StoredEngine, sampler: Callable[[], Sampled | None]) -> Drift:
    """Compare what was committed for some rows with what fp32 answers to them.

    Args:
        engine: What scored them.
        sampler: Gives the rows.

    What cannot be measured is said in the result's note: that alone stops no night.
    """
    if not has_reference(engine):
        return Drift(rows=0, note="the engine was stored without its fp32 graph")
    sampled = sampler()
    if sampled is None:
        return Drift(rows=0, note="no scored row could be read again")
    try:
        fp32 = fp32_answers(engine, sampled.inputs)
    except EngineError as error:
        log.warning("drift: %s", error)
        return Drift(rows=0, note=str(error))
    if "score" in fp32:
        return _compare_scores(fp32["score"], sampled)
    return _compare_classes(fp32, sampled)


def _compare_classes(fp32: Answers, sampled: Sampled) -> Drift:
    known = finite_rows(fp32["probability"])  # where fp32 has no answer there is none to compare
    if not known.any():
        return Drift(rows=0, note="fp32 has no finite answer to these rows")
    same = (fp32["class_id"][:, 0] == sampled.answers["class_id"])[known]
    found = sampled.answers["probability"][known]
    difference = fp32["probability"][known, 0].astype(np.float64) - found
    return Drift(
        rows=len(same),
        agreement=float(np.mean(same & np.isfinite(difference))),
        mean_abs_diff=_mean(np.abs(difference)),
    )


def _compare_scores(expected: Array, sampled: Sampled) -> Drift:
    """Of the column that is explained worst.

    The variance is that of the rows, or of all scores of their parts where it is larger: a few rows
    may be alike by chance. A column that is the same in all rows, and was published so, says
    nothing.
    """
    found = sampled.answers["score"]
    known = finite_rows(expected)  # as above
    expected, found = expected[known], found[known]
    if len(expected) < MIN_SCORES:
        few = f"{len(expected)} rows are too few to judge by: at least {MIN_SCORES}"
        return Drift(rows=len(expected), note=few)
    close = np.isclose(expected, found, rtol=CLOSE).all(axis=0)
    judged = ~close | (np.ptp(expected, axis=0) > 0)
    if not judged.any():
        return Drift(rows=len(expected), note="the scores of these rows do not vary")
    squares = unexplained(expected, found, sampled.variance)[:, judged]
    lost = squares.mean(axis=0)
    return Drift(
        rows=len(expected),
        agreement=_least(lost),
        mean_abs_diff=_mean(np.abs(found - expected.astype(np.float64))),
        at_best=_least(lost / _chance(squares)),
    )


def _least(lost: Floats) -> float:
    """What is explained of the column that most is lost of; not below 0."""
    return max(0.0, 1.0 - float(np.nan_to_num(lost, nan=np.inf).max()))


def _chance(squares: Floats) -> Floats:
    """By how much a column's mean square may exceed that of all rows with a chance of `LUCK`.

    A mean of squares is about a chi-square variable by its degrees of freedom: the number of rows
    where errors are normal, fewer as their squares spread more (Satterthwaite, 1946). Its quantile
    is that of Wilson and Hilferty (1931). Columns share the luck (Bonferroni).

    Simulated at the default gate, 0.97, with normal errors, Laplace's, and Student's t with 5
    degrees. Stopped of the nights whose engine just reaches it: with one column on 32 rows 0.08,
    0.3 and 0.3 %, on 512 at most 0.08; with 64 columns, each just there, on 32 rows 0.05, 1.4 and
    1.5 %, on 128 at most 0.2. Of those whose engine explains 0.9 of one column: on 32 rows 92, 73
    and 78 %, or 76, 48 and 52 % where the others are 63; on 128 rows at least 98.

    Args:
        squares: [rows, columns].

    Returns:
        [columns], above 1; NaN where a square is not finite.
    """
    num_rows, num_columns = squares.shape
    means = squares.mean(axis=0)
    with np.errstate(invalid="ignore"):  # inf / inf
        spread = np.var(squares / np.where(means > 0, means, 1.0), axis=0, ddof=1)
    term = np.maximum(spread, NORMAL_SPREAD) / (9 * num_rows)  # 2 / (9 degrees of freedom)
    luck = NormalDist().inv_cdf(1 - LUCK / num_columns)
    return np.asarray((1 - term + luck * np.sqrt(term)) ** 3)


def _mean(values: Array) -> float | None:
    """None where it is not finite: JSON has no such numbers."""
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else None


def worst(drifts: Iterable[Drift]) -> Drift | None:
    """That of the engine which is least like fp32; one that was not judged only without others."""
    found = list(drifts)
    judged = [drift for drift in found if drift.agreement is not None]
    return min(judged, key=_at_best, default=next(iter(found), None))


def _at_best(drift: Drift) -> float:
    return (drift.agreement or 0.0) if drift.at_best is None else drift.at_best


def is_too_far(drift: Drift, head: str, min_agreement: float) -> bool:
    """Whether more is lost than an engine that just reaches the gate loses by chance.

    Rows of classes agree or do not, so the binomial distribution says how unlikely so few are; of
    scores `at_best` has what chance allows.
    """
    if drift.agreement is None or drift.agreement >= min_agreement:
        return False
    if head != "classes":
        return _at_best(drift) < min_agreement
    return at_most(round(drift.agreement * drift.rows), drift.rows, min_agreement) < LUCK


def at_most(num_same: int, num_rows: int, share: float) -> float:
    """Probability that at most so many of the rows agree, if each does with probability `share`."""
    return sum(
        math.comb(num_rows, count) * share**count * (1 - share) ** (num_rows - count)
        for count in range(num_same + 1)
    )
