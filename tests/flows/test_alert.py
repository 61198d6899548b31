"""What `score/alert` tells, and about which runs it says nothing."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import StateType

from flows import alert as module

JOB = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
RUN = f"prefect.flow-run.{uuid.uuid4()}"


@pytest.fixture
def mails(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Subjects that would have been mailed."""
    sent: list[str] = []
    monkeypatch.setattr(module, "mail_warning", lambda *words: sent.append(words[2]))
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("alert"))
    return sent


def tell(monkeypatch: pytest.MonkeyPatch, state: StateType, date: str = "2026-11-20") -> None:
    """Tell about a silent run that the server has in this state."""
    found = SimpleNamespace(
        parameters={"job": JOB, "date": date}, expected_start_time=None, state_type=state
    )
    monkeypatch.setattr(module, "_read", lambda run: {RUN: found}[run])
    module.alert.fn(JOB, "a night has gone silent", "Start a worker.", RUN)


@pytest.mark.parametrize("state", [StateType.COMPLETED, StateType.FAILED])
def test_a_run_that_has_ended_by_itself_is_not_told(
    state: StateType,
    mails: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "alert")
    tell(monkeypatch, state)
    assert mails == []
    assert caplog.messages == ["demo: a night has gone silent: 2026-11-20? No: it has ended."]


@pytest.mark.parametrize("state", [StateType.RUNNING, StateType.CRASHED, StateType.CANCELLED])
def test_any_other_run_is_told_with_its_date(
    state: StateType, mails: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has marked a silent one as crashed by then, and a skipped one was cancelled."""
    tell(monkeypatch, state)
    tell(monkeypatch, state, "2026-11-21")
    assert mails == [f"a night has gone silent: 2026-11-{day}" for day in (20, 21)]


def test_a_server_that_does_not_know_the_run_costs_its_date_and_no_alarm(
    mails: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: str) -> Any:
        raise LookupError

    monkeypatch.setattr(module, "_read", unknown)
    module.alert.fn(JOB, "a night has gone silent", "Start a worker.", RUN)
    assert mails == ["a night has gone silent"]
