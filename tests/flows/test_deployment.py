"""`score deploy` refuses what cannot work, and says the same as prefect.yaml."""

from __future__ import annotations

import asyncio
import datetime
import uuid
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from prefect.exceptions import ObjectNotFound
from rich.console import Console

from flows import deployment
from flows.alarms import alarms
from flows.deployment import Wanted, deploy, render_deployment
from pipeline.errors import ConfigError
from pipeline.job_file import load_job

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "configs" / "demo.yaml")


KINDS = list(deployment.ENTRYPOINTS)


@pytest.fixture
def from_file() -> dict[str, dict[str, Any]]:
    """The deployments of prefect.yaml, by their names."""
    found = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    return {entry["name"]: entry for entry in found}


def flow_of(kind: str) -> Any:
    module, _, name = deployment.ENTRYPOINTS[kind].rpartition(".")
    return getattr(import_module(module), name)


def test_without_a_server_address_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigError, match="prefect server start"):
        deploy(Wanted(job=JOB))


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")


@pytest.mark.usefixtures("nobody_answers")
@pytest.mark.parametrize("cron", ["every night", "61 0 * * *", "30 0 * *", "", "0 0 30 2 *"])
def test_a_wrong_schedule_is_refused_before_the_server_is_asked(cron: str) -> None:
    with pytest.raises(ConfigError, match="--cron"):
        deploy(Wanted(job=JOB, cron=cron))


@pytest.mark.usefixtures("nobody_answers")
@pytest.mark.parametrize("cron", ["*/5 * * * * *", "30 0 * * * 0", "0 0 * * * * 2026"])
def test_a_schedule_with_seconds_or_years_is_refused(cron: str) -> None:
    with pytest.raises(ConfigError, match=r"[67] fields; expected five"):
        deploy(Wanted(job=JOB, cron=cron))


@pytest.mark.usefixtures("nobody_answers")
@pytest.mark.parametrize("timezone", ["Mars/Olympus", "../etc", "Europe"])
def test_a_wrong_time_zone_is_refused_before_the_server_is_asked(timezone: str) -> None:
    with pytest.raises(ConfigError, match="--timezone"):
        deploy(Wanted(job=JOB, timezone=timezone))


@pytest.mark.usefixtures("nobody_answers")
@pytest.mark.parametrize("prefix", ["a/b", "!a-", "a*", "{{ a }}", "a%"])
def test_a_prefix_that_is_no_name_is_refused_before_the_server_is_asked(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--prefix"):
        deploy(Wanted(job=JOB, prefix=prefix))


def test_what_was_registered_is_shown_with_the_next_commands() -> None:
    facts = {
        "deployments": {"score/nightly": "0", "score/backfill": "1"},
        "job": "/jobs/[a].yaml",
        "cron": "30 0 * * *",
        "timezone": "UTC",
        "work_pool": "nightscore",
        "replaces": "/jobs/old.yaml",
        "next_night": None,
        "next": ["prefect worker start --pool nightscore"],
    }
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_deployment(facts))
    shown = captured.get()
    assert "/jobs/[a].yaml" in shown, "a path is no markup"
    assert "score/nightly, score/backfill" in shown
    assert "/jobs/old.yaml" in shown
    assert "none planned by the server" in shown
    assert "prefect worker start --pool nightscore" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_an_entrypoint_is_a_flow_in_an_installed_module(kind: str) -> None:
    flow = flow_of(kind)
    assert flow.name == "score"
    assert deployment.ENTRYPOINTS[kind] == f"{flow.fn.__module__}.{flow.fn.__name__}"


@pytest.mark.parametrize("kind", KINDS)
def test_prefect_yaml_registers_what_score_deploy_registers(
    kind: str, from_file: dict[str, dict[str, Any]]
) -> None:
    assert list(from_file) == KINDS
    entry = from_file[kind]
    assert entry["entrypoint"] == deployment.ENTRYPOINTS[kind]
    assert entry["description"] == deployment.DESCRIPTIONS[kind]
    assert entry["tags"] == [deployment.TAG, kind]
    assert entry.get("concurrency_limit") == deployment.CONCURRENCY.get(kind)
    assert entry["work_pool"]["name"] == Wanted(job=JOB).pool
    assert entry["work_pool"]["job_variables"]["env"] == deployment.ENVIRONMENT


def test_prefect_yaml_has_the_alarms_of_score_deploy(from_file: dict[str, dict[str, Any]]) -> None:
    (schedule,) = from_file["nightly"]["schedules"]
    assert schedule["cron"] == Wanted(job=JOB).cron
    assert from_file["alert"]["triggers"] == list(alarms("nightly", gap_s=86_400))


