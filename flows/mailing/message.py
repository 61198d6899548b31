"""A letter with addresses: one message, as plain text and as HTML."""

from __future__ import annotations

from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, parseaddr

from flows.mailing.html import render_html
from flows.mailing.letter import Letter
from flows.mailing.text import render_plain
from pipeline.config import MailSection

MAX_LINE_CHARACTERS = 998
"""Of a header: RFC 5322, 2.1.1."""


def message_id_of(mail: MailSection, name: str) -> str:
    """The id of a mail: the same whenever it is sent again, so that a second one can be dropped."""
    return f"<{name}@{parseaddr(mail.sender)[1].rpartition('@')[2]}>"


def recipients_of(mail: MailSection) -> list[str]:
    """Addresses without names."""
    return [parseaddr(each)[1] for each in mail.to]


def compose(letter: Letter, mail: MailSection, message_id: str) -> EmailMessage:
    """The message, both of whose forms say the same."""
    message = EmailMessage(SMTP)
    message["Subject"] = letter.subject
    message["From"] = _address(mail.sender)
    message["To"] = [_address(each) for each in mail.to]
    message["Date"] = formatdate()
    message["Message-ID"] = message_id
    message["Auto-Submitted"] = "auto-generated"  # no answers of people who are on holiday
    message.set_content(render_plain(letter), cte="quoted-printable")
    message.add_alternative(render_html(letter), subtype="html", cte="quoted-printable")
    if letter.subject.isascii():
        # On one line: some programs miss what stands on the next. Encoded words must be folded.
        message.policy = SMTP.clone(max_line_length=MAX_LINE_CHARACTERS)
    return message


def _address(text: str) -> Address:
    name, address = parseaddr(text)
    return Address(display_name=name, addr_spec=address)
