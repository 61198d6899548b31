"""Notices that a spot machine is about to be taken away: the night then ends as by SIGTERM.

AWS gives about two minutes, Google Cloud half a minute. Sources (read 2026-11):
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
https://cloud.google.com/compute/docs/instances/create-use-preemptible
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.config import Job

log = logging.getLogger(__name__)

POLL_S = 5.0
"""As AWS recommends."""
TIMEOUT_S = 1.0
"""The metadata service is on the machine itself, or there is none."""
FIRST_LOOKS = 3
"""An answer that is late (a packet that is lost comes again after a second) decides nothing."""
TOKEN_TTL_S = 21_600


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """Addresses of the metadata services; the variables are those of botocore and google-auth."""

    aws: str
    gcp: str

    @classmethod
    def from_environment(cls) -> Metadata:
        """The clouds' own addresses, unless the environment names others."""
        aws = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
        gcp = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        return cls(aws=aws.rstrip("/"), gcp=f"http://{gcp}")


@contextmanager
def notices(job: Job, say: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile, a notice sends this process SIGTERM; only for jobs whose `cost.market` is spot.

    Args:
        job: The job.
        say: Is told of the notice.
    """
    if job.cost.market != "spot":
        yield
        return
    stopped = threading.Event()

    def on_notice(what: str) -> None:
        say(f"{what}: ending in good order, to be resumed by the same command")
        os.kill(os.getpid(), signal.SIGTERM)

    where = Metadata.from_environment()
    thread = threading.Thread(
        target=watch, args=(where, on_notice, stopped), name="spot", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()


def watch(
    where: Metadata,
    on_notice: Callable[[str], None],
    stopped: threading.Event,
    period_s: float = POLL_S,
) -> None:
    """Look for a notice until there is one or `stopped` is set; at once gone where no cloud is.

    Args:
        where: Addresses.
        on_notice: Is told what was found, once.
        stopped: Ends the watch.
        period_s: Seconds between two looks.
    """
    first = _first_look(where)
    if first is None:
        log.info("no metadata service of AWS or Google Cloud: no spot notices")
        return
    cloud, found = first
    while found is None and not stopped.wait(period_s):
        try:
            found = cloud(where)
        except (OSError, ValueError) as error:  # it was there before: it comes back
            log.debug("spot notice: %s", error)
    if found is not None and not stopped.is_set():
        on_notice(found)


def _first_look(where: Metadata) -> tuple[Callable[[Metadata], str | None], str | None] | None:
    """The cloud that answers, and what it says; None: it is none of them."""
    clouds = [_aws_notice, _gcp_notice]
    for _ in range(FIRST_LOOKS):
        for cloud in tuple(clouds):
            try:
                return cloud, cloud(where)
            except (OSError, ValueError) as error:
                if not isinstance(getattr(error, "reason", error), TimeoutError):
                    clouds.remove(cloud)
    return None


def _aws_notice(where: Metadata) -> str | None:
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise OSError("switched off by AWS_EC2_METADATA_DISABLED")
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
    token = _ask(f"{where.aws}/latest/api/token", ttl, method="PUT")
    try:
        text = _ask(
            f"{where.aws}/latest/meta-data/spot/instance-action",
            {"X-aws-ec2-metadata-token": token},
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:  # the usual answer: nothing is planned
            return None
        raise
    notice = json.loads(text)
    return f"spot notice of AWS: {notice['action']} at {notice['time']}"


def _gcp_notice(where: Metadata) -> str | None:
    url = f"{where.gcp}/computeMetadata/v1/instance/preempted"
    answer = _ask(url, {"Metadata-Flavor": "Google"}).strip().upper()
    if answer not in ("TRUE", "FALSE"):
        raise ValueError(f"{url}: {answer[:40]!r}; expected TRUE or FALSE")
    return "spot notice of Google Cloud: preempted" if answer == "TRUE" else None


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    # No proxy: the address is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read(10_000).decode())
