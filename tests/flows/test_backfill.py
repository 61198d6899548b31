"""Backfills in this process: every date is published, or listed with why it is not."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deltalake
import pytest
from mail_cases import REPORT

from engines.errors import ModelError
from flows.backfills.backfill import BackfillRequest, run_backfill
from flows.backfills.summary import BackfillSummary, DateOutcome
from flows.demo_data import write_users
from flows.giving_way import at_work
from flows.progress import LineProgress
from pipeline.config import Job
from pipeline.errors import StorageError
from pipeline.history import read_history
from pipeline.job_file import load_job
from pipeline.report import UnreadableFile
from pipeline.storage import Storage, open_storage
from pipeline.verify import verify_published

pytestmark = pytest.mark.timeout(170)
NUM_ROWS = 1_000
NIGHT_S = 4.0
FIRST, LAST = "2026-11-01", "2026-11-05"
DATES = [f"2026-11-0{day}" for day in range(1, 6)]
NO_INPUT, DAMAGED = "2026-11-02", "2026-11-04"
GOOD = [date for date in DATES if date not in (NO_INPUT, DAMAGED)]


@pytest.fixture(scope="module")
def dates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five dates of users; one has no input, and that of another is no Parquet."""
    root = tmp_path_factory.mktemp("dates")
    write_users(root, FIRST, num_rows=NUM_ROWS, num_files=1)
    for date in GOOD[1:]:
        shutil.copytree(root / f"dt={FIRST}", root / f"dt={date}")
    (root / f"dt={DAMAGED}").mkdir()
    (root / f"dt={DAMAGED}" / "users-0.parquet").write_bytes(b"PAR1 but no more")
    return root


@pytest.fixture
def job(features_job: Path, dates: Path) -> Job:
    sets = [f"input.uri={dates}", "lanes.device=cpu", "limits.drift_rows=0"]
    return load_job(str(features_job), [*sets, "limits.max_quarantined=0.5"])


def quiet() -> LineProgress:
    return LineProgress(lambda _: None)


def backfill(job: Job, **changes: Any) -> BackfillSummary:
    request = {"first": FIRST, "last": LAST, **changes}
    return run_backfill(BackfillRequest(job=job, **request), quiet())


def by_date(summary: BackfillSummary) -> dict[str, str]:
    return {outcome.date: outcome.status for outcome in summary.dates}


def test_one_date_that_fails_and_one_without_input_do_not_stop_the_others(job: Job) -> None:
    lines: list[str] = []
    request = BackfillRequest(job=job, first=FIRST, last=LAST, order="newest")
    found = run_backfill(request, LineProgress(lines.append))
    assert by_date(found) == {
        **dict.fromkeys(GOOD, "published"),
        NO_INPUT: "no_input",
        DAMAGED: "failed",
    }
    assert (found.exit_code, found.status) == (1, "failed")
    in_order = [LAST, DAMAGED, "2026-11-03", FIRST]
    expected = [f"{date}, {number} of 4" for number, date in enumerate(in_order, 1)]
    assert [line for line in lines if line.endswith(" of 4")] == expected
    (failed,) = [outcome for outcome in found.dates if outcome.status == "failed"]
    assert "expected a Parquet file" in failed.why
    for date in GOOD:
        assert verify_published(job.output.uri, job.name, date)["rows"] == NUM_ROWS
    assert found.spent_usd == pytest.approx(sum(outcome.usd for outcome in found.dates))

    again = backfill(job)
    assert by_date(again) == {**by_date(found), **dict.fromkeys(GOOD, "already_published")}
    assert again.began_at == found.began_at, "the same command goes on with the same backfill"
    assert again.spent_usd == pytest.approx(found.spent_usd, rel=0.5)


