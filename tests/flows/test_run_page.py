"""The page of a run in Prefect: a bar and lines at a human pace, which never stop a night."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flows import run_page
from flows.run_page import DEADLINE_EVENT, PageProgress, artifact_key, warn_of_deadline
from pipeline.report import StageTimes

TITLE = "my_job 2026-11-20"
BAR = object()


class Clock:
    """`time.monotonic`, moved by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(run_page, "time", made)
    return made


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """What the artifact showed: per cent and description."""
    shown: list[tuple[float, str]] = []

    def create(progress: float, key: str, description: str) -> object:
        assert key == "nightscore-my-job-2026-11-20-progress"
        shown.append((progress, description))
        return BAR

    def update(bar: object, progress: float, description: str) -> None:
        assert bar is BAR
        shown.append((progress, description))

    monkeypatch.setattr(run_page, "create_progress_artifact", create)
    monkeypatch.setattr(run_page, "update_progress_artifact", update)
    monkeypatch.setattr(run_page, "create_markdown_artifact", lambda *_, **__: None)
    monkeypatch.setattr(run_page, "render_markdown", lambda _: "")
    return shown


def written(num_rows: int) -> dict[str, StageTimes]:
    return {"write": StageTimes(busy_s=0, wait_s=0, items=num_rows)}


def test_a_bar_shows_rows_rate_and_end_until_it_is_full(
    bars: list[tuple[float, str]], clock: Clock
) -> None:
    page = PageProgress(TITLE, lambda _: None)
    page.start(num_rows=1_000, num_done=200)
    clock.now += 5
    page.expect("ends 02:10")
    page.update(written(300))
    page.stop()
    page.publish(SimpleNamespace(rows=1_000, examples_per_sec=50.0, status="published"))  # type: ignore[arg-type]
    assert bars == [
        (20.0, f"{TITLE}: 200 of 1,000 rows"),
        (50.0, f"{TITLE}: 500 of 1,000 rows, 60 rows/s, ends 02:10"),
        (100.0, f"{TITLE}: 1,000 of 1,000 rows, 50 rows/s, published"),
    ]


def test_the_bar_moves_at_a_human_pace(bars: list[tuple[float, str]], clock: Clock) -> None:
    page = PageProgress(TITLE, lambda _: None)
    page.start(1_000, 0)
    for step in range(400):  # a minute and more, four times a second
        clock.now += 0.25
        page.update(written(step))
    assert len(bars) == 1 + 100 // 5


def test_a_server_that_is_gone_costs_a_warning(
    bars: list[Any], clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    for name in ("create_progress_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(run_page, name, refuse)
    page = PageProgress(TITLE, lambda _: None)
    page.start(1_000, 0)
    clock.now += 60
    page.update(written(10))
    page.publish(SimpleNamespace(rows=1_000, examples_per_sec=50.0, status="published"))  # type: ignore[arg-type]
    assert bars == []
    assert len(caplog.messages) == 2
    assert "no route to host" in caplog.text


def test_a_page_without_scoring_has_no_bar(bars: list[Any]) -> None:
    report: Any = SimpleNamespace(rows=5, examples_per_sec=1.0, status="already_published")
    PageProgress(TITLE, lambda _: None).publish(report)
    assert bars == []


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("users 2026-11-20", "nightscore-users-2026-11-20"),
        ("a_b 2026-11-20", "nightscore-a-b-2026-11-20"),
    ],
)
def test_keys_have_only_what_prefect_accepts(title: str, key: str) -> None:
    assert artifact_key(title) == key


def test_danger_is_an_event_for_automations(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(
        run_page, "emit_event", lambda *what, payload: events.append((what, payload))
    )
    warn_of_deadline("my_job", TITLE)("two lanes would do")
    (((event, resource), payload),) = events
    assert event == DEADLINE_EVENT
    assert resource["prefect.resource.id"] == "nightscore.job.my_job"
    assert payload == {"text": "two lanes would do"}
