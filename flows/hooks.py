"""What is said when a flow run failed, crashed or was cancelled, and how to go on.

Who runs these: the flow's own process after an error; the worker after that process was killed, ran
out of memory or was cancelled. When the worker died, too, nobody is left: flows/alarms.py has the
server notice the silence.

The process of a night mails itself how it ended (flows/mailing/mail.py); only one that was killed,
or that had not come as far, cannot. The environment does not tell it from the worker: Prefect runs
the worker's hooks in a process with the variables of the flow run's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefect.logging.loggers import flow_run_logger

from flows.mailing.mail import notify
from flows.run_names import job_name, what_of
from pipeline.errors import ConfigError
from pipeline.job_file import load_job, load_sender

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

Logger = logging.Logger | logging.LoggerAdapter[Any]
_speaking: set[str] = set()
"""Ids of the flow runs that this process has run."""


def speaks_for(run: str) -> None:
    """From now on the flow run `run` itself, in this process, says how it ends."""
    _speaking.add(run)


# Prefect asks for these names of the parameters.
def failed(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """It ended with an error, and retries have not helped."""
    if str(flow_run.id) in _speaking:
        _log(flow, flow_run, "failed", state, _way_on(flow_run))
        return
    # Its parameters or its job file: what would be tried again would fail again.
    command, period = _command(flow_run)
    way_on = (
        "This attempt scored nothing. Mend what it names, and begin another run from its "
        f"deployment's page, or `score {command}` with the job and the {period}."
    )
    subject, text = _log(flow, flow_run, "failed", state, way_on)
    _mail(flow, flow_run, subject, text)


def cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Somebody cancelled it."""
    _log(flow, flow_run, "was cancelled", state, _way_on(flow_run))


def crashed(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Its process was told to end, or was killed: then the worker speaks for it."""
    subject, text = _log(flow, flow_run, "crashed", state, _way_on(flow_run))
    if str(flow_run.id) not in _speaking:
        _mail(flow, flow_run, subject, text)


def mail_warning(
    logger: Logger, job: str, subject: str, text: str, when: Sequence[str] = ("warning",)
) -> None:
    """Mail a warning to whom a job file names, also one that is wrong elsewhere; never raises.

    Args:
        logger: Of the flow run: says why there is no mail.
        job: Job file.
        subject: What is wrong, in a few words; the mail names the job besides.
        text: What to do about it.
        when: As which of `mail.when` it counts.
    """
    try:
        found = load_job(job)
    except ConfigError as error:
        sender = load_sender(job)
        if sender is None:
            logger.warning("no mail: %s", error)
            return
        found = sender
    notify(found, subject, text, when)


def _mail(flow: Flow[..., Any], flow_run: FlowRun, subject: str, text: str) -> None:
    job = str(flow_run.parameters.get("job", ""))
    mail_warning(flow_run_logger(flow_run, flow), job, subject, text, ("failed", "warning"))


def _command(flow_run: FlowRun) -> tuple[str, str]:
    """What the command line has for it, and what that asks for."""
    return ("backfill", "period") if "first" in flow_run.parameters else ("run", "date")


def _way_on(flow_run: FlowRun) -> str:
    command, period = _command(flow_run)
    return (
        f"Committed shards are kept. To go on: `prefect flow-run retry {flow_run.id}`, or the same "
        f"run again from its deployment's page, or `score {command}` with the job and the {period}."
    )


def _log(
    flow: Flow[..., Any], flow_run: FlowRun, how: str, state: State, way_on: str
) -> tuple[str, str]:
    """Subject and text. The worker's copy of a flow run is older than its name: it has a title."""
    parameters = flow_run.parameters
    subject = f"{what_of(parameters, flow_run.expected_start_time)} {how}"
    why = (state.message or "no reason was given").rstrip(".")
    text = f"{why}.\n{way_on}"
    job = job_name(str(parameters.get("job", "")))
    flow_run_logger(flow_run, flow).warning("%s %s: %s", job, subject, text)
    return subject, text
