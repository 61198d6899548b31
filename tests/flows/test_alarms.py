"""The alarms that the server keeps: when they go off, and what they do."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from flows.alarms import ALLOWED_S, alarms, automations, longest_gap_s, next_nights

DAY_S = 86_400.0
ALERT = uuid.uuid4()


def gap(cron: str, timezone: str = "UTC") -> float:
    return longest_gap_s(asyncio.run(next_nights(cron, timezone)))


@pytest.mark.parametrize(
    ("cron", "days"),
    [("30 0 * * *", 1), ("0 3 * * 1-5", 3), ("0 3 * * 1", 7), ("0 */6 * * *", 0.25)],
)
def test_a_missing_night_is_measured_by_the_longest_gap_of_the_schedule(
    cron: str, days: float
) -> None:
    assert gap(cron) == days * DAY_S


def test_a_monthly_schedule_has_a_gap_of_31_days() -> None:
    assert gap("0 3 1 * *") == 31 * DAY_S


def test_a_night_counts_as_missing_some_hours_after_the_next_one_was_due() -> None:
    (missing,) = [alarm for alarm in alarms("nightly", 3 * DAY_S) if "missing" in alarm["name"]]
    assert missing["within"] == 3 * DAY_S + ALLOWED_S
    assert "78 hours" in missing["parameters"]["subject"]
    assert missing["after"] == missing["expect"], "counted from the last night that was published"


def made(block: uuid.UUID | None = None, name: str = "nightly") -> dict[str, Any]:
    found = automations(alarms(name, DAY_S), ALERT, block)
    return {one.name.rpartition(": ")[2]: one.model_dump(mode="json") for one in found}


def test_every_alarm_belongs_to_the_alert_and_runs_it_with_words_for_a_person() -> None:
    for automation in made().values():
        assert automation["owner_resource"] == f"prefect.deployment.{ALERT}"
        action = automation["actions"][0]
        assert (action["type"], action["deployment_id"]) == ("run-deployment", str(ALERT))
        assert set(action["parameters"]) - {"run"} == {"subject", "text"}


def test_a_night_that_was_skipped_or_is_silent_is_told_with_its_run_which_knows_the_date() -> None:
    told = {name: one["actions"][0]["parameters"] for name, one in made().items()}
    assert [name for name in told if "run" in told[name]] == ["skipped", "silent"]


def test_a_block_is_sent_by_the_server_itself() -> None:
    block = uuid.uuid4()
    found = made(block)
    texts = {
        name: one["actions"][0].get("parameters", {}).get("text") for name, one in found.items()
    }
    sent = {
        name: action
        for name, one in found.items()
        for action in one["actions"]
        if action["type"] == "send-notification"
    }
    assert {action["block_document_id"] for action in sent.values()} == {str(block)}
    assert {name: action["body"] for name, action in sent.items()} == {
        "late": texts["late"],
        "skipped": texts["skipped"],
        "missing": texts["missing"],
        "silent, marked": texts["silent"],
    }
    assert not [a for one in made().values() for a in one["actions"] if "block" in str(a)]


def test_only_a_silent_run_is_given_another_state() -> None:
    states = {
        name: [a["state"] for a in automation["actions"] if a["type"] == "change-flow-run-state"]
        for name, automation in made().items()
    }
    assert states == {"late": [], "skipped": [], "missing": [], "silent": ["CRASHED"]}


def test_a_block_about_a_silent_run_waits_until_the_server_has_marked_it() -> None:
    """It refuses that for a run that has ended, and whose sign of life was overtaken by its end."""
    found = made(uuid.uuid4())
    (mark,) = [a for a in found["silent"]["actions"] if a["type"] == "change-flow-run-state"]
    trigger = found["silent, marked"]["trigger"]
    assert trigger["posture"] == "Reactive"
    assert trigger["match"]["prefect.state-message"] == mark["message"]
    assert trigger["expect"] == [f"prefect.flow-run.{mark['state'].title()}"]


def test_alarms_watch_one_deployment_and_no_other() -> None:
    for automation in made(name="users-nightly").values():
        assert automation["name"].startswith("score/users-nightly: ")
        assert "users-nightly" in str(automation["trigger"]["match_related"])
