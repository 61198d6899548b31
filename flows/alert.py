"""The Prefect flow behind `score/alert`: what the server noticed becomes a message."""

from __future__ import annotations

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows.hooks import mail_warning
from flows.run_names import job_name


def _run_name() -> str:
    parameters = flow_run.parameters
    return f"{job_name(str(parameters['job']))}: {parameters['subject']}"


@flow(
    name="score",
    flow_run_name=_run_name,
    description="Tell somebody what the server noticed; its automations start this.",
)
def alert(job: str, subject: str = "a test of the alert", text: str = "Nothing is wrong.") -> None:
    """Send a message to whom the job's `mail:` section names, and write it to the log.

    Args:
        job: Job file (YAML), as the worker sees its path.
        subject: What is wrong, in a few words.
        text: What to do about it.
    """
    logger = get_run_logger()
    title = f"{job_name(job)}: {subject}"
    logger.warning("%s. %s", title, text)
    mail_warning(logger, job, title, text)
