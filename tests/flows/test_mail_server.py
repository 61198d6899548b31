"""A message gets to a real SMTP server encrypted, once, in time, or not at all with a way out."""

from __future__ import annotations

import base64
import socket
import sys
import time
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path

import pytest

from flows.mailing import server as mail_server
from flows.mailing.server import MailServer, deliver, server_of
from pipeline.config import MailSection
from pipeline.errors import MailError
from tests.flows.mail_cases import mail_section
from tests.flows.smtp_servers import (
    HOST,
    PASSWORD,
    USER,
    Mailbox,
    free_port,
    make_certificate,
    smtp_server,
)

TO = ["me@example.com"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail_server, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv(mail_server.USER, raising=False)
    monkeypatch.delenv(mail_server.PASSWORD, raising=False)


def a_message() -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"] = "score@example.com", TO[0]
    message["Subject"], message["Message-ID"] = "Hello", "<1@example.com>"
    message.set_content("text")
    return message


def a_server(box: Mailbox, **changes: object) -> MailServer:
    settings = {"host": HOST, "port": box.port, "security": "none", **changes}
    return MailServer(**settings)  # type: ignore[arg-type]


def login(monkeypatch: pytest.MonkeyPatch, user: str = USER, password: str = PASSWORD) -> None:
    monkeypatch.setenv(mail_server.USER, user)
    monkeypatch.setenv(mail_server.PASSWORD, password)


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_the_login_and_the_message_travel_encrypted(
    security: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login(monkeypatch)
    is_tls = security == "tls"
    with smtp_server(certificate=certificate, implicit_tls=is_tls, login=True) as box:
        section = mail_section(
            host=HOST, port=box.port, security=security, ca_file=str(certificate)
        )
        server = server_of(MailSection.model_validate(section))
        assert deliver(server, a_message(), TO, 5.0) == {}
    (session,) = box.sessions
    assert session.authenticated
    assert is_tls or session.ssl is not None
    assert PASSWORD not in repr(server)


def test_a_certificate_of_an_unknown_authority_is_refused_at_once(certificate: Path) -> None:
    with smtp_server(certificate=certificate) as box:
        with pytest.raises(MailError, match=r"certificate: .*self.signed.*mail\.ca_file"):
            deliver(a_server(box, security="starttls"), a_message(), TO, 60.0)
    assert not box.num_tries


def test_a_certificate_of_another_host_is_refused(tmp_path: Path) -> None:
    other = make_certificate(tmp_path, host="127.0.0.2")
    with smtp_server(certificate=other) as box:
        server = a_server(box, security="starttls", ca_file=str(other))
        with pytest.raises(MailError, match=r"certificate: .*127\.0\.0\.1"):
            deliver(server, a_message(), TO, 60.0)
    assert not box.num_tries


def test_a_server_without_starttls_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    login(monkeypatch)
    with smtp_server() as box:
        section = mail_section(host=HOST, port=box.port)
        with pytest.raises(MailError, match=r"STARTTLS.*Check `mail\.security`"):
            deliver(server_of(MailSection.model_validate(section)), a_message(), TO, 60.0)
    assert not box.num_tries


def test_a_port_that_is_encrypted_from_the_start_is_no_place_for_starttls(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail_server, "ANSWER_S", 0.3)
    with smtp_server(certificate=certificate, implicit_tls=True) as box:
        with pytest.raises(MailError, match=r"expected it to take the mail"):
            deliver(a_server(box, security="starttls"), a_message(), TO, 0.5)


def test_tls_with_a_server_that_begins_in_clear_says_what_to_check() -> None:
    with smtp_server() as box:
        with pytest.raises(MailError, match=r"Check `mail\.security` and `mail\.port`"):
            deliver(a_server(box, security="tls"), a_message(), TO, 60.0)


def test_a_password_never_travels_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    login(monkeypatch)
    with pytest.raises(MailError, match="a login in clear; expected an encrypted connection"):
        server_of(MailSection.model_validate(mail_section(security="none")))


@pytest.mark.parametrize("name", [mail_server.USER, mail_server.PASSWORD])
def test_half_a_login_is_no_login(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "correct horse battery")
    with pytest.raises(MailError, match=f"{name}: set without"):
        server_of(MailSection.model_validate(mail_section()))


def test_a_wrong_password_is_said_once_and_masked(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "not my password"
    login(monkeypatch, password=wrong)
    spelled = base64.b64encode(wrong.encode()).decode()
    refusal = f"535 5.7.8 {{sent}} is wrong, {spelled} too"
    with smtp_server(certificate=certificate, login=True, refusal=refusal) as box:
        section = mail_section(host=HOST, port=box.port, ca_file=str(certificate))
        with pytest.raises(MailError) as raised:
            deliver(server_of(MailSection.model_validate(section)), a_message(), TO, 60.0)
    said = str(raised.value)
    assert "535 5.7.8 *** is wrong, *** too" in said
    assert "Check NIGHTSCORE_SMTP_USER and NIGHTSCORE_SMTP_PASSWORD" in said
    assert wrong not in said
    assert spelled not in said


def test_a_server_that_is_busy_is_asked_again() -> None:
    with smtp_server(Mailbox(answers=["451 later", "421 busy"])) as box:
        assert deliver(a_server(box), a_message(), TO, 10.0) == {}
    assert box.num_tries == 3
    assert len(box.messages) == 1


def test_a_message_that_is_refused_for_good_is_not_offered_again() -> None:
    with smtp_server(Mailbox(answers=["554 spam"])) as box:
        with pytest.raises(MailError, match=r"554 spam; expected it to take the mail"):
            deliver(a_server(box), a_message(), TO, 60.0)
    assert box.num_tries == 1


def test_one_unknown_recipient_keeps_the_mail_from_nobody_else() -> None:
    to = ["gone@example.com", *TO]
    with smtp_server(Mailbox(recipients={"gone@example.com": ["550 unknown"] * 2})) as box:
        assert deliver(a_server(box), a_message(), to, 10.0) == {"gone@example.com": "550 unknown"}
    assert [envelope.rcpt_tos for envelope in box.envelopes] == [TO]


def test_a_recipient_who_is_greylisted_is_asked_again_and_the_others_have_one_mail() -> None:
    to = ["grey@example.com", *TO]
    with smtp_server(Mailbox(recipients={"grey@example.com": ["450 greylisted"] * 2})) as box:
        assert deliver(a_server(box), a_message(), to, 10.0) == {}
    assert [envelope.rcpt_tos for envelope in box.envelopes] == [TO, ["grey@example.com"]]


def test_when_nobody_is_known_it_is_an_error() -> None:
    with smtp_server(Mailbox(recipients={TO[0]: ["550 unknown"]})) as box:
        with pytest.raises(MailError, match=r"550 unknown.*Check `mail\.to`"):
            deliver(a_server(box), a_message(), TO, 60.0)


def test_a_server_that_is_down_is_given_up_at_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(MailError, match=r"Connection refused.*Check `mail\.host`"):
        deliver(a_server(Mailbox(port=free_port())), a_message(), TO, 0.6)
    assert 0.3 < time.monotonic() - began < 3


def test_a_server_that_comes_back_in_time_gets_the_mail() -> None:
    import threading

    box, up = Mailbox(port=free_port()), threading.Event()

    def serve() -> None:
        time.sleep(0.3)
        with smtp_server(box):
            up.wait(20)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert deliver(a_server(box), a_message(), TO, 15.0) == {}
    finally:
        up.set()
        thread.join()
    assert len(box.messages) == 1


def test_a_server_that_never_answers_is_given_up_at_the_deadline() -> None:
    with socket.create_server((HOST, 0)) as silent:
        server = a_server(Mailbox(port=silent.getsockname()[1]))
        began = time.monotonic()
        with pytest.raises(MailError, match="timed out"):
            deliver(server, a_message(), TO, 0.6)
        assert time.monotonic() - began < 5


def test_without_the_extra_a_block_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_email", None)
    section = mail_section(host=None, prefect_block="night")
    with pytest.raises(MailError, match=r"pip install 'nightscore\[mail\]'"):
        server_of(MailSection.model_validate(section))


@pytest.fixture
def a_block(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes Prefect's block `night` a given one: there is no Prefect server here."""
    from prefect_email import EmailServerCredentials

    def make(**fields: object) -> None:
        block = EmailServerCredentials(**fields)
        monkeypatch.setattr(EmailServerCredentials, "load", {"night": block}.__getitem__)

    return make


def server_of_block(name: str = "night") -> MailServer:
    return server_of(MailSection.model_validate(mail_section(host=None, prefect_block=name)))


@pytest.mark.parametrize(
    ("kind", "security", "port"), [("SSL", "tls", 465), ("STARTTLS", "starttls", 587)]
)
def test_a_block_of_prefect_is_a_server_with_its_login(
    a_block: Callable[..., None], kind: str, security: str, port: int
) -> None:
    a_block(username=USER, password=PASSWORD, smtp_server="gmail", smtp_type=kind)
    assert server_of_block() == MailServer(
        host="smtp.gmail.com", port=port, security=security, user=USER, password=PASSWORD
    )


def test_a_block_without_a_login_has_a_port_of_its_own(a_block: Callable[..., None]) -> None:
    a_block(smtp_server="relay.example.com", smtp_type="INSECURE", smtp_port=2525)
    assert server_of_block() == MailServer(host="relay.example.com", port=2525, security="none")


def test_a_block_that_checks_no_certificate_is_refused(a_block: Callable[..., None]) -> None:
    a_block(smtp_server="relay.example.com", verify=False)
    with pytest.raises(MailError, match=r"`verify` is off.*`mail\.ca_file`"):
        server_of_block()


def test_a_block_that_is_not_there_is_named(a_block: Callable[..., None]) -> None:
    a_block()
    with pytest.raises(MailError, match=r"mail\.prefect_block day: .*PREFECT_API_URL"):
        server_of_block("day")