@pytest.mark.parametrize("kind", KINDS)
def test_prefect_yaml_names_a_job_and_parameters_that_the_flow_takes(
    kind: str, from_file: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parameters = from_file[kind]["parameters"]
    assert load_job(parameters["job"]).name == "demo"
    period = {"first": "2026-11-01", "last": "2026-11-02"} if kind == "backfill" else {}
    flow_of(kind).validate_parameters({**parameters, **period})


def test_prefect_yaml_counts_days_in_the_time_zone_of_its_schedule(
    from_file: dict[str, dict[str, Any]],
) -> None:
    (schedule,) = from_file["nightly"]["schedules"]
    assert schedule["timezone"] == from_file["nightly"]["parameters"]["timezone"]


def test_a_second_night_is_cancelled_and_a_second_backfill_waits() -> None:
    strategies = {
        kind: limit["collision_strategy"] for kind, limit in deployment.CONCURRENCY.items()
    }
    assert strategies == {"nightly": "CANCEL_NEW", "backfill": "ENQUEUE"}
    assert {limit["limit"] for limit in deployment.CONCURRENCY.values()} == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_person_can_fill_in_the_form_of_every_deployment(kind: str) -> None:
    schema = flow_of(kind).parameters.model_dump()
    for name, entry in schema["properties"].items():
        assert entry.get("description"), name
    dates = [name for name in schema["properties"] if name in ("date", "first", "last")]
    for name in dates:
        kinds = schema["properties"][name]
        assert "date" in {each.get("format") for each in (kinds, *kinds.get("anyOf", ()))}


@pytest.mark.usefixtures("nobody_answers")
@pytest.mark.parametrize(("status", "tries"), [(500, 3), (422, 1)])
def test_a_server_that_fails_for_a_moment_is_asked_again(
    status: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    request = httpx.Request("POST", "http://server/api/automations/")
    answer = httpx.Response(status, request=request)
    asked: list[str] = []

    async def register(client: Any) -> str:
        asked.append(client)
        if len(asked) < 3:
            raise PrefectHTTPStatusError("it failed", request=request, response=answer)
        return "id"

    async def ask(with_client: Any) -> Any:
        return await with_client("client")

    monkeypatch.setattr(deployment, "_ask", ask)
    monkeypatch.setattr(deployment, "PAUSES_S", (0.0, 0.0, 0.0))
    with nullcontext() if status == 500 else pytest.raises(ConfigError, match="it failed"):
        with deployment._server_errors():
            assert deployment._patiently(register) == "id"
    assert len(asked) == tries


class FakeServer:
    """Knows the parameters of one deployment, or of none."""

    def __init__(self, **parameters: str) -> None:
        self.parameters = parameters

    async def read_deployment_by_name(self, name: str) -> Any:
        assert name == "score/nightly"
        if not self.parameters:
            raise ObjectNotFound(Exception(name))
        return SimpleNamespace(parameters=self.parameters)


def replaced_by(server: FakeServer) -> str | None:
    client: Any = server
    return asyncio.run(deployment._replaced(client, Wanted(job=JOB)))


def test_another_job_keeps_its_nights(tmp_path: Path) -> None:
    other = tmp_path / "users.yaml"
    other.write_text(Path(JOB).read_text().replace("name: demo", "name: users"))
    with pytest.raises(ConfigError, match=r"scores users \(.*Add `--prefix demo-`"):
        replaced_by(FakeServer(job=str(other)))


def test_a_copy_and_a_file_that_is_not_here_are_replaced_and_named(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(Path(JOB).read_text())
    for old in (str(copy), str(tmp_path / "gone.yaml")):
        assert replaced_by(FakeServer(job=old)) == old


def test_the_same_file_again_and_a_first_deployment_replace_nothing() -> None:
    assert replaced_by(FakeServer(job=JOB)) is None
    assert replaced_by(FakeServer()) is None


def test_a_night_beyond_what_a_server_plans_is_known_from_the_calendar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def asked(*_: Any) -> Any:
        return uuid.uuid4()

    async def make(*_: Any) -> None:
        return None

    monkeypatch.setattr(deployment, "_make_pool", make)
    monkeypatch.setattr(deployment, "_apply", asked)
    monkeypatch.setattr(deployment, "_next_night", lambda *_: pytest.fail("it waits"))
    server: Any = SimpleNamespace(create_automation=make)
    nights = [datetime.datetime(year, 2, 28, 23, 30, tzinfo=datetime.UTC) for year in (2092, 2096)]
    _, first = asyncio.run(deployment._register(server, Wanted(job=JOB), nights))
    assert first == "2092-02-28T23:30:00+00:00"
