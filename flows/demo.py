"""`score demo`: a night's worth of real pictures (or users), made here and scored."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from flows.demo_data import write_pictures, write_users
from flows.night import run_night
from flows.shipped import shipped_config
from pipeline.config import Job
from pipeline.job_file import load_job
from pipeline.report import RunReport
from pipeline.run import Night
from pipeline.storage import open_storage
from pipeline.versions import find_published

FIRST_DATE = datetime.date(2026, 11, 20)
NUM_PICTURES = 4_000
NUM_USERS = 200_000


def demo_job(config: str, folder: str) -> Job:
    """A demo job with its input, engines and output below `folder`."""
    job = load_job(shipped_config(config))
    default = "nightscore-demo"
    moved = {
        "input.uri": job.input.uri,
        "engine.store": job.engine.store,
        "output.uri": job.output.uri,
        "model.source": job.model.source,
    }
    overrides = [f"{key}={value.replace(default, folder, 1)}" for key, value in moved.items()]
    return load_job(shipped_config(config), overrides)


def run_demo(folder: str, num_rows: int | None, features: bool, observer: Any) -> RunReport:
    """Make the rows of the first date that is not published yet, and score them.

    The report's clock starts when the rows are there: a job finds its input made.

    Args:
        folder: Where data, engines and scores go.
        num_rows: Rows to make; None: 4,000 pictures or 200,000 users.
        features: Users with numeric features instead of pictures.
        observer: Is told how it goes.
    """
    job = demo_job("demo-features.yaml" if features else "demo.yaml", folder)
    date = next_date(job)
    observer.say(f"making the rows of {date} in {job.input.uri}")
    if features:
        make_features_demo(folder, date, num_rows or NUM_USERS)
    else:
        write_pictures(Path(job.input.uri), date, num_rows=num_rows or NUM_PICTURES)
    return run_night(Night(job=job, date=date), observer)


def next_date(job: Job) -> str:
    """The first date from FIRST_DATE on without a published run."""
    output = open_storage(job.output.uri)
    date = FIRST_DATE
    while find_published(output, job.name, date.isoformat()) is not None:
        date += datetime.timedelta(days=1)
    return date.isoformat()


def make_features_demo(folder: str, date: str, num_rows: int) -> Job:
    """Data and model of configs/demo-features.yaml."""
    from engines.demo_models import write_ranking_onnx

    job = demo_job("demo-features.yaml", folder)
    write_users(Path(job.input.uri), date, num_rows=num_rows)
    model = Path(job.model.source)
    if not model.exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        write_ranking_onnx(model)
    return job
