"""The SMTP server: which one, and how a message gets there in time or not at all.

Encrypted and checked, unless the job says `security: none`; a password never travels in clear.
"""

from __future__ import annotations

import base64
import importlib
import os
import random
import smtplib
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import EmailMessage

from engines.masking import MASK, masked
from pipeline.config import MailSection
from pipeline.errors import MailError
from pipeline.report_words import message as cut
from pipeline.store_errors import why

USER, PASSWORD = "NIGHTSCORE_SMTP_USER", "NIGHTSCORE_SMTP_PASSWORD"
PORTS = {"starttls": 587, "tls": 465, "none": 25}
ANSWER_S = 10.0
"""Seconds that a server may take for one answer."""
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 8.0
SHORTEST_TRY_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class MailServer:
    """Where mail is handed over."""

    host: str
    port: int
    security: str
    """`starttls`, `tls` or `none`."""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None

    def without_secrets(self, text: str) -> str:
        """What a server answered: it may quote what it was sent."""
        for secret in _spellings(self.user or "", self.password):
            text = text.replace(secret, MASK)
        return cut(masked(text))


def server_of(mail: MailSection) -> MailServer:
    """The server of a job, with its login from the environment or from Prefect.

    Raises:
        MailError: A part of the login is missing, or it would travel in clear.
    """
    server = _server_of_block(mail, mail.prefect_block) if mail.prefect_block else _own(mail)
    if (server.user is None) != (server.password is None):
        given, missing = (USER, PASSWORD) if server.user else (PASSWORD, USER)
        raise MailError(f"{given}: set without {missing}; expected both or none. Set {missing}.")
    if server.user and server.security == "none":
        raise MailError(
            f"{server.host}:{server.port}: a login in clear; expected an encrypted connection. "
            f"Set `mail.security` to starttls or tls, or remove {USER} and {PASSWORD}."
        )
    return server


def _own(mail: MailSection) -> MailServer:
    assert mail.host is not None, "checked with the job file"
    return MailServer(
        host=mail.host,
        port=mail.port or PORTS[mail.security],
        security=mail.security,
        user=os.environ.get(USER) or None,
        password=os.environ.get(PASSWORD) or None,
        ca_file=mail.ca_file,
    )


def _server_of_block(mail: MailSection, name: str) -> MailServer:
    try:
        blocks = importlib.import_module("prefect_email")
    except ImportError:
        raise MailError(
            "mail.prefect_block: prefect-email is not installed; expected the extra `mail`. "
            "Run `pip install 'nightscore[mail]'`."
        ) from None
    try:
        block = blocks.EmailServerCredentials.load(name)
    except Exception as error:  # whatever Prefect's client raises: no server, no such block
        raise MailError(
            f"mail.prefect_block {name}: {cut(masked(why(error)))}; expected an "
            "EmailServerCredentials block. Look for it on the Prefect server at PREFECT_API_URL."
        ) from None
    security = {"SSL": "tls", "STARTTLS": "starttls", "INSECURE": "none"}[block.smtp_type.name]
    if not block.verify:
        raise MailError(
            f"mail.prefect_block {name}: `verify` is off; expected a server whose certificate is "
            "checked. Switch it on, and name its authority in `mail.ca_file`."
        )
    return MailServer(
        host=getattr(block.smtp_server, "value", block.smtp_server),
        port=block.smtp_port or block.smtp_type.value,
        security=security,
        user=block.username or None,
        password=block.password.get_secret_value() or None,
        ca_file=mail.ca_file,
    )


