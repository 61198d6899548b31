"""Real SMTP servers (aiosmtpd) on this machine, and a certificate authority of our own."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "127.0.0.1"
USER, PASSWORD = "nightscore", "correct horse battery"
GREETING_S = 5.0


@dataclass
class Mailbox:
    """What a server took, and how it answers."""

    answers: list[str] = field(default_factory=list)
    """To the next messages, before it takes all."""
    recipients: dict[str, list[str]] = field(default_factory=dict)
    """Answers to an address, the first one first; then it is accepted."""
    messages: list[EmailMessage] = field(default_factory=list)
    envelopes: list[Envelope] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    num_tries: int = 0
    port: int = 0

    async def handle_RCPT(
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: Any
    ) -> str:
        if self.recipients.get(address):
            return self.recipients[address].pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:
        self.num_tries += 1
        if self.answers:
            return self.answers.pop(0)
        assert isinstance(envelope.content, bytes)
        message = message_from_bytes(envelope.content, policy=default)
        assert isinstance(message, EmailMessage)
        self.messages.append(message)
        self.envelopes.append(envelope)
        self.sessions.append(session)
        return "250 OK"

    @property
    def subjects(self) -> list[str]:
        return [str(message["Subject"]) for message in self.messages]


@contextmanager
def smtp_server(
    mailbox: Mailbox | None = None,
    *,
    certificate: Path | None = None,
    implicit_tls: bool = False,
    login: bool = False,
    refusal: str = "535 5.7.8 no",
) -> Iterator[Mailbox]:
    """A server on a free port.

    Args:
        mailbox: Where its mail goes.
        certificate: PEM with key: the server offers STARTTLS and insists on it.
        implicit_tls: Encrypted from the start instead.
        login: It asks for `USER` and `PASSWORD`.
        refusal: Its answer to another login, in which `{sent}` is what it was sent.
    """
    box = mailbox or Mailbox()
    options: dict[str, Any] = {}
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        if not implicit_tls:
            options = {"tls_context": context, "require_starttls": True}

    def check(_server: Any, _session: Any, _envelope: Any, _kind: str, sent: Any) -> AuthResult:
        assert isinstance(sent, LoginPassword)
        if (sent.login, sent.password) == (USER.encode(), PASSWORD.encode()):
            return AuthResult(success=True)
        said = refusal.replace("{sent}", sent.password.decode())
        return AuthResult(success=False, handled=False, message=said)

    if login:
        # aiosmtpd only sees its own STARTTLS, and warns of a login that is asked for without it.
        options |= {"authenticator": check}
        options |= dict.fromkeys(("auth_required", "auth_require_tls"), not implicit_tls)
    server = Controller(
        box,
        hostname=HOST,
        port=box.port or free_port(),
        ready_timeout=GREETING_S,
        ssl_context=context if implicit_tls else None,
        **options,
    )
    server.start()
    box.port = server.port
    try:
        yield box
    finally:
        server.stop()


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    import socket

    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def make_certificate(folder: Path, *, host: str = HOST) -> Path:
    """A PEM with key and certificate of a server at `host`, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mail of a test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(minutes=5),
        not_valid_after=now + datetime.timedelta(hours=1),
    )
    address = x509.IPAddress(ipaddress.ip_address(host))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path = folder / f"{host}.pem"
    path.write_bytes(secret + signed.public_bytes(pem))
    return path
