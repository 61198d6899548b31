"""What is said when a flow run ends badly, and who says it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import hooks
from flows.hooks import cancelled, crashed, failed, mail_warning, speaks_for

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "configs" / "demo.yaml")
RUN: Any = SimpleNamespace(
    id="0123",
    name="lemon-hippogriff",
    parameters={"job": JOB, "date": "2026-11-20"},
    expected_start_time=None,
)
STATE: Any = SimpleNamespace(message="Process exited with status code: -9.")
FLOW: Any = None


@pytest.fixture
def mails(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Warnings that would have been mailed: job, subject and text."""
    sent: list[tuple[str, str, str]] = []
    monkeypatch.setattr(hooks, "_speaking", set())
    monkeypatch.setattr(hooks, "notify", lambda job, *words: sent.append((job.name, *words)))
    monkeypatch.setattr(hooks, "flow_run_logger", lambda *_: logging.getLogger("hooks"))
    return sent


@pytest.mark.parametrize(
    ("hook", "how"), [(failed, "failed"), (crashed, "crashed"), (cancelled, "was cancelled")]
)
def test_the_log_says_what_happened_why_and_how_to_go_on(
    hook: Any, how: str, mails: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    hook(FLOW, RUN, STATE)
    (said,) = caplog.messages
    assert said.startswith(f"demo 2026-11-20 {how}: Process exited with status code: -9.\n")
    assert "prefect flow-run retry 0123" in said
    assert len(mails) == (hook is crashed)


def test_a_backfill_goes_on_by_the_command_for_its_period(
    mails: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    period = {"job": JOB, "first": "2026-11-01", "last": "2026-11-20"}
    crashed(FLOW, SimpleNamespace(**{**vars(RUN), "parameters": period}), STATE)
    (said,) = caplog.messages
    assert said.startswith("demo backfill 2026-11-01 to 2026-11-20 crashed: ")
    assert "`score backfill` with the job and the period" in said
    assert "score run" not in said
    assert [text for *_, text in mails] == [said.partition(": ")[2]]


def test_the_worker_mails_for_a_process_that_was_killed(
    mails: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "0123")  # as Prefect 3.8 calls its hooks
    crashed(FLOW, RUN, STATE)
    ((job, subject, text),) = mails
    assert (job, subject) == ("demo", "2026-11-20 crashed")
    assert "Committed shards are kept" in text


def test_a_process_that_could_speak_has_mailed_itself(mails: list[Any]) -> None:
    speaks_for("0123")
    crashed(FLOW, RUN, STATE)
    assert mails == []


def test_a_job_that_cannot_be_read_costs_the_mail_and_no_error(
    mails: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    mail_warning(logging.getLogger("hooks"), "/nowhere/job.yaml", "subject", "text")
    assert mails == []
    assert caplog.messages[0].startswith("no mail: /nowhere/job.yaml")
