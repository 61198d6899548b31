"""The Prefect server at PREFECT_API_URL: whether it answers, and waiting until it does."""

from __future__ import annotations

import time
import urllib.request

from pipeline.errors import one_line

ANSWER_S = 10.0
"""A server that is busy, on a machine that is busy, takes some seconds to answer."""
LOOK_AGAIN_S = 0.5


def problem_of(api: str) -> str | None:
    """Why the server at `api` does not answer; None when it does."""
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=ANSWER_S):
            return None
    except (OSError, ValueError) as error:  # ValueError: no address at all
        return one_line(error)


def wait_for(api: str, patience_s: float) -> None:
    """Return when the server answers, or after so many seconds: who asks next says what is wrong.

    A server that is started in the background takes some seconds to come up.
    """
    deadline = time.monotonic() + patience_s
    while problem_of(api) is not None and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_S)
