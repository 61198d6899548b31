"""What a backfill is made of: its period, its budget, its lanes, and what it says."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from flows.backfills.budget import Budget
from flows.backfills.dates import dates_between, nothing_to_do
from flows.backfills.summary import (
    BackfillSummary,
    DateOutcome,
    Status,
    plain_summary,
    render_summary,
)
from flows.crews import make_crews
from flows.giving_way import at_work, is_night_at_work, wait_for_nights
from flows.night import price_of
from pipeline.config import Job
from pipeline.errors import ConfigError, Interrupted
from pipeline.job_file import load_job

DAY = "2026-11-20"
RESUMABLE = 75


@pytest.fixture
def job(features_job: Path) -> Job:
    return load_job(str(features_job), ["lanes.device=cpu"])


def outcome(date: str, status: Status, why: str = "") -> DateOutcome:
    return DateOutcome(date=date, status=status, why=why)


def summary(*statuses: Status, strict: bool = False, dry_run: bool = False) -> BackfillSummary:
    dates = [outcome(f"2026-11-{day:02}", status) for day, status in enumerate(statuses, 1)]
    return BackfillSummary(
        job="users",
        first=dates[0].date,
        last=dates[-1].date,
        dates=tuple(dates),
        began_at="2026-11-21T08:00:00+00:00",
        spent_usd=1.25,
        max_usd=2.0,
        strict=strict,
        dry_run=dry_run,
    )


def test_a_period_has_all_of_its_dates() -> None:
    assert dates_between("2028-02-28", "2028-03-01") == ["2028-02-28", "2028-02-29", "2028-03-01"]
    assert dates_between(DAY, DAY) == [DAY]


@pytest.mark.parametrize(
    ("first", "last", "advice"),
    [
        ("2026-11-02", "2026-11-01", "Name the earlier date first"),
        ("0001-01-01", "9999-12-31", "Backfill one part at a time"),
    ],
)
def test_a_period_that_is_none_is_refused(first: str, last: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=rf"dates; expected 1 to 3,660\. {advice}\."):
        dates_between(first, last)


def test_dates_that_are_published_or_have_no_input_are_nothing_to_do(job: Job) -> None:
    published = Path(job.output.uri, "users", "dt=2026-11-18")
    published.mkdir(parents=True)
    (published / "_MANIFEST.json").touch()
    assert "2026-11-18" not in nothing_to_do(job, ["2026-11-18"]), "its report is missing"
    (published / "_report.html").touch()
    found = nothing_to_do(job, ["2026-11-18", "2026-11-19", DAY])
    assert {date: each.status for date, each in found.items()} == {
        "2026-11-18": "already_published",
        "2026-11-19": "no_input",
    }
    assert found["2026-11-19"].why == "no *.parquet in dt=2026-11-19"


def test_a_job_without_dates_has_no_period(job: Job) -> None:
    whole = job.model_copy(update={"input": job.input.model_copy(update={"partition": None})})
    with pytest.raises(ConfigError, match=r"^input\.partition: null, so that every date has"):
        nothing_to_do(whole, [DAY])


@pytest.mark.parametrize(
    ("statuses", "code", "status"),
    [
        (("published", "already_published", "no_input"), 0, "done"),
        (("published", "guard"), 3, "stopped"),
        (("published", "cost_cap"), 3, "stopped"),
        (("failed", "guard", "published"), 1, "failed"),
        (("failed", "guard", "interrupted"), 75, "interrupted"),
    ],
)
def test_the_exit_code_is_that_of_the_worst_date(
    statuses: tuple[Status, ...], code: int, status: str
) -> None:
    found = summary(*statuses)
    assert (found.exit_code, found.status) == (code, status)
    assert json.loads(json.dumps(found.to_dict()))["exit_code"] == code
    planned = summary(*statuses, dry_run=True)
    expected = (code, status) if code == RESUMABLE else (0, "planned")
    assert (planned.exit_code, planned.status) == expected


def test_a_date_without_input_is_a_failure_only_where_that_is_asked_for() -> None:
    assert summary("published", "no_input").exit_code == 0
    assert summary("published", "no_input", strict=True).exit_code == 1


def test_the_summary_has_a_line_for_each_date_and_says_what_was_spent() -> None:
    found = dataclasses.replace(
        summary("published", "published", "no_input"),
        dates=(
            outcome("2026-11-01", "published"),
            outcome("2026-11-02", "failed", "a\x1b[31m file"),
            outcome("2026-11-03", "no_input", "no *.parquet in dt=2026-11-03"),
        ),
    )
    assert plain_summary(found).splitlines() == [
        "3 dates: 1 published, 1 not done: no input, 1 not done: failed",
        "$1.25 of $2.00 spent since 2026-11-21T08:00",
        "",
        "2026-11-01  published",
        "2026-11-02  not done: failed  a\N{REPLACEMENT CHARACTER}[31m file",
        "2026-11-03  not done: no input  no *.parquet in dt=2026-11-03",
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(render_summary(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("2026-11-0") == 4
    assert "\x1b" not in text
    narrow = Console(file=io.StringIO(), width=40)
    narrow.print(render_summary(found))
    text = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("\n2026-11-0") == 3, "no date is cut off"
    assert "…" not in text


def test_a_budget_keeps_what_is_set_aside_for_others() -> None:
    budget = Budget(10.0, {"a": 4.0})
    assert budget.left_for("a") == 10, "what it has cost is part of what it may cost"
    assert budget.left_for("b") == 6
    assert budget.reserve("b", 3.0)
    assert (budget.left_for("b"), budget.left_for("c")) == (6, 3)
    assert not budget.reserve("c", 3.5)
    budget.settle("b", 1.0, is_whole=True)
    assert budget.reserve("c", 3.5)
    assert budget.spent_usd == 5


def test_a_date_that_is_not_published_costs_again_what_its_next_try_does() -> None:
    budget = Budget(10.0, {"a": 4.0})
    assert budget.reserve("a", 5.0)
    assert not budget.reserve("a", 6.5)
    budget.settle("a", 2.0, is_whole=False)
    assert budget.spent_usd == 6
    budget.settle("a", 7.0, is_whole=True)
    assert budget.spent_usd == 7
    budget.settle("a", 5.0, is_whole=True)
    assert budget.spent_usd == 7, "what no report knows of was spent, too"


def test_dates_that_ask_at_the_same_moment_do_not_both_get_the_last_money(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget, got, lock = Budget(10.0, {}), [], threading.Lock()

    class Meanwhile:
        """A lock at whose first release somebody else asks, too."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            if not got:
                got.append("b asks")
                got.append(budget.reserve("b", 6.0))

    monkeypatch.setattr(budget, "_lock", Meanwhile())
    assert budget.reserve("a", 6.0)
    assert got == ["b asks", False]


