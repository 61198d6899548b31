"""Drift: rows are found again in the parts, and compared with fp32 as chance allows."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pipeline_cases import DATE, SumRunner, a_job, a_plan, job_data, scoring_tools, write_input

from engines.errors import EngineError
from pipeline import drift as drift_module
from pipeline import drift_sample, last_look
from pipeline.config import Job
from pipeline.drift import (
    FEW_ROWS,
    LUCK,
    MIN_SCORES,
    MOST_ROWS,
    at_most,
    is_too_far,
    measure_drift,
    num_drift_rows,
    worst,
)
from pipeline.drift_sample import CommittedParts, DriftSampler, Sampled
from pipeline.errors import VerifyError
from pipeline.ledger import CommitRecord
from pipeline.plan import Plan
from pipeline.report import Drift
from pipeline.score_shards import ScoringTools, ShardScoring
from pipeline.storage import open_storage

NUM_ROWS = 240
BAD = (0, 7, 8, 21, 39, 100, 119, 239)


@dataclasses.dataclass
class Night:
    """A scored night: 240 users in groups of ten, four groups a shard; some lack a feature."""

    job: Job
    plan: Plan
    tools: ScoringTools
    records: dict[int, CommitRecord]

    def sample(self, num_rows: int = NUM_ROWS) -> Sampled | None:
        source, output = open_storage(self.job.input.uri), open_storage(self.job.output.uri)
        parts = CommittedParts(self.tools.ledger, output, self.records, "scores")
        sampler = DriftSampler(self.plan, source, parts, self.tools.decoder, "run")
        return sampler.sample(num_rows)


@pytest.fixture
def night(tmp_path: Path) -> Night:
    ids = np.arange(NUM_ROWS)
    features = ids.astype(np.float32)
    missing = pa.array(features, mask=np.isin(ids, BAD))
    table = pa.table({"user_id": ids, "f0": missing, "f1": 2 * features})
    write_input(tmp_path / "in", table.slice(0, 130), name="a.parquet")
    write_input(tmp_path / "in", table.slice(130), name="b.parquet")
    job = a_job(job_data(tmp_path), lanes={"shard_rows": 40})
    plan = a_plan(job)
    tools = scoring_tools(job, plan, SumRunner())
    with ShardScoring(plan.shards, tools) as scoring:
        return Night(job, plan, tools, {record.shard: record for record in scoring})


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
def test_sampled_rows_are_found_in_the_parts_by_their_position(
    night: Night, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("pipeline.row_groups.SAMPLED_BYTES", piece_bytes)
    monkeypatch.setattr(drift_sample, "MAX_GROUPS", NUM_ROWS)
    sampled = night.sample()
    assert sampled is not None
    users = sampled.inputs[:, 0].astype(int).tolist()
    assert sorted(users) == sorted(set(range(NUM_ROWS)) - set(BAD))
    np.testing.assert_array_equal(sampled.answers["score"][:, 0], 3 * sampled.inputs[:, 0])


def test_a_few_groups_all_over_the_night_are_read(night: Night) -> None:
    sampled = night.sample(32)
    assert sampled is not None
    assert 32 - len(BAD) <= len(sampled.inputs) <= 32
    groups = {int(user) // 10 for user in sampled.inputs[:, 0]}
    assert len(groups) == drift_sample.MAX_GROUPS
    assert min(groups) < 4 < 18 < max(groups)
    again = night.sample(32)
    assert again is not None
    np.testing.assert_array_equal(sampled.inputs, again.inputs)


def test_huge_row_groups_are_read_as_few_as_may_be(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_sample, "MAX_READ_BYTES", 1)
    sampled = night.sample(20)
    assert sampled is not None
    assert len({int(user) // 10 for user in sampled.inputs[:, 0]}) == drift_sample.MIN_GROUPS


def test_each_engine_is_judged_by_rows_of_its_own(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    def users_sampled(_: object, sampler: Callable[[], Sampled | None]) -> Drift:
        sampled = sampler()
        assert sampled is not None
        users = sampled.inputs[:, 0]
        return Drift(rows=len(users), agreement=users.min(), mean_abs_diff=users.max())

    monkeypatch.setattr(last_look, "measure_drift", users_sampled)
    owners = {0: "", 1: "a", 2: "b", 3: "b", 4: "fresh", 5: "fresh"}
    engines = {key: SimpleNamespace(built=key == "fresh") for key in ("a", "fresh")}
    run: Any = SimpleNamespace(
        job=night.job,
        plan=night.plan,
        source=open_storage(night.job.input.uri),
        output=open_storage(night.job.output.uri),
        ledger=night.tools.ledger,
        engines=engines,
        resolved=SimpleNamespace(engine=SimpleNamespace(key="a")),
    )
    records = {
        shard: dataclasses.replace(record, engine=owners[shard])
        for shard, record in night.records.items()
    }
    assert len(owners) == len(night.plan.shards)
    found = last_look._drifts(run, records)
    bounds = {key: (drift.agreement, drift.mean_abs_diff) for key, drift in found.items()}
    first, second, third = (sum(s.num_rows for s in night.plan.shards[:n]) for n in (2, 4, 6))
    assert 0 < bounds["a"][0] < bounds["a"][1] < first <= bounds["b"][0] < bounds["b"][1] < second
    assert third == NUM_ROWS
    assert "built in this run" in found["fresh"].note
    assert worst(found.values()) == found["a"]
    assert worst([found["fresh"]]) == found["fresh"]
    assert worst([]) is None


def part_of(night: Night, shard: int) -> Path:
    path = night.tools.ledger.part_path(night.records[shard].part)
    return Path(night.job.output.uri, path)


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_part_that_is_not_what_was_committed_stops_the_night(night: Night, damage: str) -> None:
    for shard in night.records:
        path = part_of(night, shard)
        content = bytearray(path.read_bytes())
        path.unlink()
        if damage == "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    with pytest.raises(VerifyError, match="another sha256" if damage == "flip" else "gone"):
        night.sample()


def test_a_part_with_other_rows_than_were_committed_is_a_defect(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_sample, "MAX_GROUPS", NUM_ROWS)
    more = night.records[2].num_scored + 1
    night.records[2] = dataclasses.replace(night.records[2], num_scored=more)
    with pytest.raises(VerifyError, match=rf"part-.*: {more - 1} rows; expected {more}"):
        night.sample()


def test_a_shard_whose_quarantine_does_not_name_each_row_is_left_out(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_sample, "MAX_GROUPS", NUM_ROWS)
    first = night.records[0]
    assert first.num_quarantined == 5
    night.records[0] = dataclasses.replace(first, num_quarantined=12)
    sampled = night.sample()
    assert sampled is not None
    assert sampled.inputs[:, 0].min() == first.num_rows


def test_input_that_has_changed_since_cannot_be_compared(night: Night) -> None:
    for name in ("a.parquet", "b.parquet"):
        path = Path(night.job.input.uri, f"dt={DATE}", name)
        path.write_bytes(path.read_bytes() + b" ")
    assert night.sample() is None
    Path(night.job.input.uri, f"dt={DATE}", "a.parquet").unlink()
    assert night.sample() is None


def test_a_damaged_group_is_left_out(night: Night) -> None:
    import os

    path = Path(night.job.input.uri, f"dt={DATE}", "a.parquet")
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk loses bytes
    sampled = night.sample()
    assert sampled is not None
    assert sampled.inputs[:, 0].max() > 130


@pytest.mark.parametrize(
    ("wanted", "num_rows", "expected"),
    [
        (None, 10, 10),
        (None, 50, FEW_ROWS),
        (None, 99_999, FEW_ROWS),
        (None, 100_000, 33),
        (None, 900_000, 300),
        (None, 10**8, MOST_ROWS),
        (0, 10**8, 0),
        (1_000, 10**8, 1_000),
        (1_000, 10, 10),
    ],
)
def test_large_nights_are_looked_at_more(
    tmp_path: Path, wanted: int | None, num_rows: int, expected: int
) -> None:
    job = a_job(job_data(tmp_path), limits={"drift_rows": wanted})
    assert num_drift_rows(job, num_rows) == expected


def fp32(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> Any:
    """An engine whose fp32 graph answers so."""
    monkeypatch.setattr(drift_module, "has_reference", lambda _: True)
    monkeypatch.setattr(drift_module, "fp32_answers", lambda *_: answers)
    return object()


def committed(variance: float = 0.0, **answers: Any) -> Callable[[], Sampled]:
    rows = len(next(iter(answers.values())))
    known = np.array([variance]) if "score" in answers else np.empty(0)
    return lambda: Sampled(inputs=np.zeros((rows, 1)), answers=answers, variance=known)


def test_classes_agree_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, probabilities = np.arange(40) % 7, np.full(40, 0.5, np.float32)
    engine = fp32(monkeypatch, class_id=ids[:, None], probability=probabilities[:, None])
    found = np.where(np.arange(40) < 4, 99, ids)
    measured = measure_drift(engine, committed(class_id=found, probability=probabilities + 0.1))
    assert measured.rows == 40
    assert measured.agreement == pytest.approx(0.9)
    assert measured.mean_abs_diff == pytest.approx(0.1)
    broken = np.full(40, np.nan, np.float32)
    measured = measure_drift(engine, committed(class_id=ids, probability=broken))
    assert (measured.agreement, measured.mean_abs_diff) == (0.0, None)


def test_classes_are_compared_where_fp32_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, probabilities = np.arange(40) % 7, np.full(40, 0.5, np.float32)
    unknown = np.where(np.arange(40) < 10, np.nan, probabilities)
    engine = fp32(monkeypatch, class_id=ids[:, None], probability=unknown[:, None])
    found = np.where(np.arange(40) < 10, 99, ids)
    measured = measure_drift(engine, committed(class_id=found, probability=probabilities))
    assert (measured.rows, measured.agreement) == (30, 1.0)
    engine = fp32(monkeypatch, class_id=ids[:, None], probability=np.full((40, 1), np.nan))
    measured = measure_drift(engine, committed(class_id=found, probability=probabilities))
    assert (measured.rows, measured.agreement) == (0, None)
    assert "no finite answer" in measured.note


def test_the_worst_column_of_scores_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).normal(size=(64, 2))
    engine = fp32(monkeypatch, score=scores)
    found = scores.copy()
    found[:, 1] = np.roll(found[:, 1], 1)
    measured = measure_drift(engine, committed(score=found))
    assert measured.agreement == 0.0
    found[:, 1] = scores[:, 1] + 0.1
    measured = measure_drift(engine, committed(score=found))
    assert measured.agreement == pytest.approx(0.99, abs=0.005)


def test_rows_that_are_alike_are_judged_by_the_variance_of_their_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = np.random.default_rng(0).normal(scale=0.01, size=(64, 1))
    engine = fp32(monkeypatch, score=scores)
    found = scores + 0.02  # twice their own deviation, and little among all scores
    assert measure_drift(engine, committed(score=found)).agreement == 0.0
    assert measure_drift(engine, committed(1.0, score=found)).agreement == pytest.approx(0.9996)
    # Nonsense that varies a lot does not hide itself.
    nonsense = np.random.default_rng(1).normal(scale=30.0, size=(64, 1))
    measured = measure_drift(engine, committed(900.0, score=nonsense))
    assert measured.agreement == pytest.approx(0, abs=0.3)


def test_scores_that_vary_by_rounding_alone_stop_no_night(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scores, found = (np.float32(1 - 3e-7 * rng.random((64, 1))) for _ in range(2))
    measured = measure_drift(fp32(monkeypatch, score=scores), committed(score=found))
    assert measured.agreement == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_explain_nothing(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    scores = np.random.default_rng(0).normal(size=(64, 1))
    engine = fp32(monkeypatch, score=scores)
    found = scores.copy()
    found[3] = value
    measured = measure_drift(engine, committed(1.0, score=found))
    assert (measured.agreement, measured.mean_abs_diff) == (0.0, None)


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        (np.zeros((MIN_SCORES - 1, 1)), "too few"),
        (np.full((MIN_SCORES, 1), 0.3), "do not vary"),
        (np.full((MIN_SCORES, 1), np.nan), "too few"),  # fp32 itself has no answers
    ],
)
def test_scores_that_say_little_are_not_judged(
    monkeypatch: pytest.MonkeyPatch, scores: Any, why: str
) -> None:
    engine = fp32(monkeypatch, score=scores)
    measured = measure_drift(engine, committed(score=scores))
    assert measured.agreement is None
    assert why in measured.note
    assert not is_too_far(measured, "scores", 0.97)


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise EngineError("no memory for fp32")

    engine = fp32(monkeypatch)
    assert "no scored row" in measure_drift(engine, lambda: None).note
    monkeypatch.setattr(drift_module, "fp32_answers", fails)
    assert measure_drift(engine, committed(score=np.zeros((40, 1)))).note == "no memory for fp32"
    monkeypatch.setattr(drift_module, "has_reference", lambda _: False)
    assert "without its fp32 graph" in measure_drift(engine, lambda: None).note


@pytest.mark.parametrize(
    ("num_same", "rows", "min_agreement", "stops"),
    [
        (32, 32, 0.97, False),
        (28, 32, 0.97, False),  # one night in sixty for an engine at the limit
        (27, 32, 0.97, False),
        (26, 32, 0.97, True),
        (0, 32, 0.5, True),
        (9, 32, 0.5, False),
        (7, 32, 0.5, True),
        (485, 512, 0.97, False),
        (483, 512, 0.97, True),
        (31, 32, 1.0, True),
        (0, 1, 0.97, False),
        (0, 32, 0.0, False),
    ],
)
def test_classes_are_judged_with_what_chance_allows(
    num_same: int, rows: int, min_agreement: float, stops: bool
) -> None:
    drift = Drift(rows=rows, agreement=num_same / rows, mean_abs_diff=0.0)
    assert is_too_far(drift, "classes", min_agreement) is stops


def stopped_nights(explained: Any, rows: int, tails: str, num_nights: int = 200) -> int:
    """Of nights whose engine explains so much of each column, those that are stopped at 0.97."""
    rng, shape = np.random.default_rng(0), (rows, len(explained))
    stopped = 0
    for _ in range(num_nights):
        scores = rng.normal(size=shape)
        errors = rng.normal(size=shape) if tails == "normal" else rng.laplace(0, 0.5**0.5, shape)
        variance = np.ones(len(explained))
        found = {"score": scores + errors * np.sqrt(1 - np.asarray(explained))}
        sampled = Sampled(inputs=scores, answers=found, variance=variance)
        stopped += is_too_far(drift_module._compare_scores(scores, sampled), "scores", 0.97)
    return stopped


@pytest.mark.parametrize("tails", ["normal", "heavy"])
@pytest.mark.parametrize(
    ("explained", "rows", "least", "most"),
    [
        ([0.97], 32, 0, 3),
        ([0.97], 512, 0, 3),
        ([0.97] * 64, 32, 0, 6),
        ([0.97] * 64, 128, 0, 3),
        ([0.9], 32, 120, 200),
        ([0.9], 128, 199, 200),
        ([0.9] + [0.99] * 63, 32, 60, 200),
        ([0.9] + [0.99] * 63, 128, 190, 200),
    ],
)
def test_scores_are_judged_with_what_chance_allows(
    tails: str, explained: list[float], rows: int, least: int, most: int
) -> None:
    assert least <= stopped_nights(explained, rows, tails) <= most


def test_what_chance_does_not_explain_of_the_scores_stops_the_night() -> None:
    drift = Drift(rows=32, agreement=0.93, at_best=0.975)
    assert not is_too_far(drift, "scores", 0.97)
    assert is_too_far(drift, "scores", 0.98)
    assert worst([drift, other := Drift(rows=512, agreement=0.96, at_best=0.965)]) is other


def test_a_column_that_never_varies_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = np.random.default_rng(0).normal(size=(64, 3))
    scores[:, 1] = 0.5
    engine, found = fp32(monkeypatch, score=scores), scores + 0.001
    measured = measure_drift(engine, committed(score=found))
    assert measured.note == ""
    assert measured.agreement == pytest.approx(1.0, abs=1e-4)
    found[:, 2] = np.roll(found[:, 2], 1)
    assert is_too_far(measure_drift(engine, committed(score=found)), "scores", 0.97)


@pytest.mark.parametrize("value", [0.1, np.nan, 1e30])
def test_a_column_that_varies_in_what_was_published_alone_has_drifted(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    scores = np.random.default_rng(0).normal(size=(64, 2))
    scores[:, 1] = 0.0
    engine, found = fp32(monkeypatch, score=scores), scores.copy()
    found[::2, 1] = value
    measured = measure_drift(engine, committed(score=found))
    assert (measured.agreement, measured.at_best) == (0.0, 0.0)
    assert is_too_far(measured, "scores", 0.5)


def test_a_column_that_seldom_varies_is_judged_by_the_variance_of_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = np.zeros((32, 1))  # behind a ReLU, say
    engine = fp32(monkeypatch, score=scores)
    measured = measure_drift(engine, committed(1.0, score=scores + 0.01))
    assert measured.agreement == pytest.approx(0.9999)


@pytest.mark.parametrize("rows", [1, 32, 512])
def test_an_engine_at_its_limit_is_stopped_as_seldom_as_promised(rows: int) -> None:
    def stops(num_same: int) -> bool:
        return is_too_far(Drift(rows=rows, agreement=num_same / rows), "classes", 0.97)

    worst = max((k for k in range(rows + 1) if stops(k)), default=-1)
    chance = [math.comb(rows, k) * 0.97**k * 0.03 ** (rows - k) for k in range(worst + 1)]
    assert sum(chance) < LUCK
    assert at_most(rows, rows, 0.97) == pytest.approx(1.0)


def test_parts_are_read_without_importing_pandas() -> None:
    """It takes 0.2 s, where it is installed; Arrow's own conversions do it."""
    script = """
import sys
import numpy as np, pyarrow as pa
from pipeline.drift_sample import as_numpy
from pipeline.start_up import keep_pandas_out
keep_pandas_out()
numbers = pa.array(np.arange(12, dtype=np.float32))
plain = pa.chunked_array([numbers.slice(3, 4), numbers.slice(0, 2)])
pairs = pa.ListArray.from_arrays(pa.array(np.arange(0, 14, 2, dtype=np.int32)), numbers)
lists = pa.chunked_array([pairs.slice(1, 2), pairs.slice(5, 1)])
taken = pa.table({"x": numbers}).take(pa.array(np.array([7, 1])))["x"]
none = pa.chunked_array([], pa.int64())
print([as_numpy(each).tolist() for each in (plain, lists, taken, none)])
print("pandas" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    plain, lists = [3.0, 4.0, 5.0, 6.0, 0.0, 1.0], [[2.0, 3.0], [4.0, 5.0], [10.0, 11.0]]
    assert found.stdout.splitlines() == [str([plain, lists, [7.0, 1.0], []]), "False"]
