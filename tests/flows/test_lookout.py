"""A night and its deadline: warned of early, or met."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flows.lanes import Group
from flows.night import run_night
from flows.progress import LineProgress
from pipeline.config import Job, WindowSection
from pipeline.errors import Interrupted
from pipeline.job_file import load_job
from pipeline.publish import find_report
from pipeline.run import Night
from pipeline.storage import open_storage
from tests.conftest import DATE

WINDOW_S = 120.0
SHARD_S = 0.8
"""Of 400 shards: 320 s."""


@pytest.fixture
def job(features_job: Path) -> Job:
    sets = ["lanes.device=cpu", "lanes.shard_rows=100", f"window.max_hours={WINDOW_S / 3600}"]
    return load_job(str(features_job), sets)


class SlowLane:
    """Hands out one shard after the other with a pause, until somebody was warned."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.warnings: list[tuple[float, str]] = []

    def warn(self, text: str) -> None:
        self.warnings.append((time.monotonic() - self.began, text))

    def __call__(
        self, score: Callable[[Group], None], groups: Sequence[Group], num_callers: int
    ) -> None:
        assert num_callers >= 1
        for shard in (shard for group in groups for shard in group):
            if self.warnings:
                raise Interrupted("seen enough; run the same command again.")
            score([shard])
            time.sleep(SHARD_S)


def test_a_night_that_will_miss_its_deadline_warns_within_a_quarter_of_its_window(
    job: Job,
) -> None:
    lines: list[str] = []
    run_night(Night(job=job.model_copy(update={"window": None}), date=DATE), quiet())  # the engine
    lane = SlowLane()
    night = Night(job=job, date=DATE, again="all")
    with pytest.raises(Interrupted):
        run_night(night, LineProgress(lines.append, 1.0), lane, on_warning=lane.warn)
    ((after_s, text),) = lane.warnings
    assert after_s <= WINDOW_S / 4
    assert f"users {DATE}: will miss its deadline" in text
    assert "more machines like this from now on" in text
    assert f"warning: {text}" in lines
    assert any("after its deadline (" in line for line in lines), "and so do the lines of progress"


def test_a_night_in_time_says_so_in_its_report_and_warns_nobody(job: Job) -> None:
    window = WindowSection(max_hours=2, timezone="Europe/Zurich")
    lane = SlowLane()
    night = Night(job=job.model_copy(update={"window": window}), date=DATE)
    report = run_night(night, quiet(), on_warning=lane.warn)
    assert not lane.warnings
    assert report.window is not None
    assert report.window.met
    assert 7_000 < report.window.margin_s < 7_200
    assert find_report(open_storage(job.output.uri), "users", DATE) == report


def quiet() -> LineProgress:
    return LineProgress(lambda _: None)
