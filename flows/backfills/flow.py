"""The Prefect flow behind `score/backfill`: the dates of a period that are not published."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field

from flows.backfills.backfill import BackfillRequest, run_backfill
from flows.backfills.summary import SAID, BackfillSummary
from flows.hooks import cancelled, crashed, failed, speaks_for
from flows.progress import LineProgress
from flows.run_names import title_of
from flows.run_page import PROGRESS_PERIOD_S, artifact_key, quietly
from pipeline.job_file import load_job
from pipeline.report_words import usd


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
def backfill(  # noqa: PLR0913  # each argument is a field of the form
    job: str,
    first: datetime.date,
    last: datetime.date,
    order: Literal["oldest", "newest"] = "oldest",
    max_usd: Annotated[float, Field(gt=0)] | None = None,
    strict: bool = False,
    dry_run: bool = False,
) -> Any:
    """Score the dates of a period that are not published.

    A night of the job on the same machine goes first. Running the same period again goes on where
    this stopped.

    Args:
        job: Job file (YAML), as the worker sees its path.
        first: The first date of the period.
        last: The last date of the period.
        order: Whether the oldest or the newest date comes first.
        max_usd: What the period may cost, earlier runs for it included. Empty: no limit.
        strict: Whether a date without input is a failure.
        dry_run: Only say what would be scored, and what it would cost.

    Returns:
        What came of each date; the run has failed when a date could not be scored.
    """
    request = BackfillRequest(
        job=load_job(job),
        first=str(first),
        last=str(last),
        order=order,
        max_usd=max_usd,
        strict=strict,
        dry_run=dry_run,
    )
    title = title_of(flow_run.parameters, None)
    observer = LineProgress(get_run_logger().info, PROGRESS_PERIOD_S)

    def show(summary: BackfillSummary) -> None:
        speaks_for(str(flow_run.id))  # a period that is none ends before, and without a mail
        quietly(
            create_table_artifact,
            table_of(summary),
            key=artifact_key(title),
            description=f"{title}: {summary.headline()}",
        )

    summary = run_backfill(request, observer, show)
    if summary.exit_code:
        return Failed(message=summary.headline())
    return summary.headline()


def table_of(summary: BackfillSummary) -> list[dict[str, str]]:
    """A row for each date, as Prefect shows tables."""
    return [
        {
            "date": outcome.date,
            "state": SAID[outcome.status],
            "why": outcome.why,
            "rows": "" if outcome.rows is None else f"{outcome.rows:,}",
            "cost": usd(outcome.usd),
        }
        for outcome in summary.dates
    ]
