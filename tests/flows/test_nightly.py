"""The flow: which date a run scores, what its form asks for, and what it hands on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from engines.errors import ModelError
from flows import nightly, run_page
from flows.nightly import may_pass
from pipeline.errors import (
    GUARDS,
    ConfigError,
    GuardError,
    Interrupted,
    LaneError,
    StoreUnavailableError,
    VerifyError,
)
from pipeline.run import Night


def test_the_form_describes_every_parameter_and_asks_only_for_the_job() -> None:
    schema = nightly.score.parameters.model_dump()
    assert schema["required"] == ["job"]
    assert list(schema["properties"]) == ["job", "date", "days_back", "timezone", "accept"]
    assert all(entry.get("description") for entry in schema["properties"].values())
    assert schema["properties"]["days_back"]["minimum"] == 0


def test_importing_the_flow_switches_telemetry_off() -> None:
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_the_form_offers_the_guards_that_there_are() -> None:
    offered = nightly.score.parameters.model_dump()["properties"]["accept"]["items"]["enum"]
    assert tuple(offered) == GUARDS


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailableError("s3: out of reach; expected an answer. Try later."),
        Interrupted("interrupted; the same command goes on."),
        OSError("connection reset"),
        RuntimeError("a defect, or a server that hiccups"),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("job.yaml: wrong."),
        GuardError("quarantine", "too many rows."),
        VerifyError("sums differ."),
        LaneError("its process died 4 times."),
        ModelError("model.onnx: no model."),
    ],
)
def test_what_would_fail_again_is_not(error: Exception) -> None:
    assert not may_pass(error)


@pytest.fixture
def fake_night(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything round the flow's body, and what it was called with."""
    calls: dict[str, Any] = {}

    def run_night(night: Night, observer: Any, map_groups: Any, *, on_warning: Any) -> Any:
        observer.say("building an engine")
        calls.update(job=night.job.path, date=night.date, map_groups=map_groups)
        calls.update(accept=night.accept, on_warning=on_warning)
        return SimpleNamespace(
            rows=12, examples_per_sec=3.0, status="published", manifest="/scores/_MANIFEST.json"
        )

    def mailed(
        ask: Callable[[], Night], say: Callable[[str], None], score: Callable[[], Any]
    ) -> Any:
        say("mail: sent")
        calls["mailed"] = (ask().job.path, ask().date)
        return score()

    def create_artifact(markdown: str, key: str, **_: Any) -> None:
        calls.update(markdown=markdown, key=key)

    replaced: dict[str, Callable[..., Any]] = {
        "load_job": lambda path: SimpleNamespace(
            path=path, name="my_job", lanes=SimpleNamespace(runner="local")
        ),
        "run_night": run_night,
        "mailed": mailed,
        "get_run_logger": lambda: logging.getLogger("night"),
    }
    for name, replacement in replaced.items():
        monkeypatch.setattr(nightly, name, replacement)
    monkeypatch.setattr(run_page, "render_markdown", lambda report: f"# {report.rows} rows")
    monkeypatch.setattr(run_page, "create_markdown_artifact", create_artifact)
    return calls


def test_the_flow_scores_the_date_asked_for_and_returns_its_manifest(
    fake_night: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "night")
    flow = nightly.score.fn
    assert flow("job.yaml", date="2026-11-20", accept=("drift",)) == "/scores/_MANIFEST.json"
    assert fake_night["accept"] == {"drift"}
    assert (fake_night["job"], fake_night["date"]) == ("job.yaml", "2026-11-20")
    assert fake_night["map_groups"].func is nightly.map_as_tasks
    assert fake_night["map_groups"].args == ("my_job 2026-11-20",)
    assert "building an engine" in caplog.messages
    assert fake_night["mailed"] == ("job.yaml", "2026-11-20")
    assert "mail: sent" in caplog.messages


def test_the_artifact_has_a_key_that_prefect_accepts(fake_night: dict[str, Any]) -> None:
    nightly.score.fn("job.yaml", date="2026-11-20")
    assert fake_night["key"] == "nightscore-my-job-2026-11-20"
    assert fake_night["markdown"] == "# 12 rows"


def test_a_date_that_is_none_is_refused(fake_night: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected an ISO date"):
        nightly.score.fn("job.yaml", date="2026-11-31")
    assert not fake_night
