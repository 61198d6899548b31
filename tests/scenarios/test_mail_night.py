"""Whole nights and their mails: the mail server is down, or the night is stopped half-way."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_job
from tests.flows.smtp_servers import (
    HOST,
    PASSWORD,
    USER,
    Mailbox,
    free_port,
    make_certificate,
    smtp_server,
)
from tests.scenarios.features_nights import (
    DATE,
    NUM_ROWS,
    PUBLISHED,
    RESUMABLE,
    SMALL_SHARDS,
    night,
    wait_for_commits,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(700)]


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the mail server, whose login is in the environment."""
    monkeypatch.setenv("NIGHTSCORE_SMTP_USER", USER)
    monkeypatch.setenv("NIGHTSCORE_SMTP_PASSWORD", PASSWORD)
    return make_certificate(tmp_path)


def with_mail(job: Path, box: Mailbox, certificate: Path) -> Path:
    section = {
        "to": ["me@example.com"],
        "from": "nightscore <score@example.com>",
        "host": HOST,
        "port": box.port,
        "ca_file": str(certificate),
    }
    return write_job(job.with_name("mail.yaml"), {**json.loads(job.read_text()), "mail": section})


def test_a_night_is_stopped_and_goes_on_while_the_mail_server_is_down(
    score: Callable[..., Any],
    start_score: Callable[..., Any],
    features_job: Path,
    tmp_path: Path,
    certificate: Path,
) -> None:
    """Two mails: one says that it was stopped; the report is sent when the server is back, once."""
    box = Mailbox(port=free_port())
    job, output = with_mail(features_job, box, certificate), tmp_path / "out"
    command = night(job, output, *SMALL_SHARDS)
    with smtp_server(box, certificate=certificate, login=True):
        stopped = start_score(*command)
        wait_for_commits(stopped, output)
        stopped.signal(signal.SIGTERM)
        assert stopped.end().code == RESUMABLE
    published = score(*command, "--set", "mail.deadline_s=3")
    assert (published.code, published.json["status"]) == (0, "published")
    assert f"`score report JOB --date {DATE} --send`" in published.err
    assert "Connection refused" in published.err
    assert PASSWORD not in published.err
    assert (output / PUBLISHED / "_MANIFEST.json").exists()
    send = ("report", job, "--date", DATE, "--send", "--json", "--set", f"output.uri={output}")
    with smtp_server(box, certificate=certificate, login=True):
        assert score(*send).json["mail"] == "sent to 1 recipient"
        assert score(*send).json["mail"] == "was sent before"
    interrupted, report = box.subjects
    assert interrupted.startswith(f"[nightscore] users {DATE}: INTERRUPTED: ")
    assert f"users {DATE}: published, 39,992 of {NUM_ROWS:,} rows, $" in report
    text = box.messages[1].get_body(("plain",)).get_content()  # type: ignore[union-attr]
    assert "1 interruption" in text
