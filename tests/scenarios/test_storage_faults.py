"""Nights in a bucket that fails: undisturbed by what passes, finished later after what lasts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.object_storage import DEADLINE_VARIABLE
from tests.s3_fault_proxy import ALWAYS, Fault, FaultProxy
from tests.scenarios.features_nights import (
    DATE,
    NUM_ROWS,
    NUM_SHARDS,
    RESUMABLE,
    RUNS,
    SHARDS,
    check_resumed,
    check_stopped,
    night,
    scores_of,
)

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEADLINE_VARIABLE, "3")


@pytest.fixture
def bucket(s3_proxy: FaultProxy, s3_folder: str, features_folder: Path) -> str:
    """A prefix with the input; the night's output goes below it, too."""
    for file in features_folder.glob("users/*/*.parquet"):
        s3_proxy.files.put_file(str(file), f"{s3_folder}/in/dt={DATE}/{file.name}")
    return s3_folder


def in_bucket(job: Path, bucket: str) -> tuple[str, ...]:
    return night(job, f"{bucket}/out", *SHARDS, "--set", f"input.uri={bucket}/in")


def scores_in(files: Any, bucket: str) -> dict[int, float]:
    parts = files.glob(f"{bucket}/out/users/dt={DATE}/*.parquet")
    return scores_of(pq.read_table(pa.BufferReader(files.cat_file(part))) for part in parts)


def fault(kind: str, method: str, match: str, skip: int = 0, times: float = 1) -> Fault:
    return Fault(kind=kind, method=method, match=match, skip=skip, times=times)


def test_a_night_with_faults_that_pass_is_like_one_without(
    score: Callable[..., Any],
    s3_proxy: FaultProxy,
    features_job: Path,
    bucket: str,
    undisturbed_scores: dict[int, float],
) -> None:
    s3_proxy.faults = [
        fault("500", "GET", "/in/"),
        fault("429", "GET", "list-type"),
        fault("503", "GET", "/in/", skip=3, times=3),
        fault("slowdown", "HEAD", "/in/", skip=3, times=3),
        fault("reset_before", "GET", "/in/", skip=6),
        fault("truncated", "GET", "/in/", skip=8),
        fault("slow", "GET", "/in/", skip=10),
        fault("flipped", "GET", "/commits/"),
        fault("reset_before", "PUT", "/parts/part-"),
        fault("reset_after", "PUT", "/parts/part-", skip=2),
        fault("500_after", "PUT", "/parts/part-", skip=4),
        fault("slow", "PUT", "/parts/part-", skip=6),
        fault("reset_before", "PUT", "/commits/"),
        fault("reset_after", "PUT", "/commits/", skip=2),
        fault("500_after", "PUT", "/commits/", skip=4),
        fault("409", "PUT", "/commits/", skip=6),
        fault("slowdown", "PUT", "/commits/", skip=8, times=3),
        fault("reset_after", "PUT", f"dt={DATE}/part-"),
        fault("200_error", "PUT", f"dt={DATE}/part-", skip=5),
        fault("reset_before", "PUT", "_MANIFEST.json"),
        fault("500_after", "PUT", "_MANIFEST.json"),
    ]
    command = in_bucket(features_job, bucket)
    ended = score(*command)
    check_resumed(ended, 0, NUM_SHARDS)
    assert [each for each in s3_proxy.faults if each.fired != each.times] == []
    assert scores_in(s3_proxy.files, bucket) == undisturbed_scores
    verdict = score("verify", *command[1:])
    assert (verdict.code, verdict.json["rows"]) == (0, NUM_ROWS), verdict.err
    # Repeated uploads left no part that no record names.
    parts = s3_proxy.files.glob(f"{bucket}/out/{RUNS}/*/parts/part-*")
    assert len(parts) == NUM_SHARDS


OUTAGES = {
    "everything": fault("500", "", "", times=ALWAYS),
    "commits": fault("503", "PUT", "/commits/", times=ALWAYS),
    "input": fault("500", "GET", "/in/", times=ALWAYS),
    "forbidden": fault("403", "PUT", "/commits/", times=ALWAYS),
}
TRIED = tuple(OUTAGES) if "TORTURE_KILLS" in os.environ else ("everything", "forbidden")
"""Each takes two nights over the slowed store."""


