"""The Prefect flow behind `score/backfill`: the dates of a period that are not published."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.hooks import cancelled, crashed, failed
from flows.run_names import title_of


def _run_name() -> str:
    return title_of(flow_run.parameters, None)


@flow(
    name="score",
    flow_run_name=_run_name,
    description="Score the dates of a period that are not published.",
    on_failure=[failed],
    on_crashed=[crashed],
    on_cancellation=[cancelled],
)
def backfill(
    job: str,
    first: datetime.date,
    last: datetime.date,
    order: Literal["oldest", "newest"] = "oldest",
    max_usd: Annotated[float, Field(gt=0)] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Score the dates of a period that are not published.

    Args:
        job: Job file (YAML), as the worker sees its path.
        first: The first date of the period.
        last: The last date of the period.
        order: Whether the oldest or the newest date comes first.
        max_usd: What all of it may cost. Empty: no limit.
        dry_run: Only say what would be scored.
    """
    get_run_logger()
    return {}
