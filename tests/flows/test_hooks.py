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
    monkeypatch.setattr(hooks, "notify", lambda job, *words: sent.append((job.name, *words[:2])))
    monkeypatch.setattr(hooks, "flow_run_logger", lambda *_: logging.getLogger("hooks"))
    return sent


@pytest.mark.parametrize(
    ("hook", "how"), [(failed, "failed"), (crashed, "crashed"), (cancelled, "was cancelled")]
)
def test_the_log_says_what_happened_why_and_how_to_go_on(
    hook: Any, how: str, mails: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    if hook is failed:
        speaks_for("0123")
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


@pytest.mark.parametrize(
    ("parameters", "message", "subject", "command"),
    [
        ({"timezone": "Mars/X"}, "ConfigError: timezone Mars/X", "Mars/X failed", "score run"),
        ({"date": "tomorrow"}, "ParameterTypeError: date: ", "tomorrow failed", "score run"),
        (
            {"first": "2026-11-20", "last": "2026-11-01"},
            "ConfigError: --from",
            "backfill 2026-11-20 to 2026-11-01 failed",
            "score backfill",
        ),
    ],
)
def test_a_run_that_failed_before_it_could_speak_is_mailed_and_not_to_be_tried_again(
    parameters: dict[str, str], message: str, subject: str, command: str, mails: list[Any]
) -> None:
    run = SimpleNamespace(**{**vars(RUN), "parameters": {"job": JOB, **parameters}})
    failed(FLOW, run, SimpleNamespace(message=message))
    ((job, said, text),) = mails
    assert (job, said) == ("demo", subject)
    assert text.startswith(message)
    assert f"`{command}`" in text
    assert "retry" not in text


def test_a_job_that_is_wrong_elsewhere_sends_its_mail(mails: list[Any], tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    mail = "mail: {to: [a@x.org], from: b@x.org, host: x.org}"
    job.write_text(f"name: users\noutput: {{uri: out}}\n{mail}\nlimits: {{min_row: 10}}\n")
    mail_warning(logging.getLogger("hooks"), str(job), "subject", "text")
    assert mails == [("users", "subject", "text")]


def test_a_job_that_cannot_be_read_costs_the_mail_and_no_error(
    mails: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    mail_warning(logging.getLogger("hooks"), "/nowhere/job.yaml", "subject", "text")
    assert mails == []
    assert caplog.messages[0].startswith("no mail: /nowhere/job.yaml")
