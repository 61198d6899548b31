"""The mail about a night, and warnings: sent after the night has ended, and never in its way.

The command line and the Prefect flow both score a date inside `mailed`. Whatever is wrong with the
mail is a warning in the log; the night ends as it would have. `score report JOB --date D --send`
sends later what could not be sent; see outbox.py for what keeps it from coming twice.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from engines.masking import masked
from pipeline.config import Job, MailSection
from pipeline.errors import ConfigError, PipelineError, one_line

if TYPE_CHECKING:
    from flows.mailing.letter import Letter
    from pipeline.history import HistoryRow
    from pipeline.report import RunReport
    from pipeline.run import Night
    from pipeline.storage import Storage

log = logging.getLogger(__name__)

LAST_WORDS_S = 5.0
"""When the machine is being taken away: some clouds give half a minute, most of it for shards."""


def mailed(
    ask: Callable[[], Night], say: Callable[[str], None], score: Callable[[], RunReport]
) -> RunReport:
    """Score a date and mail how it ended.

    A date that is already published is mailed too, if it has not been: whoever published it may
    have died before the mail.

    Args:
        ask: Says what is to be scored, when that has ended: to import it takes a while. A job
            without a `mail` section sends nothing.
        say: Is told what became of the mail.
        score: Scores the date.

    Returns:
        What `score` returns; what it raises is raised.
    """
    try:
        report = score()
    except BaseException as error:
        night = ask()
        if _wants(night.job, "failed"):
            _, said = _outcome(partial(_send_stopped, night, error))
            say(said)
        raise
    job = ask().job
    if _wants(job, "published") or (report.alerts and _wants(job, "warning")):
        is_sent, said = _outcome(partial(send_report, job, report))
        later = f" Send it with `score report JOB --date {report.date} --send`."
        say(said if is_sent else said + later)
    return report


def send_report(job: Job, report: RunReport) -> str:
    """Send the mail about a published date, unless it was sent.

    Args:
        job: The job, with a `mail` section.
        report: Of the date.

    Returns:
        What became of it, in a few words.

    Raises:
        ConfigError: The job has no `mail` section.
        MailError: It was not sent; a later call may do it.
    """
    from flows.mailing.night import published_letter
    from flows.mailing.post import Mail, post

    def write(output: Storage | None) -> Letter:
        return published_letter(report, _history(output, job, report.date))

    section = _section(job)
    name = _name(job, report.date, "published", report.run_id)
    return post(job, Mail(name=name, write=write, deadline_s=section.deadline_s))


def send_facts(job: Job, report: RunReport) -> dict[str, str]:
    """For `score report --send`: what became of the mail about a date; raises as `send_report`."""
    said = send_report(job, report)
    return {"job": job.name, "date": report.date, "run_id": report.run_id, "mail": said}


def render_sent(facts: dict[str, str]) -> str:
    """One line."""
    return f"{facts['date']}: mail {facts['mail']}"


def notify(job: Job, subject: str, text: str, when: Sequence[str] = ("warning",)) -> None:
    """Mail a warning, once a day; it never raises, and without a `mail` section it does nothing.

    Blocks for `mail.deadline_s` at most: while rows are scored, call it from a thread of its own.

    Args:
        job: The job.
        subject: Some words.
        text: Sentences, one a line; `name  value`, with two spaces between, is a line of a table.
        when: As which of `mail.when` it counts.
    """
    if any(_wants(job, kind) for kind in when):
        is_sent, said = _outcome(partial(_send_warning, job, masked(subject), masked(text)))
        log.log(logging.INFO if is_sent else logging.WARNING, "%s: %s", job.name, said)


def _send_warning(job: Job, subject: str, text: str) -> str:
    from flows.mailing.night import warning_letter
    from flows.mailing.post import Mail, post

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    letter = warning_letter(job.name, subject, text)
    name = _name(job, today, "warning", f"{subject}\n{text}")
    return post(job, Mail(name=name, write=lambda _: letter, deadline_s=_section(job).deadline_s))


def _send_stopped(night: Night, error: BaseException) -> str:
    """One mail for a command and a reason: one that is restarted every minute sends no more."""
    from flows.mailing.night import Stop, stopped_letter
    from flows.mailing.post import Mail, post

    job, date = night.job, night.date
    deadline_s = _section(job).deadline_s
    if isinstance(error, PipelineError):
        said = str(error)
    elif isinstance(error, Exception):
        said = masked(f"{type(error).__name__}: {one_line(error)}")
    else:
        said = "Stopped from outside; committed shards are kept."
        deadline_s = min(LAST_WORDS_S, deadline_s)

    def write(output: Storage | None) -> Letter:
        stop = Stop(error=error, said=said, is_published=_is_published(output, job, date))
        return stopped_letter(night, stop, _history(output, job, date))

    name = _name(job, date, "stopped", f"{night.command}\n{said}")
    return post(job, Mail(name=name, write=write, deadline_s=deadline_s))


def _section(job: Job) -> MailSection:
    if job.mail is None:
        raise ConfigError(
            "mail: no such section in the job file; expected one. Add `mail:` with `to`, `from` "
            "and `host`."
        )
    return job.mail


def _wants(job: Job, kind: str) -> bool:
    return job.mail is not None and kind in job.mail.when


def _outcome(send: Callable[[], str]) -> tuple[bool, str]:
    """Whether a mail is on its way, in words; nothing that is wrong with it gets out of here."""
    try:
        return True, f"mail: {send()}"
    except Exception as error:
        return False, f"warning: the mail was not sent: {masked(one_line(error))}"


def _name(job: Job, date: str, kind: str, about: str) -> str:
    """Id of a mail; the output is part of it, as two of them may be of equal runs."""
    digest = hashlib.sha256("\n".join((job.output.uri, job.name, date, about)).encode())
    return f"{date}-{kind}-{digest.hexdigest()[:16]}"


def _is_published(output: Storage | None, job: Job, date: str) -> bool:
    from pipeline.versions import find_published

    with suppress(PipelineError, OSError):
        return output is not None and find_published(output, job.name, date) is not None
    return False


def _history(output: Storage | None, job: Job, date: str) -> Sequence[HistoryRow]:
    from flows.mailing.history import NIGHTS
    from pipeline.history import read_history

    if output is None:
        return ()
    try:
        return read_history(output, job.name, until=date, last=NIGHTS)
    except (PipelineError, OSError) as error:  # a mail without it is better than none
        log.warning("%s: the mail has no history (%s).", job.name, error)
        return ()
