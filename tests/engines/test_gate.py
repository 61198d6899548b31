"""The gate: what of an engine's answers is compared with fp32's, and what does not pass."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from scipy.special import rel_entr, softmax
from sklearn.metrics.pairwise import paired_cosine_distances

from engines.errors import AccuracyError, ModelError
from engines.gate import Accuracy, Answers, GateSpec, compare, race, run_rows
from engines.load import probe_answer
from engines.runner import Array, Outputs, TensorSpec

NAN, INF = float("nan"), float("inf")
LAX = GateSpec(min_agreement=0.0, min_cosine=-1.0, max_divergence=INF, max_metric_loss=1.0)


def classes(logits: Array) -> Answers:
    """What the head makes of logits [rows, C]."""
    shares = softmax(logits.astype(np.float64), axis=1).astype(np.float32)
    best = np.argsort(-shares, axis=1)[:, :1]
    probability = np.take_along_axis(shares, best, axis=1)
    return {"class_id": best.astype(np.int32), "probability": probability, "logits": logits}


def scores(*columns: list[float]) -> Answers:
    return {"score": np.array(columns, np.float32).T}


def some_logits(seed: int, num_rows: int = 40) -> Array:
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((num_rows, 6))).astype(np.float32)


def test_classes_are_judged_as_scipy_and_scikit_learn_would() -> None:
    expected = some_logits(1)
    found = expected + 0.6 * some_logits(2)
    judged = compare("classes", classes(expected), classes(found))
    p, q = softmax(expected.astype(float), axis=1), softmax(found.astype(float), axis=1)
    best = (p.argmax(axis=1), q.argmax(axis=1))
    assert 0 < judged.agreement == np.mean(best[0] == best[1]) < 1
    assert judged.cosine == pytest.approx(1 - paired_cosine_distances(expected, found).mean())
    assert judged.divergence == pytest.approx(rel_entr(p, q).sum(axis=1).mean())
    difference = np.abs(p.max(axis=1) - q.max(axis=1))
    assert judged.mean_abs_diff == pytest.approx(difference.mean(), abs=1e-6)
    assert judged.max_abs_diff == pytest.approx(difference.max(), abs=1e-6)
    assert (judged.num_rows, judged.metric_name, judged.metric_loss) == (40, None, 0.0)


def test_equal_answers_reach_even_the_strictest_gate() -> None:
    strict = GateSpec(min_agreement=1.0, min_cosine=1.0 - 1e-12, max_divergence=0.0)
    judged = compare("classes", classes(some_logits(1)), classes(some_logits(1)))
    assert judged.failures(strict) == ()


def test_the_divergence_of_confident_logits_is_finite() -> None:
    expected = np.array([[1000.0, 0.0]], np.float32)
    judged = compare("classes", classes(expected), classes(-expected))
    assert judged.divergence == pytest.approx(1000.0)


@pytest.mark.parametrize(
    ("expected", "found", "cosine"), [(0, 0, 1.0), (3, 0, 0.0), (0, 3, 0.0), (1e-30, 1e-30, 1.0)]
)
def test_logits_that_are_all_zero_agree_with_their_like_only(
    expected: float, found: float, cosine: float
) -> None:
    answers = [classes(np.full((2, 4), value, np.float32)) for value in (expected, found)]
    assert compare("classes", *answers).cosine == pytest.approx(cosine)


def test_the_gate_admits_exactly_its_limits() -> None:
    limit = Accuracy(
        num_rows=100,
        agreement=0.97,
        mean_abs_diff=0.0,
        max_abs_diff=0.1,
        cosine=0.98,
        divergence=0.05,
        metric_name="accuracy",
        metric=0.715,
        reference_metric=0.72,  # 0.005 in decimals, a little more in binary
    )
    gate = GateSpec()
    assert limit.failures(gate) == ()
    misses = {
        "agreement": (0.9699, "agreement 0.9699 < 0.97"),
        "cosine": (0.9799, "cosine 0.9799 < 0.98"),
        "divergence": (0.0501, "divergence 0.0501 > 0.05"),
        "metric": (0.7149, "accuracy loss 0.0051 > 0.005"),
    }
    for field, (value, words) in misses.items():
        assert dataclasses.replace(limit, **{field: value}).failures(gate) == (words,)


def test_all_that_was_missed_is_named() -> None:
    judged = compare(
        "classes",
        classes(some_logits(1)),
        classes(some_logits(2)),
        some_logits(1).argmax(axis=1).astype(np.float64),
    )
    named = [failure.split()[0] for failure in judged.failures(GateSpec())]
    assert named == ["agreement", "cosine", "divergence", "accuracy"]


def test_agreement_of_scores_is_that_of_the_worst_column() -> None:
    rising, falling = [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]
    found = compare("scores", scores(rising, rising), scores(rising, falling))
    assert found.agreement == 0.0
    assert (found.cosine, found.divergence) == (None, None)


def test_scores_on_another_scale_or_shifted_do_not_agree() -> None:
    fp32 = [0.1, 0.2, 0.3, 0.4]
    for wrong in ([value * 2 for value in fp32], [value + 0.5 for value in fp32]):
        assert compare("scores", scores(fp32), scores(wrong)).agreement == 0.0
    slightly_off = [value + 0.01 for value in fp32]
    assert compare("scores", scores(fp32), scores(slightly_off)).agreement == pytest.approx(0.992)


@pytest.mark.parametrize(("value", "expected"), [(1.0, 1.0), (3.0, 0.0)])
def test_constant_scores_agree_only_when_they_are_equal(value: float, expected: float) -> None:
    found = compare("scores", scores([1.0, 1.0, 1.0]), scores([value] * 3))
    assert found.agreement == expected


def test_a_column_that_varies_by_rounding_alone_does_not_decide() -> None:
    rng = np.random.default_rng(0)
    live = rng.random(200).tolist()
    dead, other = (1 - 3e-7 * rng.random(200) for _ in range(2))
    found = compare("scores", scores(live, dead.tolist()), scores(live, other.tolist()))
    assert found.failures(GateSpec(min_agreement=0.99)) == ()
    gone = compare("scores", scores(live, dead.tolist()), scores(live, [0.0] * 200))
    assert gone.agreement == 0.0


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_scores_that_are_not_finite_pass_no_gate(wrong: float) -> None:
    good, bad = scores([0.0, 1.0, 2.0]), scores([0.0, 1.0, wrong])
    judged = compare("scores", good, bad, np.array([0.0, 1.0, 1.0]))
    assert "answers that are not finite" in judged.failures(LAX)
    assert judged.agreement == 0.0


@pytest.mark.parametrize("wrong", [NAN, INF])
@pytest.mark.parametrize("place", ["logits", "probability"])
def test_classes_with_an_answer_that_is_not_finite_pass_no_gate(place: str, wrong: float) -> None:
    good = classes(some_logits(1))
    bad = {name: array.copy() for name, array in good.items()}
    bad[place][3, 0] = wrong
    if place == "logits":
        bad["probability"][3, 0] = NAN  # as softmax gives
    judged = compare("classes", good, bad, np.zeros(40))
    assert "answers that are not finite" in judged.failures(LAX)
    assert (judged.agreement, judged.cosine) == (0.0, 0.0)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("found", [NAN, 7.0], ids=["nor the engine", "but the engine"])
def test_a_row_that_fp32_has_no_answer_to_is_not_judged(wrong: float, found: float) -> None:
    fp32 = scores([0.0, 1.0, wrong, 0.5], [3.0, 4.0, 5.0, 6.0])
    engine = scores([0.0, 1.0, found, 0.5], [3.0, 4.0, 5.0, 6.0])
    judged = compare("scores", fp32, engine, np.array([0.0, 1.0, 1.0, 0.0]))
    assert (judged.num_rows, judged.agreement, judged.metric) == (3, 1.0, 1.0)
    assert judged.failures(GateSpec()) == ()


@pytest.mark.parametrize(("num_invented", "passes"), [(0, True), (2, True), (3, False)])
def test_an_engine_that_answers_where_fp32_does_not_passes_for_a_few_rows_only(
    num_invented: int, passes: bool
) -> None:
    fp32 = np.arange(100.0)
    fp32[40:50] = NAN
    engine = fp32.copy()
    engine[40 : 40 + num_invented] = 7.0
    judged = compare("scores", scores(fp32.tolist()), scores(engine.tolist()))
    assert (judged.num_rows, judged.num_invented) == (90, num_invented)
    said = () if passes else (f"answers to {num_invented} rows that fp32 has none to",)
    assert judged.failures(GateSpec()) == said


def test_classes_of_a_row_that_fp32_has_no_logits_for_are_not_judged() -> None:
    logits = some_logits(1)
    logits[3, 2] = NAN
    with np.errstate(invalid="ignore"):
        answers = classes(logits)
    judged = compare("classes", answers, answers, np.zeros(40))
    assert (judged.num_rows, judged.agreement) == (39, 1.0)
    assert judged.failures(GateSpec()) == ()


def test_a_class_behind_a_mask_is_left_out_of_the_comparison() -> None:
    plain, other = some_logits(1), some_logits(1) + 0.3 * some_logits(2)
    expected = compare("classes", classes(plain), classes(other))
    mask = np.full((40, 1), -INF, np.float32)
    fp32 = classes(np.concatenate([mask, plain], axis=1))
    for hidden in (mask, np.full((40, 1), -1e30, np.float32)):
        found = compare("classes", fp32, classes(np.concatenate([hidden, other], axis=1)))
        assert found == expected
    shown = compare("classes", fp32, classes(np.concatenate([0 * plain[:, :1], other], axis=1)))
    assert any(each.startswith("divergence") for each in shown.failures(GateSpec()))
    masked = compare(
        "classes", classes(plain), classes(np.concatenate([mask, plain[:, 1:]], axis=1))
    )
    assert masked.agreement == 0.0


def test_where_fp32_has_no_answer_at_all_there_is_nothing_to_judge_by() -> None:
    with pytest.raises(AccuracyError, match="a finite answer to none of 2 rows"):
        compare("scores", scores([NAN, INF]), scores([1.0, 2.0]))


@pytest.mark.parametrize(("num_lost", "passes"), [(1, True), (3, False)])
def test_classes_that_lose_the_tasks_metric_do_not_pass(num_lost: int, passes: bool) -> None:
    """400 labelled rows and 100 without: one row is a quarter of a point."""
    expected = some_logits(1, 500)
    best = expected.argmax(axis=1)
    labels = np.where(np.arange(500) < 400, best, NAN)
    found = expected.copy()
    found[np.arange(num_lost), best[:num_lost]] -= 20
    judged = compare("classes", classes(expected), classes(found), labels)
    assert (judged.metric_name, judged.reference_metric) == ("accuracy", 1.0)
    assert judged.metric_loss == pytest.approx(num_lost / 400)
    gate = dataclasses.replace(LAX, max_metric_loss=0.005)
    assert (judged.failures(gate) == ()) is passes


def test_scores_that_lose_the_tasks_metric_do_not_pass() -> None:
    labels = np.arange(100) % 2
    fp32 = labels + 0.01 * np.arange(100)
    swapped = fp32.copy()
    swapped[[0, 99]] = fp32[[99, 0]]
    answers = [scores(values.tolist()) for values in (fp32, swapped)]
    judged = compare("scores", *answers, labels.astype(np.float64))
    assert judged.metric_name == "AUC"
    assert judged.metric_loss > 0.005
    (failure,) = judged.failures(dataclasses.replace(LAX, max_metric_loss=0.005))
    assert failure.startswith("AUC loss 0.0")


def test_an_engine_that_is_better_at_the_task_than_fp32_passes() -> None:
    expected = some_logits(1)
    better = np.where(np.arange(40) < 10, expected.argmax(axis=1), expected.argmin(axis=1))
    found = np.eye(6, dtype=np.float32)[better]
    judged = compare("classes", classes(expected), classes(found), better.astype(np.float64))
    assert judged.metric_loss == -0.75
    assert judged.failures(LAX) == ()


def test_labels_that_say_nothing_leave_the_metric_out() -> None:
    answers = classes(some_logits(1))
    judged = compare("classes", answers, answers, np.full(40, NAN))
    assert (judged.metric_name, judged.metric, judged.metric_loss) == (None, None, 0.0)


@pytest.mark.parametrize("labels", ["another scale", "turned round", "another class"])
def test_where_fp32_is_no_better_than_chance_the_metric_says_nothing(labels: str) -> None:
    values = np.linspace(0.1, 0.9, 40)
    answers, head = scores(values.tolist()), "scores"
    if labels == "another class":
        answers, head = classes(np.tile(np.float32([1, 0]), (40, 1))), "classes"
    wrong = {"another scale": 1000 * values, "turned round": values < 0.5}
    judged = compare(head, answers, answers, np.float64(wrong.get(labels, np.ones(40))))
    assert (judged.metric_name, judged.metric, judged.metric_loss) == (None, None, 0.0)


class Doubling:
    """A runner of 4 rows a batch."""

    batch_size = 4
    input = TensorSpec(name="x", dtype="float32", shape=(4, 2))
    outputs = (
        TensorSpec(name="double", dtype="float32", shape=(4, 2)),
        TensorSpec(name="sum", dtype="float32", shape=(4, 1)),
    )

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __enter__(self) -> Doubling:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to free."""

    def infer(self, batches: Iterable[Array | None]) -> Iterator[Outputs]:
        for batch in batches:
            assert batch is not None
            self.shapes.append(batch.shape)
            yield batch * 2, batch.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_rows", [1, 4, 5, 11])
