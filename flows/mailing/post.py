"""One mail on its way: claimed, written, handed over, noted; all within a deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from flows.mailing.letter import Letter
from flows.mailing.message import compose, message_id_of, recipients_of
from flows.mailing.outbox import Outbox
from flows.mailing.server import MailServer, deliver, server_of
from pipeline.config import Job, MailSection
from pipeline.errors import MailError, PipelineError
from pipeline.report_words import plural
from pipeline.storage import Storage, open_storage

log = logging.getLogger(__name__)

MARGIN_S = 2.0
"""Beyond the deadline, for the answer to the last try and for the note about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mail:
    """What is to be sent."""

    name: str
    """The same for the same mail, however often it is asked for; a file name."""
    write: Callable[[Storage | None], Letter]
    """Is given the job's output, or None when that is out of reach."""
    deadline_s: float


def post(job: Job, mail: Mail) -> str:
    """Send a mail, unless it was sent.

    Args:
        job: Whose; it has a `mail` section.
        mail: What.

    Returns:
        What became of it, in a few words.

    Raises:
        MailError: It was not sent, or is being sent by somebody else.
    """
    result: Future[str] = Future()

    def work() -> None:
        try:
            result.set_result(_post(job, mail))
        except BaseException as error:
            result.set_exception(error)

    # A thread that nobody waits for: a name server or a store may take longer to answer.
    threading.Thread(target=work, name="mail", daemon=True).start()
    try:
        return result.result(mail.deadline_s + MARGIN_S)
    except TimeoutError:
        raise MailError(
            f"mail: not done after {mail.deadline_s:g} s; expected an answer by then. Look at the "
            "mail server and at the store."
        ) from None


def _post(job: Job, mail: Mail) -> str:
    deadline = time.monotonic() + mail.deadline_s
    section = job.mail
    assert section is not None, "the caller looked"
    server, everybody = server_of(section), tuple(recipients_of(section))
    try:
        output = open_storage(job.output.uri)
        outbox = Outbox(output, job.name, mail.name)
        if not outbox.waiting(everybody):
            return "was sent before"
        claim = outbox.claim()
    except MailError:
        raise
    except (PipelineError, OSError) as error:
        log.warning("%s: the mail is sent without a note (%s).", job.name, error)
        return _hand_over(section, server, mail, everybody, None, deadline)[0]
    try:
        to = outbox.waiting(everybody)
        if not to:  # whoever gave the claim up or let it expire has sent it
            return "was sent before"
        said, refused = _hand_over(section, server, mail, to, output, deadline)
    except BaseException:
        with suppress(PipelineError, OSError):  # it expires
            outbox.release(claim)
        raise
    try:
        outbox.note_sent(message_id_of(section, mail.name), to, refused)
        if refused:  # the next command may try them at once
            outbox.release(claim)
    except (PipelineError, OSError) as error:
        log.warning("%s: the mail is sent, and may be sent again (%s).", job.name, error)
    return said


def _hand_over(
    section: MailSection,
    server: MailServer,
    mail: Mail,
    to: Sequence[str],
    output: Storage | None,
    deadline: float,
) -> tuple[str, dict[str, str]]:
    """What to say, and who was refused."""
    message = compose(mail.write(output), section, message_id_of(section, mail.name))
    is_rest = len(to) < len(section.to)
    try:
        refused = deliver(server, message, to, deadline - time.monotonic())
    except MailError as error:
        if not is_rest:
            raise
        raise MailError(f"{', '.join(to)}, the only ones without it: {error}") from None
    got = [who for who in to if who not in refused]
    said = f"sent to {plural(len(got), 'recipient')}"
    if is_rest:
        said += f" refused before: {', '.join(got)}"
    if refused:
        said += f"; refused for {', '.join(f'{who} ({why})' for who, why in refused.items())}"
    return said, refused
