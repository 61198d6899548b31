"""What is said when a night's flow run failed, crashed or was cancelled, and how to go on.

Who runs these: the flow's own process after an error; the worker after that process died (killed,
out of memory) or was cancelled. When the worker died, too, nobody is left: flows/alarms.py has the
server notice the silence.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prefect.logging.loggers import flow_run_logger

from pipeline.errors import ConfigError
from pipeline.job_file import load_job

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

Logger = logging.Logger | logging.LoggerAdapter[Any]


# Prefect asks for these names of the parameters.
def failed(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """It ended with an error, and retries have not helped."""
    _tell(flow, flow_run, "failed", state.message)


def crashed(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Its process was killed, or told to end."""
    _tell(flow, flow_run, "crashed", state.message)


def cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Somebody cancelled it."""
    _tell(flow, flow_run, "was cancelled", state.message)


def job_name(path: str) -> str:
    """The name that a job file gives, or that of the file when it cannot be read here."""
    with suppress(ConfigError):
        return load_job(path).name
    return os.path.splitext(os.path.basename(path))[0]


def say(logger: Logger, job: str, subject: str, text: str) -> None:
    """Write a warning to the log, and mail it to whom the job file names.

    Args:
        logger: Of the flow run.
        job: Job file.
        subject: What is wrong, in a few words.
        text: What to do about it.
    """
    logger.warning("%s. %s", subject, text)


def _tell(flow: Flow[..., Any], flow_run: FlowRun, how: str, why: str | None) -> None:
    text = (
        f"{why or 'No reason was given'}. Committed shards are kept. To go on: "
        f"`prefect flow-run retry {flow_run.id}`, or `score run` with the same job and date."
    )
    logger = flow_run_logger(flow_run, flow)
    say(logger, str(flow_run.parameters.get("job", "")), f"{flow_run.name} {how}", text)