def test_without_a_limit_anything_may_be_spent() -> None:
    budget = Budget(None, {"a": 1e9})
    assert budget.reserve("b", 1e9)
    assert budget.left_for("b") is None


def test_a_night_at_work_is_seen_until_it_ends(job: Job, features_job: Path) -> None:
    other = load_job(str(features_job), ["name=others"])
    assert not is_night_at_work(job)
    with at_work(job), at_work(job):
        assert is_night_at_work(job)
        assert not is_night_at_work(other)
    assert not is_night_at_work(job)


def test_backfills_that_look_at_once_take_none_of_them_for_a_night(job: Job) -> None:
    together = threading.Barrier(3)

    def look(_: int) -> list[bool]:
        seen = []
        for _ in range(300):
            together.wait(30)
            seen.append(is_night_at_work(job))
        return seen

    with ThreadPoolExecutor(3) as threads:
        assert not any(itertools.chain.from_iterable(threads.map(look, range(3))))


def test_a_backfill_waits_for_a_night_and_says_so_once(job: Job) -> None:
    said: list[str] = []
    stopped = threading.Event()
    waiting = threading.Thread(target=wait_for_nights, args=(job, said.append, stopped))
    with at_work(job):
        waiting.start()
        waiting.join(1.2)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()
    assert said == ["a night of users is at work on this machine and goes first; waiting for it"]


def test_who_stops_a_backfill_need_not_wait_for_the_night(job: Job) -> None:
    stopped = threading.Event()
    stopped.set()
    with at_work(job), pytest.raises(Interrupted):
        wait_for_nights(job, lambda _: None, stopped)


def test_crews_share_the_cores_and_no_more_than_there_are(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    cores = [crew.devices[0].cores for crew in make_crews(job, 2)]
    assert [len(each) for each in cores] == [2, 2]
    assert cores[0].isdisjoint(cores[1])
    assert [device.num_threads for device in make_crews(job, 1)[0].devices] == [4]
    with pytest.raises(ConfigError, match=r"^--concurrency 5: this machine has 4 cores"):
        make_crews(job, 5)


def test_a_crew_that_was_dismissed_starts_nothing(job: Job) -> None:
    (crew,) = make_crews(job, 1)
    crew.dismiss()
    with pytest.raises(Interrupted):
        crew.lanes()


def test_a_date_that_shares_the_machine_pays_its_share(job: Job) -> None:
    whole, half = price_of(job, DAY), price_of(job, DAY, 0.5)
    assert half.usd_per_hour == whole.usd_per_hour / 2
    assert half.source == f"{whole.source}; 50% of the machine, which other dates share"