def test_any_number_of_rows_is_answered_in_full_batches(num_rows: int) -> None:
    rows = np.arange(num_rows * 2, dtype=np.float32).reshape(num_rows, 2)
    runner = Doubling()
    answers = run_rows(runner, rows)
    assert set(runner.shapes) == {(4, 2)}
    np.testing.assert_array_equal(answers["double"], rows * 2)
    np.testing.assert_array_equal(answers["sum"][:, 0], rows.sum(axis=1))


class Kept:
    """Stands for a runner that computes for a while, and is kept from the core for another."""

    batch_size = 4
    outputs = ()

    def __init__(self, computes_s: float, kept_s: float) -> None:
        self._computes_s, self._kept_s = computes_s, kept_s

    def infer(self, batches: Iterable[object]) -> Iterator[Outputs]:
        for _ in batches:
            until = time.thread_time() + self._computes_s
            while time.thread_time() < until:
                pass
            time.sleep(self._kept_s)
            yield ()


def test_on_a_cpu_the_race_counts_what_engines_compute_and_not_who_was_kept_from_it() -> None:
    """A neighbour's busy second must not choose the engine of all later nights."""
    runners = {"fast": Kept(0.001, 0.02), "slow": Kept(0.004, 0)}
    rows = np.zeros((4, 2), np.float32)
    by_clock, by_work = race(runners, rows), race(runners, rows, 2)  # type: ignore[arg-type]
    assert by_clock["fast"] < by_clock["slow"]
    assert by_work["fast"] > by_work["slow"]
    assert by_work["slow"] <= 2 * 4 / 0.004


class Repeating(Doubling):
    """Answers every row twice."""

    def infer(self, batches: Iterable[Array | None]) -> Iterator[Outputs]:
        for answers in super().infer(batches):
            yield tuple(np.concatenate([array, array]) for array in answers)


def test_an_engine_without_one_answer_for_each_row_is_refused_whenever_it_is_asked() -> None:
    rows = np.zeros((5, 2), np.float32)
    with pytest.raises(ModelError, match=r"double: 8 x 2 to a batch of 4 rows; expected 4 x 2"):
        run_rows(Repeating(), rows)
    with pytest.raises(ModelError, match="expected 4 x 2, one answer a row"):
        probe_answer(Repeating())  # as before each night