@pytest.mark.parametrize("outage", TRIED)
@pytest.mark.usefixtures("impatient")
def test_a_night_that_an_outage_ends_is_finished_by_the_same_command(
    score: Callable[..., Any],
    s3_proxy: FaultProxy,
    features_job: Path,
    bucket: str,
    undisturbed_scores: dict[int, float],
    outage: str,
) -> None:
    """It begins with the tenth commit, wherever its requests begin."""
    s3_proxy.faults = CommitGate(s3_proxy, num_commits=10, then=replace(OUTAGES[outage]))
    command = in_bucket(features_job, bucket)
    check_stopped(score(*command), bucket)
    assert not s3_proxy.files.exists(f"{bucket}/out/users/dt={DATE}/_MANIFEST.json")
    num_committed = len(s3_proxy.files.glob(f"{bucket}/out/{RUNS}/*/commits/*.json"))
    assert 0 < num_committed < NUM_SHARDS
    s3_proxy.faults = []
    check_resumed(score(*command), num_committed, NUM_SHARDS)
    assert scores_in(s3_proxy.files, bucket) == undisturbed_scores


class CommitGate(list[Fault]):
    """Faults that begin once so many commit records were written."""

    def __init__(self, proxy: FaultProxy, num_commits: int, then: Fault) -> None:
        super().__init__([then])
        self._proxy, self._num_commits = proxy, num_commits

    def __iter__(self) -> Iterator[Fault]:
        if self._proxy.num_requests("PUT", "/commits/") >= self._num_commits:
            yield from super().__iter__()


@pytest.mark.usefixtures("impatient")
def test_a_manifest_that_cannot_be_written_is_written_by_the_same_command(
    score: Callable[..., Any],
    s3_proxy: FaultProxy,
    features_job: Path,
    bucket: str,
    undisturbed_scores: dict[int, float],
) -> None:
    command = in_bucket(features_job, bucket)
    s3_proxy.faults = [fault("500", "PUT", "_MANIFEST.json", times=ALWAYS)]
    check_stopped(score(*command), "_MANIFEST.json: injected")
    s3_proxy.faults = [fault("500", "PUT", "_SUCCESS", times=ALWAYS)]
    check_stopped(score(*command), "_SUCCESS: injected")  # published, as far as we are concerned
    s3_proxy.faults = []
    ended = score(*command)
    assert (ended.code, ended.json["status"]) == (0, "already_published"), ended.err
    assert s3_proxy.files.exists(f"{bucket}/out/users/dt={DATE}/_SUCCESS")
    assert s3_proxy.files.exists(f"{bucket}/out/users/dt={DATE}/_report.json")
    assert scores_in(s3_proxy.files, bucket) == undisturbed_scores


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("403", 2, "expected access to it"),
        ("500", RESUMABLE, "the same command goes on"),
        ("reset_before", RESUMABLE, "the same command goes on"),
        ("overwrites", 1, "does not honour create-if-absent"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_night_does_not_begin_over_a_store_like_that(
    score: Callable[..., Any],
    s3_proxy: FaultProxy,
    features_job: Path,
    bucket: str,
    kind: str,
    code: int,
    said: str,
) -> None:
    s3_proxy.faults = [fault(kind, "", "", times=ALWAYS)]
    ended = score(*in_bucket(features_job, bucket))
    assert ended.code == code, ended.err
    assert said in ended.json["error"]
    assert len(ended.err.splitlines()) == 1, ended.err
    left = s3_proxy.files.find(f"{bucket}/out", detail=True).values()
    assert [each for each in left if each["type"] == "file"] == []  # SeaweedFS keeps the folder


@pytest.mark.usefixtures("impatient", "s3_proxy")
def test_a_night_without_a_store_says_so_and_can_be_resumed(
    score: Callable[..., Any],
    features_job: Path,
    s3_folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    ended = score(*in_bucket(features_job, s3_folder))
    check_stopped(ended, "127.0.0.1:9")
