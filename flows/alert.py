"""The Prefect flow behind `score/alert`: what the server noticed becomes a message."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.runtime import flow_run

from flows.hooks import mail_warning
from flows.run_names import job_name, what_of


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
        run: The flow run that it is about, `prefect.flow-run.<id>`: its date is said, too.
    """
    logger = get_run_logger()
    with suppress(Exception):  # an alarm without its date is better than none
        subject += f": {_date_of(run)}" if run else ""
    logger.warning("%s: %s. %s", job_name(job), subject, text)
    mail_warning(logger, job, subject, text)


def _date_of(run: str) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(run.rpartition(".")[2]))
    return what_of(found.parameters, found.expected_start_time)
