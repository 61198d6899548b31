"""What is said when a flow run failed, crashed or was cancelled, and how to go on.

Who runs these: the flow's own process after an error; the worker after that process was killed, ran
out of memory or was cancelled. When the worker died, too, nobody is left: flows/alarms.py has the
server notice the silence.

The process of a night mails itself how it ended (flows/mailing/mail.py); only one that was killed
cannot.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from prefect.logging.loggers import flow_run_logger

from flows.mailing.mail import notify
from flows.run_names import title_of
from pipeline.errors import ConfigError
from pipeline.job_file import load_job

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

Logger = logging.Logger | logging.LoggerAdapter[Any]
OWN_PROCESS = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect's workers in the process of a flow run, and nowhere else."""


# Prefect asks for these names of the parameters.
def failed(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """It ended with an error, and retries have not helped."""
    subject, text = _words(flow_run, "failed", state)
    flow_run_logger(flow_run, flow).warning("%s: %s", subject, text)


def cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Somebody cancelled it."""
    subject, text = _words(flow_run, "was cancelled", state)
    flow_run_logger(flow_run, flow).warning("%s: %s", subject, text)


def crashed(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Its process was told to end, or was killed: then the worker speaks for it."""
    subject, text = _words(flow_run, "crashed", state)
    logger = flow_run_logger(flow_run, flow)
    logger.warning("%s: %s", subject, text)
    if OWN_PROCESS not in os.environ:
        mail_warning(logger, str(flow_run.parameters.get("job", "")), subject, text)


def mail_warning(logger: Logger, job: str, subject: str, text: str) -> None:
    """Mail a warning to whom a job file names; never raises.

    Args:
        logger: Of the flow run: says why there is no mail.
        job: Job file.
        subject: What is wrong, in a few words.
        text: What to do about it.
    """
    try:
        found = load_job(job)
    except ConfigError as error:
        logger.warning("no mail: %s", error)
        return
    notify(found, subject, text)


def _words(flow_run: FlowRun, how: str, state: State) -> tuple[str, str]:
    """Subject and text. The worker's copy of a flow run is older than its name: it has a title."""
    title = title_of(flow_run.parameters, flow_run.expected_start_time)
    why = (state.message or "no reason was given").rstrip(".")
    return f"{title} {how}", (
        f"{why}.\nCommitted shards are kept. To go on: `prefect flow-run retry {flow_run.id}`, or "
        "the same run again from its deployment's page, or `score run` with the job and the date."
    )
