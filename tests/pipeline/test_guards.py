"""The guards: when each stops a run, what it says, and that `--accept` lets just that one pass."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pipeline_cases import a_job, job_data

from pipeline.config import Job
from pipeline.distribution import from_text
from pipeline.errors import GUARDS, ConfigError, GuardError, known_guards
from pipeline.guards import Guards, LostFiles, NightWatch
from pipeline.last_nights import LOOK_BACK_DAYS, MOST_NIGHTS, compare_with, last_nights
from pipeline.ledger import CommitRecord, PartFile
from pipeline.local_storage import LocalStorage
from pipeline.report import Drift, RunReport, ScoreDistribution, report_from_dict
from pipeline.report_guards import guard_facts
from pipeline.report_html import render_html
from pipeline.report_text import render_markdown
from pipeline.run import Again, Night

ENGINE = "0123456789abcdef"
DRIFTED = Drift(rows=32, agreement=0.5, mean_abs_diff=0.2)
MOVED = ScoreDistribution(
    counts="1:10",
    num_values=10,
    model="m",
    head="scores",
    nights=("2026-11-19", "2026-11-18"),
    psi={"scores": 0.9},
    chance={"scores": 0.1},
)


def a_limited_job(**limits: object) -> Job:
    return a_job(job_data(Path("/data")), limits=limits)


def record(shard: int, num_bad: int = 0, num_rows: int = 100) -> CommitRecord:
    return CommitRecord(
        shard=shard,
        file="a.parquet",
        row_groups=(shard,),
        first_row=shard * num_rows,
        num_rows=num_rows,
        num_scored=num_rows - num_bad,
        num_quarantined=num_bad,
        reasons={"feature_missing": num_bad} if num_bad else {},
        part=PartFile(name=f"part-{shard}", num_bytes=1, sha256="0", num_rows=num_rows),
        quarantine=None,
        owner="me",
        committed_at="2026-11-21T00:00:00+00:00",
    )


CHECKS: dict[str, Callable[[Guards], None]] = {
    "rows": lambda guards: guards.check_rows(a_limited_job(min_rows=9), "2026-11-20", 8),
    "quarantine": lambda guards: guards.check_quarantine(a_limited_job(), 100, {"empty": 2}),
    "budget": lambda guards: guards.check_budget(a_limited_job(max_usd=1.5), 1.6, 10),
    "scores": lambda guards: guards.check_scores(a_limited_job(), MOVED),
    "drift": lambda guards: guards.check_drift("classes", 0.97, DRIFTED, ENGINE),
}
SAID = {
    "rows": "/data/in: 8 rows for 2026-11-20; expected at least 9 (limits.min_rows).",
    "quarantine": "2 of 100 rows (2.00%) are in quarantine (empty 2); expected at most 1 ",
    "budget": "$1.60 are spent and 10 rows left; expected to spend at most $1.50",
    "scores": "scores: a population stability index of 0.9 against the last 2 nights "
    "(2026-11-18 to 2026-11-19); expected at most 0.25 (limits.max_psi)",
    "drift": "engine 0123456789ab: on 32 rows of this night its share of rows with fp32's class "
    "is 0.5; expected at least 0.97",
}


def test_every_guard_is_tested() -> None:
    assert set(CHECKS) == set(SAID) == set(GUARDS)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_says_what_it_found_what_to_do_and_how_to_overrule_it(guard: str) -> None:
    guards = Guards()
    with pytest.raises(GuardError) as stopped:
        CHECKS[guard](guards)
    assert stopped.value.guard == guard
    assert stopped.value.exit_code == 3
    message = str(stopped.value)
    assert message.startswith(SAID[guard])
    assert " Nothing was " in message
    command = f"score run JOB --date D --accept {guard}"
    assert message.endswith(f", or publish as it is with `{command}`.")
    assert guards.accepted == ()


@pytest.mark.parametrize(
    ("again", "command"),
    [
        ("no", "score run JOB --date 2026-11-20"),
        ("all", "score run JOB --date 2026-11-20 --force"),
        ("quarantine", "score requeue JOB --date 2026-11-20"),
    ],
)
def test_a_guard_names_the_command_that_takes_its_name(again: Again, command: str) -> None:
    """All of it: `score backfill` accepts none."""
    night = Night(job=a_limited_job(), date="2026-11-20", again=again, accept=frozenset({"scores"}))
    with pytest.raises(GuardError) as stopped:
        CHECKS["drift"](Guards(night.accept, night.command))
    assert f"`{command} --accept drift --accept scores`." in str(stopped.value)


@pytest.mark.parametrize("guard", GUARDS)
def test_an_accepted_guard_is_noted_with_what_it_found(guard: str) -> None:
    guards = Guards([guard])
    for _ in range(2):
        CHECKS[guard](guards)
    (noted,) = guards.accepted
    assert noted.startswith(f"{guard}: {SAID[guard]}")
    assert "--accept" not in noted


def test_a_guard_that_is_accepted_and_content_is_not_noted() -> None:
    guards = Guards(["quarantine"])
    guards.check_quarantine(a_limited_job(), 100, {"empty": 1})
    assert guards.accepted == ()


def test_an_unknown_guard_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError, match="rows, quarantine, budget, scores, drift"):
        known_guards(["quarantine", "everything"])
    with pytest.raises(ConfigError, match="--accept everything: no such guard"):
        Guards(["everything"])


def test_the_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(GuardError("drift", "too far")))
    assert (type(error), error.guard, str(error)) == (GuardError, "drift", "too far")


@pytest.mark.parametrize(
    ("share", "probation", "num_rows", "allowed"),
    [
        (0.0, 0, 100, 0),
        (0.01, 0, 100, 1),
        (0.29, 0, 100, 29),  # 0.29 * 100 is less than 29
        (0.07, 0, 100, 7),  # 0.07 * 100 is more than 7
        (0.01, 5, 100, 5),
        (0.01, 5, 10_000, 100),
        (1.0, 0, 3, 3),
    ],
)
def test_rows_may_be_bad_up_to_their_share_or_their_probation(
    share: float, probation: int, num_rows: int, allowed: int
) -> None:
    job, guards = a_limited_job(max_quarantined=share, probation_rows=probation), Guards()
    guards.check_quarantine(job, num_rows, {"empty": allowed} if allowed else {})
    with pytest.raises(GuardError, match=f"expected at most {allowed:,} "):
        guards.check_quarantine(job, num_rows, {"empty": allowed + 1})


def test_rows_of_files_that_cannot_be_read_count_by_their_bytes() -> None:
    lost = LostFiles(num_files=1, num_rows=100)
    with pytest.raises(
        GuardError,
        match=r"2 of 100 rows, with about 100 in 1 file that cannot be read, \(51\.00%\) are in",
    ):
        Guards().check_quarantine(a_limited_job(), 100, {"empty": 2}, lost)
    Guards().check_quarantine(a_limited_job(max_quarantined=0.51), 100, {"empty": 2}, lost)
    Guards().check_quarantine(a_limited_job(), 100, {}, LostFiles(num_files=1, num_rows=0))


def watch(job: Job, guards: Guards, *done: CommitRecord, usd: float = 0.0) -> NightWatch:
    return NightWatch(guards, job, 1_000, done, lambda: usd)


def test_scoring_stops_with_the_first_shard_that_breaks_the_limit() -> None:
    seen = watch(a_limited_job(max_quarantined=0.01), Guards(), record(0, num_bad=4))
    seen.check()
    seen.committed(record(1, num_bad=6))  # 10 of 1,000: just allowed
    seen.committed(record(2))
    with pytest.raises(GuardError, match=r"11 of 1,000 rows \(1\.10%\)"):
        seen.committed(record(3, num_bad=1))
    with pytest.raises(GuardError):  # who asks later is told the same
        seen.committed(record(4))


def test_what_an_earlier_attempt_committed_counts_before_anything_is_scored() -> None:
    with pytest.raises(GuardError, match=r"11 of 1,000 rows"):
        watch(a_limited_job(), Guards(), record(0, num_bad=11)).check()
    accepted = Guards(["quarantine"])
    watch(a_limited_job(), accepted, record(0, num_bad=11)).check()
    assert len(accepted.accepted) == 1


def test_money_stops_scoring_only_while_there_are_rows_left() -> None:
    job = a_limited_job(max_usd=2.0)
    watch(job, Guards(), usd=2.0).check()
    with pytest.raises(GuardError, match=r"\$2\.01 are spent and 900 rows left"):
        watch(job, Guards(), usd=2.01).committed(record(0))
    nearly = watch(job, Guards(), *map(record, range(9)), usd=2.01)
    nearly.committed(record(9))  # what is scored and paid for is published
    watch(a_limited_job(), Guards(), usd=1e9).check()


def test_commits_of_many_threads_are_all_counted() -> None:
    guards = Guards(["quarantine"])
    seen = NightWatch(guards, a_limited_job(), 20_000, (), lambda: 0.0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(seen.committed, (record(shard, num_bad=2) for shard in range(200))))
    assert guards.accepted[0].startswith("quarantine: 400 of 20,000 rows")


@pytest.mark.parametrize(
    ("psi", "chance", "limit", "stops"),
    [
        (0.26, 0.0, 0.25, True),
        (0.25, 0.0, 0.25, False),
        (0.34, 0.1, 0.25, False),
        (0.36, 0.1, 0.25, True),
        (9.0, 0.0, None, False),
        (0.11, 0.1, 0.0, True),
    ],
)
def test_scores_may_move_by_the_limit_and_by_chance(
    psi: float, chance: float, limit: float | None, stops: bool
) -> None:
    guards = Guards(["scores"])
    moved = dataclasses.replace(MOVED, psi={"scores": psi}, chance={"scores": chance})
    guards.check_scores(a_limited_job(max_psi=limit), moved)
    assert bool(guards.accepted) is stops


Build = Callable[..., RunReport]


@pytest.fixture
def publish(tmp_path: Path, a_report: Build) -> Callable[..., LocalStorage]:
    """Writes the report of a published date."""
    output = LocalStorage(str(tmp_path))

    def write(date: str, counts: str = "1:10", **changes: object) -> LocalStorage:
        kept = dataclasses.replace(MOVED, counts=counts, nights=(), psi={}, chance={})
        report = a_report(job="users", date=date, **{"distribution": kept, **changes})
        output.create(f"users/dt={date}/_report.json", report.to_json().encode())
        return output

    return write


def dates(output: LocalStorage, date: str = "2026-11-20", model: str = "m") -> list[str]:
    return [report.date for report in last_nights(output, "users", date, model, "scores")]


def test_the_last_seven_nights_before_a_date_are_taken(
    publish: Callable[..., LocalStorage],
) -> None:
    for day in range(1, 26):
        output = publish(f"2026-11-{day:02d}")
    assert dates(output) == [f"2026-11-{day:02d}" for day in range(19, 19 - MOST_NIGHTS, -1)]
    assert dates(output, "2026-11-02") == ["2026-11-01"]
    assert dates(output, "2026-11-01") == []


def test_a_weekly_job_is_compared_with_its_last_weeks(
    publish: Callable[..., LocalStorage],
) -> None:
    for date in ("2026-11-13", "2026-11-06", "2026-10-30", "2026-10-16", "2026-10-15"):
        output = publish(date)
    assert LOOK_BACK_DAYS == 35
    assert dates(output) == ["2026-11-13", "2026-11-06", "2026-10-30", "2026-10-16"]


def test_nights_of_another_model_or_of_none_are_left_out(
    publish: Callable[..., LocalStorage], caplog: pytest.LogCaptureFixture
) -> None:
    output = publish("2026-11-19")
    publish("2026-11-18", distribution=dataclasses.replace(MOVED, model="other"))
    publish("2026-11-17", distribution=None)
    output.create("users/dt=2026-11-16/_report.json", b'{"of": "another version"}')
    publish("2026-11-15")
    assert dates(output) == ["2026-11-19", "2026-11-15"]
    assert "dt=2026-11-16/_report.json: cannot be read" in caplog.text
    assert dates(output, model="other") == ["2026-11-18"]


def test_an_accepted_shift_is_what_is_usual_from_then_on(
    publish: Callable[..., LocalStorage],
) -> None:
    publish("2026-11-17")
    publish("2026-11-18", accepted=("scores: moved",))
    output = publish("2026-11-19", accepted=("quarantine: many",))
    assert dates(output) == ["2026-11-19", "2026-11-18"]


def test_a_night_is_compared_with_the_sum_of_the_nights(
    publish: Callable[..., LocalStorage],
) -> None:
    publish("2026-11-18", "100:5000 200:5000")
    output = publish("2026-11-19", "100:5000 200:5000")
    past = last_nights(output, "users", "2026-11-20", "m", "scores")
    found = compare_with(past, from_text("100:900 200:100"), "m", "scores")
    assert found.nights == ("2026-11-19", "2026-11-18")
    assert found.counts == "100:900 200:100"
    assert found.psi["scores"] == pytest.approx(0.88, abs=0.3)
    assert compare_with([], from_text("1:3"), "m", "scores").psi == {}


def test_the_report_reads_back_with_what_the_guards_found(a_report: Build) -> None:
    report = a_report(drift=DRIFTED, distribution=MOVED, accepted=("drift: far",))
    assert report_from_dict(json.loads(report.to_json())) == report


def test_a_report_from_before_the_guards_reads_back(a_report: Build) -> None:
    data = json.loads(a_report().to_json())
    del data["drift"], data["distribution"], data["accepted"]
    assert report_from_dict(data) == a_report()
    assert guard_facts(a_report()) == []


@pytest.mark.parametrize("render", [render_markdown, render_html])
def test_the_report_says_what_was_checked(
    a_report: Build, render: Callable[[RunReport], str]
) -> None:
    text = render(
        a_report(drift=DRIFTED, distribution=MOVED, accepted=("drift: <b>far</b> & away",))
    )
    assert "0.5 with fp32 on 32 rows of this night; mean difference 0.200" in text
    assert "scores 0.900 (a major shift); against 2 nights since 2026-11-18" in text
    assert "drift: " in text
    assert "<b>far" not in text


def test_what_was_not_compared_is_said_too(a_report: Build) -> None:
    first = dataclasses.replace(MOVED, nights=(), psi={}, chance={})
    facts = dict(guard_facts(a_report(drift=Drift(rows=0, note="built now"), distribution=first)))
    assert facts["drift of the engine"] == "not judged: built now"
    assert facts["scores, other nights"] == "no earlier night of this model to compare with"
