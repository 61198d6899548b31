"""Nights and their mails: one mail for each end of a night, and no night ends otherwise for it."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from flows.mailing import server as mail_server
from flows.mailing.mail import mailed, notify, send_report
from flows.mailing.outbox import LEASE_S, Outbox
from pipeline.config import Job
from pipeline.errors import (
    ConfigError,
    GuardError,
    Interrupted,
    MailError,
    StoreUnavailableError,
)
from pipeline.history import write_row
from pipeline.local_storage import LocalStorage
from pipeline.report import RunReport
from pipeline.run import Night as Asked
from pipeline.storage import open_storage
from tests.flows.mail_cases import DATE, REPORT, mail_job, nights
from tests.flows.smtp_servers import HOST, Mailbox, free_port, smtp_server

DEADLINE_S = 5.0


class Night:
    """Scores nothing: what is mailed is what the night says of itself."""

    def __init__(self, folder: Path, box: Mailbox, **mail: object) -> None:
        settings = {"host": HOST, "port": box.port, "security": "none", "deadline_s": DEADLINE_S}
        self.job: Job = mail_job(folder, **{**settings, **mail})
        self.said: list[str] = []

    def publish(self, report: RunReport = REPORT) -> RunReport:
        return mailed(self.ask, self.said.append, lambda: report)

    def ask(self, **how: Any) -> Asked:
        return Asked(job=self.job, date=DATE, **how)

    def fail(self, error: BaseException, **how: Any) -> None:
        def score() -> NoReturn:
            raise error

        with pytest.raises(type(error)) as raised:
            mailed(lambda: self.ask(**how), self.said.append, score)
        assert raised.value is error


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail_server, "FIRST_PAUSE_S", 0.01)


def test_a_published_night_is_mailed_once(tmp_path: Path) -> None:
    with smtp_server() as box:
        night = Night(tmp_path, box, to=["me@example.com", "You <you@example.com>"])
        assert night.publish() is REPORT
        again = dataclasses.replace(REPORT, status="already_published")
        assert night.publish(again) is again
    assert night.said == ["mail: sent to 2 recipients", "mail: was sent before"]
    (envelope,) = box.envelopes
    assert envelope.mail_from == "score@example.com"
    assert envelope.rcpt_tos == ["me@example.com", "you@example.com"]
    (subject,) = box.subjects
    assert subject == (
        "[nightscore] users 2026-11-20: published, 39,992 of 40,000 rows, $0.0104 per 100k, 1 alert"
    )


def test_a_new_version_of_a_date_is_a_new_mail(tmp_path: Path) -> None:
    with smtp_server() as box:
        night = Night(tmp_path, box)
        night.publish()
        night.publish(dataclasses.replace(REPORT, run_id="2026-11-20-ffff"))
    assert len({message["Message-ID"] for message in box.messages}) == 2


def test_the_mail_has_the_last_fourteen_nights(tmp_path: Path) -> None:
    with smtp_server() as box:
        night = Night(tmp_path, box)
        output = open_storage(night.job.output.uri)
        for row in nights(20):
            write_row(output, row)
        night.publish()
    text = box.messages[0].get_body(("plain",)).get_content()  # type: ignore[union-attr]
    assert "THE LAST 14 PUBLISHED NIGHTS" in text
    assert "SINCE THE NIGHT BEFORE (2026-11-19)" in text


def test_when_the_mail_server_is_down_the_night_says_how_to_send_it_later(tmp_path: Path) -> None:
    box = Mailbox(port=free_port())
    night = Night(tmp_path, box, deadline_s=0.3)
    assert night.publish() is REPORT
    (said,) = night.said
    assert said.startswith(f"warning: the mail was not sent: {HOST}:{box.port}: Connection refused")
    assert said.endswith("Send it with `score report JOB --date 2026-11-20 --send`.")
    with smtp_server(box):
        later = Night(tmp_path, box).job  # with as long as a busy machine may take
        assert send_report(later, REPORT) == "sent to 1 recipient"
        assert send_report(later, REPORT) == "was sent before"
    assert len(box.messages) == 1


def test_who_was_refused_for_the_whole_deadline_gets_the_mail_later_and_alone(
    tmp_path: Path,
) -> None:
    you = "you@example.com"
    with smtp_server(Mailbox(recipients={you: ["450 greylisted"] * 99})) as box:
        night = Night(tmp_path, box, to=["me@example.com", you], deadline_s=0.3)
        night.publish()
        assert night.said == [f"mail: sent to 1 recipient; refused for {you} (450 greylisted)"]
        with pytest.raises(MailError, match=f"{you}, the only ones without it: .*450 greylisted"):
            send_report(night.job, REPORT)
        box.recipients.clear()
        later = Night(tmp_path, box, to=["me@example.com", you]).job
        assert send_report(later, REPORT) == f"sent to 1 recipient refused before: {you}"
        assert send_report(later, REPORT) == "was sent before"
    assert [envelope.rcpt_tos for envelope in box.envelopes] == [["me@example.com"], [you]]
    assert len({message["Message-ID"] for message in box.messages}) == 1


def test_a_crash_between_sending_and_noting_it_sends_again_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit  # the process ends here: nothing after it happens

    with smtp_server() as box:
        night = Night(tmp_path, box)
        with monkeypatch.context() as patched:
            patched.setattr(Outbox, "note_sent", die)
            with pytest.raises(SystemExit):
                send_report(night.job, REPORT)
        with pytest.raises(MailError, match="is sending this mail"):  # nobody knows that it died
            send_report(night.job, REPORT)
        (claim,) = tmp_path.glob("out/users/_mail/*/claim-*.json")
        os.utime(claim, (time.time() - LEASE_S - 1,) * 2)
        assert send_report(night.job, REPORT) == "sent to 1 recipient"
        assert send_report(night.job, REPORT) == "was sent before"
    assert len(box.messages) == 2
    assert len({message["Message-ID"] for message in box.messages}) == 1


def test_two_processes_do_not_both_send(tmp_path: Path) -> None:
    with smtp_server() as box:
        night = Night(tmp_path, box)
        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(night.publish) for _ in range(12)]:
                assert future.result() is REPORT
    assert len(box.messages) == 1


@pytest.mark.parametrize(
    ("error", "subject"),
    [
        (GuardError("quarantine", "9 of 10 rows."), "STOPPED by guard quarantine: 9 of 10 rows."),
        (ConfigError("engine.store: gone."), "FAILED: engine.store: gone."),
        (ZeroDivisionError("a bug"), "FAILED: ZeroDivisionError: a bug"),
        (Interrupted("SIGTERM received."), "INTERRUPTED: SIGTERM received."),
        (StoreUnavailableError("s3://x: timed out."), "INTERRUPTED: s3://x: timed out."),
        (KeyboardInterrupt(), "INTERRUPTED: Stopped from outside; committed shards are kept."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_night_that_is_not_published_says_why_once(
    tmp_path: Path, error: BaseException, subject: str
) -> None:
    with smtp_server() as box:
        night = Night(tmp_path, box)
        night.fail(error)
        night.fail(error)  # a machine that restarts the command every minute
    assert box.subjects == [f"[nightscore] users 2026-11-20: {subject}"]
    text = box.messages[0].get_body(("plain",)).get_content()  # type: ignore[union-attr]
    assert "score run JOB --date 2026-11-20" in text


def test_another_command_for_the_date_that_is_stopped_alike_is_another_mail(tmp_path: Path) -> None:
    with smtp_server() as box:
        night = Night(tmp_path, box)
        night.fail(KeyboardInterrupt())
        night.fail(KeyboardInterrupt(), again="all")
        night.fail(KeyboardInterrupt(), again="quarantine")
    texts = [message.get_body(("plain",)).get_content() for message in box.messages]  # type: ignore[union-attr]
    ways_on = [re.findall(r"^go on +(.*?)\r?$", text, re.MULTILINE)[0] for text in texts]
    assert ways_on == [
        "score run JOB --date 2026-11-20",
        "score run JOB --date 2026-11-20 --force",
        "score requeue JOB --date 2026-11-20",
    ]


def test_a_failed_night_whose_mail_fails_too_offers_no_report(tmp_path: Path) -> None:
    night = Night(tmp_path, Mailbox(port=free_port()), deadline_s=0.2)
    night.fail(ConfigError("engine.store: gone."))
    (said,) = night.said
    assert "the mail was not sent" in said
    assert "--send" not in said


def test_secrets_in_what_went_wrong_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSCORE_SMTP_PASSWORD", "correct horse")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "battery staple")
    said = RuntimeError("battery staple at https://me:pass@example.com/x")
    with smtp_server() as box:
        Night(tmp_path, box).fail(said)  # half a login: the mail is not sent, either
        monkeypatch.delenv("NIGHTSCORE_SMTP_PASSWORD")
        Night(tmp_path, box).fail(said)
    assert [subject.partition("FAILED: ")[2] for subject in box.subjects] == [
        "RuntimeError: *** at https://***@example.com/x"
    ]


@pytest.mark.parametrize(
    ("when", "num_published", "num_failed", "num_warned"),
    [(["published"], 1, 0, 0), (["failed"], 0, 1, 0), (["warning"], 1, 0, 1)],
)
def test_only_what_is_wanted_is_mailed(
    tmp_path: Path, when: list[str], num_published: int, num_failed: int, num_warned: int
) -> None:
    """The night was published with an alert, which is a warning as well."""
    with smtp_server() as box:
        night = Night(tmp_path, box, when=when)
        night.publish()
        assert len(box.messages) == num_published
        night.fail(ConfigError("x"))
        assert len(box.messages) == num_published + num_failed
        notify(night.job, "late", "two hours late")
        assert len(box.messages) == num_published + num_failed + num_warned


def test_a_night_without_alerts_is_no_warning(tmp_path: Path) -> None:
    with smtp_server() as box:
        Night(tmp_path, box, when=["warning"]).publish(dataclasses.replace(REPORT, alerts=()))
    assert not box.messages


def test_a_job_without_mail_sends_none_and_is_told_so_when_it_asks(tmp_path: Path) -> None:
    job = mail_job(tmp_path).model_copy(update={"mail": None})
    asked = Asked(job=job, date=DATE)
    assert mailed(lambda: asked, pytest.fail, lambda: REPORT) is REPORT
    notify(job, "late", "two hours late")
    with pytest.raises(ConfigError, match="mail: no such section"):
        send_report(job, REPORT)


def test_a_warning_is_mailed_once_a_day(tmp_path: Path) -> None:
    with smtp_server() as box:
        night = Night(tmp_path, box)
        for _ in range(2):
            notify(night.job, "deadline in danger", "ready at 08:10\nadd a lane")
    assert box.subjects == ["[nightscore] users: deadline in danger"]


def test_a_warning_that_cannot_be_sent_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    night = Night(tmp_path, Mailbox(port=free_port()), deadline_s=0.2)
    notify(night.job, "deadline in danger", "ready at 08:10")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the mail was not sent" in record.message


def test_a_store_that_is_full_does_not_keep_the_mail_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = StoreUnavailableError("out: No space left on device.")

    def create(*_: object) -> NoReturn:
        raise full

    monkeypatch.setattr(LocalStorage, "create", create)
    with smtp_server() as box:
        Night(tmp_path, box).fail(full)
    assert box.subjects == [
        "[nightscore] users 2026-11-20: INTERRUPTED: out: No space left on device."
    ]


def test_a_mail_that_is_sent_and_not_noted_counts_as_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def note_sent(*_: object) -> NoReturn:
        raise StoreUnavailableError("out: No space left on device.")

    monkeypatch.setattr(Outbox, "note_sent", note_sent)
    with smtp_server() as box:
        night = Night(tmp_path, box)
        night.publish()
    assert night.said == ["mail: sent to 1 recipient"]
    assert "may be sent again" in caplog.text


def test_what_hangs_for_longer_than_the_deadline_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.mailing import post as mail_post

    def server_of(_: object) -> NoReturn:
        time.sleep(3)  # a name server, say
        raise MailError("too late")

    monkeypatch.setattr(mail_post, "server_of", server_of)
    monkeypatch.setattr(mail_post, "MARGIN_S", 0.0)
    night = Night(tmp_path, Mailbox(port=1), deadline_s=0.2)
    began = time.monotonic()
    night.publish()
    assert time.monotonic() - began < 2
    assert "not done after 0.2 s" in night.said[0]


def test_an_error_of_our_own_does_not_touch_the_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.mailing import night as mail_night

    broken: Callable[..., NoReturn] = lambda *_: 1 / 0  # type: ignore[assignment,return-value]  # noqa: E731
    monkeypatch.setattr(mail_night, "published_letter", broken)
    with smtp_server() as box:
        night = Night(tmp_path, box)
        assert night.publish() is REPORT
    assert "division by zero" in night.said[0]
