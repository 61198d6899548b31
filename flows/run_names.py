"""Which date a flow run scores, and what its page is called: job and date."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pipeline.errors import ConfigError
from pipeline.job_file import load_job, parse_date
from pipeline.time_zone import find_zone


def date_of(scheduled: datetime.datetime, days_back: int, timezone: str) -> str:
    """The date that a run scores: `days_back` days before its scheduled start in `timezone`.

    The scheduled start and not the clock: a late run, and one that is retried on another day, still
    scores its own night.
    """
    try:
        today = scheduled.astimezone(find_zone(timezone)).date()
        return (today - datetime.timedelta(days=days_back)).isoformat()
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    except OverflowError:
        raise ConfigError(f"days_back: {days_back}; expected a number of days such as 1.") from None


def wanted_date(parameters: Mapping[str, Any], scheduled: datetime.datetime | None) -> str:
    """The ISO date that the parameters of a run ask for.

    Args:
        parameters: `date`, or `days_back` and `timezone`.
        scheduled: When the run was to start; None: now.

    Raises:
        ConfigError: There is no such date, or no such time zone.
    """
    if parameters.get("date"):
        return parse_date(str(parameters["date"]))
    start = scheduled or datetime.datetime.now(datetime.UTC)
    days_back = int(parameters.get("days_back", 1))
    return date_of(start, days_back, str(parameters.get("timezone", "UTC")))


def job_name(path: str) -> str:
    """The name that a job file gives, or that of the file when it cannot be read here."""
    with suppress(ConfigError):
        return load_job(path).name
    return os.path.splitext(os.path.basename(path))[0]


def title_of(parameters: Mapping[str, Any], scheduled: datetime.datetime | None) -> str:
    """Job and date of a night, or job and period of a backfill; never raises."""
    return f"{job_name(str(parameters.get('job', '')))} {what_of(parameters, scheduled)}"


def what_of(parameters: Mapping[str, Any], scheduled: datetime.datetime | None) -> str:
    """The date of a night, or the period of a backfill; never raises."""
    if "first" in parameters:
        return f"backfill {parameters['first']} to {parameters.get('last')}"
    try:
        return wanted_date(parameters, scheduled)
    except ConfigError:  # said by the flow itself; here it would crash the run before it begins
        return str(parameters.get("date") or parameters.get("timezone"))