def deliver(
    server: MailServer, message: EmailMessage, to: Sequence[str], deadline_s: float
) -> dict[str, str]:
    """Hand a message over; what may be better a moment later is tried again until the deadline.

    Args:
        server: Where.
        message: With the same Message-ID each time: a server whose answer was lost may have it.
        to: Addresses.
        deadline_s: Seconds for all tries together.

    Returns:
        Addresses that were refused, each with the reason; the others have it.

    Raises:
        MailError: No address was accepted.
    """
    deadline = time.monotonic() + deadline_s
    waiting, refused = list(dict.fromkeys(to)), dict[str, str]()
    where = f"{server.host}:{server.port}"
    for timeout_s in _tries(deadline):
        try:
            answers = _try(server, message, waiting, min(timeout_s, ANSWER_S))
        except (OSError, ValueError) as error:  # smtplib's own are OSErrors, too
            said, way_out, is_final = _judge(error)
            refused |= dict.fromkeys(waiting, said)
        else:
            refused = {address: said for address, said in refused.items() if address not in waiting}
            refused |= {address: _text(*answer) for address, answer in answers.items()}
            waiting = [address for address, (code, _) in answers.items() if code < 500]
            said, way_out, is_final = "; ".join(refused.values()), "Check `mail.to`.", not waiting
        if is_final:
            break
    if len(refused) == len(set(to)):
        found = server.without_secrets(said)
        raise MailError(f"{where}: {found}; expected it to take the mail. {way_out}")
    return {address: server.without_secrets(said) for address, said in refused.items()}


def _tries(deadline: float) -> Iterator[float]:
    """Seconds that are left at each try, the first one at once."""
    pause_s, left_s = FIRST_PAUSE_S, deadline - time.monotonic()
    while True:
        yield max(left_s, SHORTEST_TRY_S)
        time.sleep(max(min(pause_s, deadline - time.monotonic()), 0) * random.uniform(0.5, 1.0))
        left_s = deadline - time.monotonic()
        if left_s < SHORTEST_TRY_S:
            return
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _try(
    server: MailServer, message: EmailMessage, to: Sequence[str], timeout_s: float
) -> dict[str, tuple[int, bytes]]:
    """The addresses that the server did not accept, with its answers."""
    context = ssl.create_default_context(cafile=server.ca_file)
    if server.security == "tls":
        smtp: smtplib.SMTP = smtplib.SMTP_SSL(
            server.host, server.port, timeout=timeout_s, context=context
        )
    else:
        smtp = smtplib.SMTP(server.host, server.port, timeout=timeout_s)
    try:
        if server.security == "starttls":
            smtp.starttls(context=context)
        if server.user and server.password:
            smtp.login(server.user, server.password)
        return smtp.send_message(message, to_addrs=to)
    except smtplib.SMTPRecipientsRefused as error:
        return error.recipients
    finally:
        with suppress(OSError):  # the message is there, or it is not: a farewell changes nothing
            smtp.quit()
        smtp.close()


def _judge(error: OSError | ValueError) -> tuple[str, str, bool]:
    """What went wrong, what is to be done, and whether trying again is useless."""
    match error:
        case smtplib.SMTPAuthenticationError():
            said, way_out = (
                _text(error.smtp_code, error.smtp_error),
                f"Check {USER} and {PASSWORD}.",
            )
            return said, way_out, error.smtp_code >= 500
        case smtplib.SMTPResponseException():
            said = _text(error.smtp_code, error.smtp_error)
            return said, "Check `mail.from` and the server's log.", error.smtp_code >= 500
        case smtplib.SMTPNotSupportedError():
            return why(error), "Check `mail.security` and `mail.port`.", True
        case ssl.SSLCertVerificationError():
            way_out = "Name the authority of its certificate in `mail.ca_file`."
            return f"certificate: {error.verify_message}", way_out, True
        case ssl.SSLError():
            return why(error), "Check `mail.security` and `mail.port`.", True
        case FileNotFoundError():
            return f"mail.ca_file: {why(error)}", "Check `mail.ca_file`.", True
        case ValueError():
            return why(error), "Check the addresses and the server's name.", True
    return why(error), "Check `mail.host` and `mail.port`, or wait until it is back.", False


def _text(code: int, said: bytes | str) -> str:
    return f"{code} {said.decode(errors='replace') if isinstance(said, bytes) else said}"


def _spellings(user: str, password: str | None) -> list[str]:
    """A password as it is, and as SMTP sends it."""
    if not password:
        return []
    sent = (password, f"\0{user}\0{password}")
    return [password, *(base64.b64encode(each.encode()).decode() for each in sent)]
