"""What the Prefect server itself watches, while no process of ours may be alive to speak.

Each alarm is an automation that runs `score/alert`. They are written as in prefect.yaml, so that
`score deploy` and `prefect deploy` register the same ones. An alarm that fires because no worker is
there waits for the worker, too: a notification block (`score deploy --notify`) is sent by the
server. When the server is down, only somebody else can notice: infra/prometheus/nightscore.yaml.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.events.schemas.automations import AutomationCore

LATE_S = 600.0
"""From the schedule until a night must have begun."""
SILENT_S = 300.0
HEARTBEAT_S = 30
"""A process that was killed together with its worker sends no sign of life any more. Ten may be
lost on the way before it counts as dead."""
ALLOWED_S = 6 * 3600.0
"""From the schedule until a night must be published."""
SCHEDULES_AHEAD = 60
GONE = "no sign of life"
"""Message of the state that a silent run is given."""
RUN = "{{ event.resource.id }}"
"""The flow run that an alarm is about: filled in by the server."""

Alarm = dict[str, Any]


async def next_nights(cron: str, timezone: str) -> list[datetime.datetime]:
    """When the next nights of a schedule begin; `ValueError` where it is none, or never comes."""
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.server.schemas.schedules import CronSchedule as Calendar

    checked = CronSchedule(cron=cron, timezone=timezone)
    start = datetime.datetime.now(datetime.UTC)
    calendar = Calendar(cron=checked.cron, timezone=timezone)
    return list(await calendar.get_dates(SCHEDULES_AHEAD, start))


def longest_gap_s(nights: Sequence[datetime.datetime]) -> float:
    """The most seconds between two of these nights."""
    gaps = [(after - before).total_seconds() for before, after in pairwise(nights)]
    return max(gaps, default=86_400.0)


def alarms(nightly: str, gap_s: float) -> tuple[Alarm, ...]:
    """The alarms of a deployment, as entries of `triggers` in prefect.yaml.

    Args:
        nightly: Name of the deployment that is watched.
        gap_s: Seconds between two nights, at most.
    """
    run = {
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": {
            "prefect.resource.role": "deployment",
            "prefect.resource.name": nightly,
        },
    }
    hours = round((gap_s + ALLOWED_S) / 3600)
    return (
        {
            "name": f"score/{nightly}: late",
            "description": "A night has not begun: is a worker running?",
            "posture": "Proactive",
            "after": ["prefect.flow-run.Late"],
            "expect": ["prefect.flow-run.Running", "prefect.flow-run.Cancelled"],
            "for_each": ["prefect.resource.id"],
            "within": int(LATE_S),
            **run,
            "parameters": {
                "subject": "the night has not begun",
                "text": f"Ten minutes after its time a run of score/{nightly} is still waiting. "
                "Look whether its worker runs: `prefect worker start --pool ...`.",
            },
        },
        {
            "name": f"score/{nightly}: skipped",
            "description": "A night was cancelled before it began: another one held its place.",
            "posture": "Reactive",
            "expect": ["prefect.flow-run.Cancelled"],
            "match": {**run["match"], "prefect.run-count": "0"},
            "match_related": run["match_related"],
            "parameters": {
                "subject": "a night was skipped",
                "text": f"A run of score/{nightly} was cancelled before it began, as another one "
                "still held its place: it was running, or has been gone for less than five minutes."
                " Unless the other one was for the same date, this one's is not scored: `score run "
                "JOB --date D`, or score/backfill, scores it.",
                "run": RUN,
            },
        },
        {
            "name": f"score/{nightly}: missing",
            "description": "No night was published for longer than the schedule allows.",
            "posture": "Proactive",
            # Counted from the last one. Without `after` the server looks at one period after the
            # other, each of which may have a night although the two are farther apart than it is.
            "after": ["prefect.flow-run.Completed"],
            "expect": ["prefect.flow-run.Completed"],
            "within": hours * 3600,
            **run,
            "parameters": {
                "subject": f"no night was published for {hours} hours",
                "text": f"No run of score/{nightly} has completed. `score status JOB` says which "
                "dates are published, and how far an unfinished one has come.",
            },
        },
        {
            "name": f"score/{nightly}: silent",
            "description": "A run shows no sign of life: its machine or its worker is gone.",
            "posture": "Proactive",
            "after": ["prefect.flow-run.heartbeat"],
            "expect": [
                "prefect.flow-run.heartbeat",
                *(f"prefect.flow-run.{end}" for end in ("Completed", "Failed")),
                *(f"prefect.flow-run.{end}" for end in ("Crashed", "Cancelled")),
            ],
            "for_each": ["prefect.resource.id"],
            "within": int(SILENT_S),
            "match": run["match"],
            # Signs of life name tags and ids only.
            "match_related": {"prefect.resource.id": f"prefect.tag.{nightly}"},
            "parameters": {
                "subject": "a night has gone silent",
                "text": f"A run of score/{nightly} has shown no sign of life for five minutes: its "
                "machine or its worker is gone. Committed shards are kept: `score run JOB --date "
                "D` goes on at once. In Prefect, start a worker, and run the same date again once "
                "the page of this run says Crashed: until then it holds its place, and another one "
                "is cancelled.",
                "run": RUN,
            },
        },
    )


def automations(found: tuple[Alarm, ...], alert: UUID, block: UUID | None) -> list[AutomationCore]:
    """The alarms as automations that the alert's deployment owns: they go and come with it.

    Args:
        found: The alarms.
        alert: Id of the deployment `score/alert`.
        block: A notification block that the server sends itself, besides.
    """
    made = []
    for alarm in found:
        told, trigger = alarm["parameters"], dict(alarm)
        for key in ("name", "description", "parameters"):
            del trigger[key]
        actions = [{"type": "run-deployment", "deployment_id": alert, "parameters": told}]
        said = {"subject": f"{alarm['name']}: {told['subject']}", "body": told["text"]}
        sent = {"type": "send-notification", "block_document_id": block, **said}
        if alarm["name"].endswith(": silent"):
            # Or its page says for ever that it runs.
            actions.append({"type": "change-flow-run-state", "state": "CRASHED", "message": GONE})
            if block is not None:
                marked = {**alarm, "name": f"{alarm['name']}, marked"}
                made.append(_automation(marked, _when_marked(trigger), [sent], alert))
        elif block is not None:
            actions.append(sent)
        made.append(_automation(alarm, trigger, actions, alert))
    return made


def _when_marked(silent: Alarm) -> Alarm:
    """When the server has marked a silent run as crashed: it refuses that for one that has ended.

    The sign of life of a run that ends at once may arrive after its end: to the server it has gone
    silent. `score/alert` looks at the run itself; a block cannot.
    """
    return {
        "posture": "Reactive",
        "expect": ["prefect.flow-run.Crashed"],
        "match": {**silent["match"], "prefect.state-message": GONE},
        "match_related": silent["match_related"],
    }


def _automation(
    alarm: Alarm, trigger: Alarm, actions: list[dict[str, Any]], alert: UUID
) -> AutomationCore:
    from prefect.events.schemas.automations import AutomationCore

    automation = {
        "name": alarm["name"],
        "description": alarm["description"],
        "trigger": {"type": "event", **trigger},
        "actions": actions,
        "owner_resource": f"prefect.deployment.{alert}",
    }
    return AutomationCore.model_validate(automation)
