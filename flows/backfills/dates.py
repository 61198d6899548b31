"""Which dates of a period a backfill has to score."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from flows.backfills.summary import DateOutcome
from pipeline.config import Job
from pipeline.errors import ConfigError
from pipeline.job_file import parse_date
from pipeline.plan import input_files
from pipeline.storage import MANIFEST, open_storage
from pipeline.versions import REPORT_HTML, published_folder

MAX_DATES = 3_660
NUM_LOOKERS = 8


def dates_between(first: str, last: str) -> list[str]:
    """All ISO dates from the first to the last, both included.

    Raises:
        ConfigError: One of them is none, they are in the wrong order, or ten years apart.
    """
    begin, end = (datetime.date.fromisoformat(parse_date(date)) for date in (first, last))
    num_days = (end - begin).days + 1
    if not 1 <= num_days <= MAX_DATES:
        advice = "Name the earlier date first" if num_days < 1 else "Backfill one part at a time"
        raise ConfigError(
            f"--from {first} --to {last}: {num_days:,} dates; expected 1 to {MAX_DATES:,}. "
            f"{advice}."
        )
    return [(begin + datetime.timedelta(days=day)).isoformat() for day in range(num_days)]


def nothing_to_do(job: Job, dates: Sequence[str]) -> dict[str, DateOutcome]:
    """The dates that are published, and those without input; no file is opened.

    A date whose publisher died before it wrote the report is none of them: to score it again
    writes what is missing, and nothing else.

    Raises:
        ConfigError: The job has no dates.
    """
    if job.input.partition is None:
        raise ConfigError(
            "input.partition: null, so that every date has the same rows; expected a sub-folder "
            "such as dt={date}. Use `score run` for this job."
        )
    output, source = open_storage(job.output.uri), open_storage(job.input.uri)
    partition = job.input.partition

    def look(date: str) -> DateOutcome | None:
        folder = published_folder(job.name, date)
        if output.info(f"{folder}/{MANIFEST}") is not None:
            is_whole = output.info(f"{folder}/{REPORT_HTML}") is not None
            return DateOutcome(date=date, status="already_published") if is_whole else None
        if not input_files(job, date, source):
            where = partition.replace("{date}", date)
            return DateOutcome(date=date, status="no_input", why=f"no *.parquet in {where}")
        return None

    with ThreadPoolExecutor(NUM_LOOKERS) as pool:
        return {found.date: found for found in pool.map(look, dates) if found}
