"""What interruptions cost is counted, or bounded where nobody could count it any more."""

from __future__ import annotations

import datetime
import threading
import time
from pathlib import Path

import pytest
from test_ledger import parts, shard

from pipeline.errors import GuardError, StorageError
from pipeline.interruptions import END_NOTE_S, EarlierAttempts, earlier_attempts, note_end
from pipeline.ledger import Attempt, AttemptEnd, Ledger
from pipeline.local_storage import LocalStorage

NUM_ROWS = 100


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStorage(str(tmp_path)), "job", "run-1")


class Clock:
    """When a test begins: commits get their own times, minutes after this module was imported."""

    began = datetime.datetime.now(datetime.UTC)


@pytest.fixture(autouse=True)
def _begin() -> None:
    Clock.began = datetime.datetime.now(datetime.UTC)


def at(seconds: float) -> str:
    return (Clock.began + datetime.timedelta(seconds=seconds)).isoformat()


def attempt(name: str, started: float, rows_at_risk: int | None = 30, **more: float) -> Attempt:
    return Attempt(
        id=name, started_at=at(started), host="h", pid=1, rows_at_risk=rows_at_risk, **more
    )


def end(ended: float, rows_begun: int) -> AttemptEnd:
    return AttemptEnd(ended_at=at(ended), why="Stop: SIGTERM", rows_begun=rows_begun)


def earlier(ledger: Ledger, *attempts: Attempt) -> EarlierAttempts:
    """Of the last of some attempts, which begin now if they are not dated back or ahead."""
    for one in attempts:
        ledger.open({"run_id": "run-1"}, one)
    return earlier_attempts(ledger, attempts[-1], ledger.records(), NUM_ROWS)


def test_a_first_attempt_replays_nothing(ledger: Ledger) -> None:
    found = earlier(ledger, attempt("a", 0))
    assert found == EarlierAttempts(
        num_interruptions=0,
        rows_replayed=0,
        is_exact=True,
        wall_s=0,
        clock_s=0,
        build_s=0,
        score_s=0,
    )


def test_what_an_attempt_began_and_did_not_commit_is_replayed(ledger: Ledger) -> None:
    first = attempt("a", -100, prepared_s=40.0, build_s=25.0)
    for index in range(2):
        ledger.commit(shard(index), parts(), "a")
    ledger.end(first, end(-10, rows_begun=37))
    found = earlier(ledger, first, attempt("b", 60))
    assert (found.num_interruptions, found.rows_replayed, found.is_exact) == (1, 17, True)
    assert (found.wall_s, found.build_s, found.score_s) == pytest.approx((90, 25, 50))


def test_of_an_attempt_that_was_killed_only_the_most_is_known(ledger: Ledger) -> None:
    for index in range(2):
        ledger.commit(shard(index), parts(), "a")
    found = earlier(ledger, attempt("a", -100, prepared_s=40.0), attempt("b", 60))
    assert (found.num_interruptions, found.rows_replayed, found.is_exact) == (1, 30, False)
    assert found.wall_s == pytest.approx(100, abs=5)  # until its last commit


def test_no_more_is_replayed_than_was_left_to_do(ledger: Ledger) -> None:
    for index in range(9):
        ledger.commit(shard(index), parts(), "a")
    found = earlier(ledger, attempt("a", -100), attempt("b", 50), attempt("c", 60))
    assert (found.num_interruptions, found.rows_replayed) == (2, 10 + 10)


def test_an_attempt_of_an_older_release_may_have_been_at_all_that_it_left(ledger: Ledger) -> None:
    ledger.commit(shard(0), parts(), "a")
    found = earlier(ledger, attempt("a", -100, rows_at_risk=None), attempt("b", 60))
    assert (found.rows_replayed, found.is_exact) == (90, False)


def test_an_attempt_that_was_killed_before_its_first_commit_took_time_all_the_same(
    ledger: Ledger,
) -> None:
    found = earlier(ledger, attempt("a", -100, prepared_s=40.0, build_s=30.0), attempt("b", 0))
    assert (found.wall_s, found.build_s, found.score_s) == (40, 30, 0)
    assert found.rows_replayed == 30


def test_an_attempt_that_had_nothing_to_score_was_not_interrupted(ledger: Ledger) -> None:
    first = attempt("a", -100)
    ledger.end(first, end(-90, rows_begun=0))
    found = earlier(ledger, first, attempt("b", 0))
    assert (found.num_interruptions, found.is_exact) == (0, True)
    assert found.wall_s == pytest.approx(10)


def test_a_process_beside_the_one_that_publishes_is_no_interruption(ledger: Ledger) -> None:
    ledger.commit(shard(0), parts(), "a")
    found = earlier(ledger, attempt("a", -100), attempt("b", -50))
    assert (found.num_interruptions, found.rows_replayed) == (0, 0)


def test_seconds_in_which_several_work_are_paid_for_each_and_counted_once(ledger: Ledger) -> None:
    attempts = attempt("a", -100), attempt("b", -80), attempt("c", -40), attempt("d", 20)
    for one, ended in zip(attempts, (-50, -60, 60, 90), strict=True):
        ledger.end(one, end(ended, rows_begun=0))
    current = attempt("e", 0)
    found = earlier(ledger, *attempts, current)
    assert found.wall_s == pytest.approx(50 + 20 + 100 + 70)
    assert found.clock_s == pytest.approx(50 + 40)  # from then on the current one is at work


def test_the_end_of_an_attempt_is_kept_beside_it_and_is_no_attempt(ledger: Ledger) -> None:
    first = attempt("a", 0)
    ledger.open({"run_id": "run-1"}, first)
    note_end(ledger, first, 12, GuardError("rows", "s3://key:secret@bucket: 3 rows.\nToo few"))
    assert ledger.attempts() == [first]
    assert ledger.ends()["a"].why == "GuardError: s3://***@bucket: 3 rows. Too few"
    assert ledger.ends()["a"].rows_begun == 12


def test_an_interruption_without_words_has_a_name(ledger: Ledger) -> None:
    note_end(ledger, attempt("a", 0), 0, KeyboardInterrupt())
    assert ledger.ends()["a"].why == "KeyboardInterrupt"


@pytest.mark.parametrize("broken", [OSError("gone"), StorageError("gone")])
def test_an_end_that_cannot_be_written_disturbs_nobody(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    def create(*_: object) -> bool:
        raise broken

    monkeypatch.setattr(LocalStorage, "create", create)
    note_end(ledger, attempt("a", 0), 0, KeyboardInterrupt())
    assert ledger.ends() == {}


def test_a_store_that_does_not_answer_does_not_hold_up_the_end(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(LocalStorage, "create", lambda *_: answered.wait(30))
    monkeypatch.setattr("pipeline.interruptions.END_NOTE_S", 0.05)
    started = time.monotonic()
    note_end(ledger, attempt("a", 0), 0, KeyboardInterrupt())
    answered.set()
    assert time.monotonic() - started < END_NOTE_S
