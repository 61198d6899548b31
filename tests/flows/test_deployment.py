"""`score deploy` refuses what cannot work, and says the same as prefect.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flows import deployment, nightly
from flows.deployment import deploy_nightly, render_deployment
from pipeline.errors import ConfigError
from pipeline.job_file import load_job

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "configs" / "demo.yaml")


@pytest.fixture
def from_file() -> dict[str, Any]:
    """The one deployment of prefect.yaml."""
    (found,) = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert isinstance(found, dict)
    return found


def test_without_a_server_address_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigError, match="prefect server start"):
        deploy_nightly(JOB, "30 0 * * *", "UTC", "nightscore")


@pytest.mark.parametrize("cron", ["every night", "61 0 * * *", "30 0 * *", ""])
def test_a_wrong_schedule_is_refused_before_the_server_is_asked(
    monkeypatch: pytest.MonkeyPatch, cron: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(ConfigError, match="--cron"):
        deploy_nightly(JOB, cron, "UTC", "nightscore")


@pytest.mark.parametrize("timezone", ["Mars/Olympus", "../etc"])
def test_a_wrong_time_zone_is_refused_before_the_server_is_asked(
    monkeypatch: pytest.MonkeyPatch, timezone: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(ConfigError, match="--timezone"):
        deploy_nightly(JOB, "30 0 * * *", timezone, "nightscore")


def test_what_was_registered_is_shown_with_the_next_commands() -> None:
    facts = {
        "deployment": "score/nightly",
        "id": "0",
        "job": "/jobs/[a].yaml",
        "cron": "30 0 * * *",
        "timezone": "UTC",
        "work_pool": "nightscore",
        "next": ["prefect worker start --pool nightscore --type process"],
    }
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_deployment(facts))
    shown = captured.get()
    assert "/jobs/[a].yaml" in shown, "a path is no markup"
    assert "prefect worker start --pool nightscore --type process" in shown


def test_the_entrypoint_is_the_flow_as_an_installed_module() -> None:
    module, name = deployment.ENTRYPOINT.rsplit(".", 1)
    assert module == nightly.__name__
    assert getattr(nightly, name) is nightly.score


def test_prefect_yaml_registers_what_score_deploy_registers(from_file: dict[str, Any]) -> None:
    assert f"{nightly.score.name}/{from_file['name']}" == f"score/{deployment.NAME}"
    assert from_file["entrypoint"] == deployment.ENTRYPOINT
    assert from_file["tags"] == deployment.TAGS
    assert from_file["concurrency_limit"] == deployment.CONCURRENCY
    assert from_file["work_pool"]["job_variables"]["env"] == deployment.NO_TELEMETRY


def test_prefect_yaml_names_a_job_and_parameters_that_the_flow_takes(
    from_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert load_job(from_file["parameters"]["job"]).name == "demo"
    nightly.score.validate_parameters(from_file["parameters"])
    (schedule,) = from_file["schedules"]
    assert schedule["timezone"] == from_file["parameters"]["timezone"]