def test_what_a_model_cannot_take_is_one_sentence(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ModelError("m.onnx: takes 8 features; expected 7.")

    monkeypatch.setattr("flows.backfills.backfill.run_night", refuses)
    (found,) = backfill(job, last=FIRST).dates
    assert (found.status, found.why) == ("failed", "m.onnx: takes 8 features; expected 7.")
    assert caplog.records == []


def test_a_date_with_files_that_cannot_be_read_is_told_apart(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = UnreadableFile(path="a.parquet", num_bytes=0, version="1", message="0 bytes")
    report = dataclasses.replace(REPORT, date=FIRST, unreadable_files=(empty, empty))
    monkeypatch.setattr("flows.backfills.backfill.run_night", lambda *_, **__: report)
    (found,) = backfill(job, last=FIRST).dates
    assert found.status == "published"
    assert found.why == "2 files cannot be read, `score requeue` once mended"


def test_one_mail_says_what_came_of_a_backfill(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    mails: list[tuple[str, str]] = []
    monkeypatch.setattr("flows.backfills.backfill.notify", lambda _, *words: mails.append(words))
    backfill(job, first=NO_INPUT, last=NO_INPUT)
    assert mails == [], "there was nothing to do"
    backfill(job, first=DAMAGED, last=DAMAGED)
    ((subject, text),) = mails
    assert subject == f"backfill {DAMAGED} to {DAMAGED}: 1 date: 1 not done: failed"
    assert f"{DAMAGED}  not done: failed  {job.input.uri}" in text


def test_an_interruption_is_told_and_the_same_command_goes_on(job: Job) -> None:
    told: list[BackfillSummary] = []

    class Interrupts(LineProgress):
        def start(self, num_rows: int, num_done: int) -> None:
            if self.num_started:
                raise KeyboardInterrupt
            self.num_started += 1
            super().start(num_rows, num_done)

        num_started = 0

    request = BackfillRequest(job=job, first=FIRST, last=LAST)
    with pytest.raises(KeyboardInterrupt):
        run_backfill(request, Interrupts(lambda _: None), told.append)
    (summary,) = told
    assert by_date(summary) == {
        FIRST: "published",
        NO_INPUT: "no_input",
        "2026-11-03": "interrupted",
        DAMAGED: "interrupted",
        LAST: "interrupted",
    }
    assert summary.exit_code == 75
    assert [outcome.why for outcome in summary.dates[2:4]] == [
        "",
        "not begun: 2026-11-03 was interrupted",
    ]
    found = backfill(job)
    assert by_date(found)[FIRST] == "already_published"
    assert [by_date(found)[date] for date in GOOD[1:]] == ["published"] * 2
    assert found.spent_usd > summary.spent_usd


def with_table(job: Job, place: bool | str = True) -> Job:
    return job.model_copy(update={"output": job.output.model_copy(update={"delta": place})})


def dates_in(table: Path) -> list[str]:
    found = deltalake.DeltaTable(table).to_pyarrow_table(columns=["dt"])["dt"]
    return sorted(str(date) for date in set(found.to_pylist()))


def test_dates_that_were_published_before_are_brought_into_the_delta_table(job: Job) -> None:
    backfill(job, last="2026-11-03")
    job = with_table(job)
    backfill(job, first=LAST)
    table = Path(job.output.uri, job.name)
    assert by_date(backfill(job, dry_run=True))[FIRST] == "already_published"
    assert dates_in(table) == [LAST]
    lines: list[str] = []
    request = BackfillRequest(job=job, first=FIRST, last=LAST)
    found = run_backfill(request, LineProgress(lines.append))
    assert [by_date(found)[date] for date in GOOD] == ["already_published"] * 3
    assert [line for line in lines if "Delta" in line] == [
        f"{date}: now in the Delta table, too" for date in GOOD[:2]
    ]
    assert dates_in(table) == GOOD
    version = deltalake.DeltaTable(table).version()
    backfill(job)
    assert deltalake.DeltaTable(table).version() == version


@pytest.mark.parametrize("is_scored_now", [True, False])
def test_a_published_date_that_the_delta_table_does_not_get_is_told(
    job: Job, tmp_path: Path, is_scored_now: bool
) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / f"dt={FIRST}").write_text("a file where a folder should be")
    if not is_scored_now:
        backfill(job, last=FIRST)
    job = with_table(job, str(lake))
    found = backfill(job, last=FIRST)
    assert (by_date(found), found.exit_code) == ({FIRST: "interrupted"}, 75)
    assert "The date is published, and the same command commits it" in found.dates[0].why
    (lake / f"dt={FIRST}").unlink()
    assert by_date(backfill(job, last=FIRST)) == {FIRST: "already_published"}
    assert dates_in(lake) == [FIRST]


def test_a_date_that_does_not_fit_the_delta_table_does_not_keep_others_out(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    backfill(job, last="2026-11-03")
    tried: list[str] = []

    def refuse_first(_job: Job, _output: Storage, date: str) -> bool:
        tried.append(date)
        if date == FIRST:
            raise StorageError("column `x` is int64; expected string.")
        return False

    monkeypatch.setattr("flows.backfills.backfill.update_table", refuse_first)
    found = backfill(with_table(job), last="2026-11-03")
    assert tried == GOOD[:2]
    assert [outcome.status for outcome in found.dates] == [
        "failed",
        "no_input",
        "already_published",
    ]
    assert (found.exit_code, found.dates[0].why) == (1, "column `x` is int64; expected string.")


def test_a_date_for_which_too_little_is_left_is_not_begun_nor_any_after_it(job: Job) -> None:
    first = backfill(job, last=FIRST)
    assert by_date(first) == {FIRST: "published"}
    found = backfill(job, max_usd=first.spent_usd / 1e6)
    assert by_date(found) == {
        FIRST: "already_published",
        NO_INPUT: "no_input",
        **dict.fromkeys(DATES[2:], "cost_cap"),
    }
    assert (found.exit_code, found.spent_usd) == (3, 0), "the first date was not this period's"
    whys = [outcome.why for outcome in found.dates[2:]]
    assert whys[0].startswith("about $")
    assert whys[0].endswith("are spent")
    assert whys[1:] == ["after 2026-11-03, for which too little is left"] * 2
    runs = Path(job.output.uri, job.name, "_runs")
    assert {path.name[:10] for path in runs.iterdir()} == {FIRST}


def test_without_a_forecast_the_cap_stops_the_date_itself(job: Job) -> None:
    costly = job.model_copy(update={"cost": job.cost.model_copy(update={"usd_per_hour": 3.6e9})})
    found = backfill(costly, max_usd=1.0)
    assert by_date(found)[FIRST] == "cost_cap"
    assert set(by_date(found).values()) == {"cost_cap", "no_input"}
    assert "expected to spend at most $1.00" in found.dates[0].why
    assert found.spent_usd > 1


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(job: Job) -> None:
    found = backfill(job, dry_run=True)
    assert by_date(found) == {
        **dict.fromkeys(GOOD, "to_do"),
        NO_INPUT: "no_input",
        DAMAGED: "failed",
    }
    assert (found.exit_code, found.status) == (0, "planned")
    assert found.dates[0].why == "no night to forecast from yet"
    assert not Path(job.output.uri).exists()
    backfill(job, last=FIRST)
    found = backfill(job, dry_run=True, max_usd=1e-12)
    assert [outcome.status for outcome in found.dates] == [
        "already_published",
        "no_input",
        "cost_cap",
        "cost_cap",
        "cost_cap",
    ]


def test_dates_that_are_scored_at_once_share_the_machine_and_its_price(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None)
    lines: list[str] = []
    request = BackfillRequest(job=job, first=FIRST, last=LAST, concurrency=2)
    found = run_backfill(request, LineProgress(lines.append))
    assert [by_date(found)[date] for date in GOOD] == ["published"] * 3
    assert f"{FIRST}: scoring 1,000 of 1,000 rows" in lines
    for outcome in found.dates:
        if outcome.status == "published":
            expected = outcome.wall_s * 0.085 / 3600 / 2
            assert outcome.usd == pytest.approx(expected, rel=1e-6)
    history = read_history(open_storage(job.output.uri), job.name)
    assert [row.machine_share for row in history] == [0.5] * 3


def test_a_backfill_begins_no_date_while_a_night_is_at_work(job: Job) -> None:
    began = datetime.datetime.now()
    waited: list[float] = []

    class Watches(LineProgress):
        def say(self, text: str) -> None:
            if text.startswith(FIRST):
                waited.append((datetime.datetime.now() - began).total_seconds())
            if "goes first" in text:
                night.__exit__(None, None, None)

    night = at_work(job)
    night.__enter__()
    request = BackfillRequest(job=job, first=FIRST, last=FIRST)
    found = run_backfill(request, Watches(lambda _: None))
    assert by_date(found) == {FIRST: "published"}
    assert len(waited) == 1


def end_if_waited_for(night: AbstractContextManager[None], line: str) -> None:
    """End a night `NIGHT_S` seconds after a line says that a date waits for it."""
    if "goes first" in line:
        threading.Timer(NIGHT_S, night.__exit__, (None, None, None)).start()


def seconds_of(job: Job, date: str, observer: LineProgress) -> tuple[DateOutcome, float]:
    """What came of a date whose every second costs a dollar, and how long that took."""
    dollar_a_second = job.cost.model_copy(update={"usd_per_hour": 3_600.0})
    began = time.monotonic()
    request = BackfillRequest(
        job=job.model_copy(update={"cost": dollar_a_second}), first=date, last=date
    )
    (outcome,) = run_backfill(request, observer).dates
    return outcome, time.monotonic() - began


def test_what_a_date_took_and_cost_is_without_a_night_that_came_between(job: Job) -> None:
    night = at_work(job)

    def hear(line: str) -> None:
        if line.startswith("scoring"):
            night.__enter__()
        end_if_waited_for(night, line)

    outcome, took_s = seconds_of(job, FIRST, LineProgress(hear))
    assert outcome.status == "published"
    assert outcome.wall_s is not None
    assert NIGHT_S < took_s
    assert 0 < outcome.wall_s < took_s - NIGHT_S
    assert outcome.usd == pytest.approx(outcome.wall_s)


def test_a_date_that_fails_does_not_pay_for_waiting_either(job: Job) -> None:
    night = at_work(job)
    night.__enter__()
    observer = LineProgress(lambda line: end_if_waited_for(night, line))
    outcome, took_s = seconds_of(job, DAMAGED, observer)
    assert outcome.status == "failed"
    assert 0 < outcome.usd < took_s - NIGHT_S
