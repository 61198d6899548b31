"""`crash_night.py` in a bucket: input and output are objects, and the operations are S3 requests.

    python crash_bucket.py FOLDER URI HOW FIRST LAST STEP

HOW, at the n-th request of the night: `exit-before` it, `exit-after` it, `once` (503, not applied),
`lost` (applied, its answer is lost), `forever` (503 from then on). Then the same night again, and a
recount. Prints a JSON object for each trial, until a night is over before it comes to so many.

s3fs does not survive a fork: it is imported here, and used in children only.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.session
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
from botocore.exceptions import ClientError, ConnectionClosedError
from crash_night import BAD_ROW, CRASHED, NUM_ROWS, NUM_SHARDS, forked, job_in, night
from pipeline_cases import DATE
from s3fs.errors import translate_boto_error

from pipeline import verify
from pipeline.config import Job
from pipeline.errors import StoreUnavailableError
from pipeline.object_storage import DEADLINE_VARIABLE
from pipeline.publish import published_folder
from pipeline.storage import MANIFEST, SUCCESS, open_storage
from pipeline.store_errors import Patience

DEADLINE_S = 0.3
UNAVAILABLE, NOT_REACHED = 75, 40
HOWS = ("exit-before", "exit-after", "once", "lost", "forever")


def disturb(how: str, number: int) -> Callable[[], bool]:
    """From now on disturb the `number`-th request of this process; whether it came to that."""
    assert how in HOWS
    count = itertools.count(1)
    reached = False
    request = s3fs.S3FileSystem._call_s3
    os.environ[DEADLINE_VARIABLE] = str(DEADLINE_S)
    Patience.FIRST_PAUSE_S = 0.01

    async def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        nonlocal reached
        at = next(count)
        here = at == number
        reached = reached or here
        if here and how == "exit-before":
            os._exit(CRASHED)
        if (here and how == "once") or (at >= number and how == "forever"):
            reply = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}
            raise translate_boto_error(ClientError(reply, method))
        try:
            return await request(self, method, *arguments, **options)
        finally:  # also where the answer is that nothing is there
            if here and how == "exit-after":
                os._exit(CRASHED)
            if here and how == "lost":
                raise ConnectionClosedError(endpoint_url=method)

    s3fs.S3FileSystem._call_s3 = call
    return lambda: reached


def disturbed_night(job: Job, how: str, number: int) -> None:
    was_reached = disturb(how, number)
    try:
        night(job)
    except StoreUnavailableError:
        os._exit(UNAVAILABLE)
    os._exit(0 if was_reached() else NOT_REACHED)


def night_and_recount(job: Job, answer: int) -> None:
    """The same night, undisturbed; what is wrong after it goes into the pipe."""
    night(job)
    os.write(answer, problem_of(job).encode())
    os._exit(0)


def problem_of(job: Job) -> str:
    """What is wrong; empty: nothing. It is read without our own storage."""
    files = bucket_files()
    # One client, not one for each file: they would cost more than the night.
    verify._filesystem = lambda uri: (files, uri.removeprefix("s3://"))
    verdict = verify.verify_published(job.output.uri, job.name, DATE)
    counted = (verdict["rows"], verdict["scored"], verdict["quarantined"])
    if counted != (NUM_ROWS, NUM_ROWS - 1, 1):
        return f"rows, scored, quarantined: {counted}"
    folder = f"{job.output.uri}/{published_folder(job.name, DATE)}"
    if not files.exists(f"{folder}/{SUCCESS}"):
        return f"no {SUCCESS}"
    found = {}
    for part in files.glob(f"{folder}/*.parquet"):
        table = pq.read_table(pa.BufferReader(files.cat_file(part)))
        found |= dict(zip(table["user_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    expected = {row: 3.0 * row for row in range(NUM_ROWS) if row != BAD_ROW}
    return "" if found == expected else "other scores"


def look_early(job: Job, answer: int) -> None:
    """What a reader that waits for `_SUCCESS`, or for the manifest, would see too early."""
    folder = f"{job.output.uri}/{published_folder(job.name, DATE)}"
    names = {path.rpartition("/")[2] for path in bucket_files().find(folder)}
    num_parts = sum(name.endswith(".parquet") for name in names)
    quarantine_too = num_parts == NUM_SHARDS + 1
    if names & {MANIFEST, SUCCESS} and not (quarantine_too and MANIFEST in names):
        os.write(answer, f"a reader sees {sorted(names)}".encode())
    os._exit(0)


def bucket_files() -> Any:
    return fsspec.filesystem(
        "s3",
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"s3": {"addressing_style": "path"}},
    )


def asked(work: Callable[[Job, int], None], job: Job) -> str:
    """What a child that does the work wrote into its pipe, or how it failed."""
    ours, theirs = os.pipe()
    code = forked(lambda: work(job, theirs))
    os.close(theirs)
    with os.fdopen(ours) as answer:
        return answer.read() if code == 0 else f"{work.__name__}: exit code {code}"


def trial(folder: Path, uri: str, how: str, number: int) -> dict[str, Any]:
    """One disturbed night, a look at what it left, and the same night again."""
    job = job_of(folder, uri, f"out-{uuid.uuid4().hex[:8]}")
    try:
        code = forked(lambda: disturbed_night(job, how, number))
        problem = asked(look_early, job) or asked(night_and_recount, job)
    except TimeoutError as error:
        return {"code": None, "problem": repr(error)}
    return {"code": code, "problem": problem or None}


def job_of(folder: Path, uri: str, output: str) -> Job:
    job = job_in(folder, folder / output)  # it writes the input, once
    return job.model_copy(
        update={
            "input": job.input.model_copy(update={"uri": f"{uri}/in"}),
            "output": job.output.model_copy(update={"uri": f"{uri}/{output}"}),
        }
    )


def warm_up() -> None:
    """Read what every client needs to know of S3 once: children inherit it."""
    botocore.loaders.create_loader = functools.cache(botocore.loaders.create_loader)
    botocore.session.get_session().create_client("s3", region_name="us-east-1")


def upload(folder: Path, uri: str) -> None:
    storage = open_storage(uri)
    for path in (folder / "in").rglob("*.parquet"):
        storage.create(str(path.relative_to(folder)), path.read_bytes())


def main() -> None:
    """See above."""
    folder, uri, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    job_of(folder, uri, "none")
    warm_up()
    assert forked(lambda: upload(folder, uri)) == 0
    for number in range(*(int(text) for text in sys.argv[4:])):
        result = trial(folder, uri, how, number)
        print(json.dumps({"number": number, **result}), flush=True)
        if result["code"] == NOT_REACHED:
            return


if __name__ == "__main__":
    main()
