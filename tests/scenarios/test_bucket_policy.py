"""infra/aws/bucket-policy.json against the requests that real nights make."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest

POLICY = Path(__file__).parents[2] / "infra" / "aws" / "bucket-policy.json"
DATE = "2026-11-20"
PLACES = {"users": "my-data/pictures", "out": "my-scores/scores", "engines": "my-scores/engines"}
"""Where the test has what the policy gives other names."""

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(400)]


def wanted_of(method: str, address: str) -> Iterator[tuple[str, str, str | None]]:
    """Action, resource and prefix that S3 looks for in a policy.

    Source: https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
    """
    url = urlsplit(address)
    bucket, _, key = url.path.lstrip("/").partition("/")
    query = parse_qs(url.query, keep_blank_values=True)
    arn = "arn:aws:s3:::"
    if key:
        action = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject"}.get(method)
        if method == "DELETE":
            action = "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
        if method == "POST":  # begin or complete an upload in parts
            action = "PutObject"
        yield f"s3:{action}", arn + renamed(key), None
    elif "delete" in query:  # of many: the keys are in the body, below the same prefix
        yield "s3:DeleteObject", f"{arn}my-scores/scores/any", None
    elif method in ("GET", "HEAD"):
        action = "ListBucketMultipartUploads" if "uploads" in query else "ListBucket"
        (prefix,) = query.get("prefix", [""])
        in_bucket, _, prefix = renamed(prefix).partition("/")
        yield f"s3:{action}", arn + in_bucket, prefix
    else:
        raise AssertionError(f"{method} {address} of bucket {bucket}: who asks for that?")


def renamed(path: str) -> str:
    """A path of the test's bucket, in the policy's words."""
    _, place, rest = re.fullmatch(r"([0-9a-f]{32})/(\w+)(.*)", path).groups()  # type: ignore[union-attr]
    return PLACES[place] + rest


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allows(statement: dict[str, Any], action: str, resource: str, prefix: str | None) -> bool:
    if action not in listed(statement["Action"]):
        return False
    if not any(fnmatchcase(resource, each) for each in listed(statement["Resource"])):
        return False
    likes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
    return likes is None or any(fnmatchcase(prefix or "", each) for each in likes)


@pytest.fixture
def requests(
    score: Callable[..., Any],
    features_folder: Path,
    features_job: Path,
    s3_folder: str,
    s3_proxy: Any,
) -> set[tuple[str, str]]:
    """Methods and addresses that commands send to a bucket with input, engines and scores."""
    (first, *_) = sorted((features_folder / "users").rglob("*.parquet"))
    rows = BytesIO()
    pq.write_table(pq.read_table(first).slice(0, 4_000), rows, row_group_size=1_000)
    bucket = s3_folder.removeprefix("s3://")
    s3_proxy.files.pipe_file(f"{bucket}/users/dt={DATE}/rows.parquet", rows.getvalue())
    places = {"input.uri": "users", "output.uri": "out", "engine.store": "engines"}
    at = [f"--set={key}={s3_folder}/{folder}" for key, folder in places.items()]
    dated = ("--date", DATE)
    for command in (
        ("run", features_job, *dated),
        ("run", features_job, *dated, "--force"),
        ("gc", features_job, "--keep-versions", "0", "--unfinished"),
    ):
        ended = score(*command, *at)
        assert ended.code == 0, (command, ended.err)
    return {(method, address) for method, address, _ in s3_proxy.log}


def test_the_policy_allows_what_nights_ask_a_bucket_for_and_nothing_that_nobody_asks(
    requests: set[tuple[str, str]],
) -> None:
    statements = json.loads(POLICY.read_text())["Statement"]
    asked = {wanted for request in requests for wanted in wanted_of(*request)}
    refused = [each for each in asked if not any(allows(s, *each) for s in statements)]
    assert refused == []
    used = {
        (statement["Sid"], action)
        for statement in statements
        for action, *what in asked
        if allows(statement, action, *what)
    }
    granted = {(each["Sid"], action) for each in statements for action in listed(each["Action"])}
    # Parts of an upload that stay behind are hours old before `score gc` ends it: not tonight.
    assert granted - used == {("WriteScoresAndEngines", "s3:AbortMultipartUpload")}


def test_the_policy_never_lets_a_night_change_its_input() -> None:
    for statement in json.loads(POLICY.read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        if "my-data" in str(statement["Resource"]):
            assert set(listed(statement["Action"])) <= {"s3:GetObject", "s3:ListBucket"}
        assert "*" not in str(statement["Action"])
