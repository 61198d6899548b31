"""The Prefect flow behind `score/alert`: what the server noticed becomes a message."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import flow_run

from flows.hooks import mail_warning
from flows.run_names import job_name, what_of

ENDED = (StateType.COMPLETED, StateType.FAILED)
"""States that only a run itself takes."""


def _run_name() -> str:
    parameters = flow_run.parameters
    return f"{job_name(str(parameters['job']))}: {parameters['subject']}"


@flow(
    name="score",
    flow_run_name=_run_name,
    description="Tell somebody what the server noticed; its automations start this.",
)
def alert(
    job: str,
    subject: str = "a test of the alert",
    text: str = "Nothing is wrong.",
    run: str = "",
) -> None:
    """Send a message to whom the job's `mail:` section names, and write it to the log.

    Args:
        job: Job file (YAML), as the worker sees its path.
        subject: What is wrong, in a few words.
        text: What to do about it.
        run: The flow run that it is about, `prefect.flow-run.<id>`: its date is said, too. Nothing
            is told about one that has ended by itself: its last sign of life came after its end.
    """
    logger = get_run_logger()
    if run:
        with suppress(Exception):  # an alarm without its date is better than none
            found = _read(run)
            subject += f": {what_of(found.parameters, found.expected_start_time)}"
            if found.state_type in ENDED:
                logger.info("%s: %s? No: it has ended.", job_name(job), subject)
                return
    logger.warning("%s: %s. %s", job_name(job), subject, text)
    mail_warning(logger, job, subject, text)


def _read(run: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(run.rpartition(".")[2]))
