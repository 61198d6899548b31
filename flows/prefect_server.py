"""The Prefect server at PREFECT_API_URL: whether it answers, and waiting until it does."""

from __future__ import annotations

import time

from engines.masking import masked
from pipeline.errors import one_line

ANSWER_S = 10.0
"""A server that is busy, on a machine that is busy, takes some seconds to answer."""
LOOK_AGAIN_S = 0.5


def problem_of(api: str) -> str | None:
    """Why the server at `api` does not answer; None when it does.

    Asked as Prefect itself would: a user name and a password in the address log in.
    """
    import httpx

    try:
        answer = httpx.get(f"{api.rstrip('/')}/health", timeout=ANSWER_S, follow_redirects=True)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: no host's name
        return masked(one_line(error) or type(error).__name__)
    return None


def wait_for(api: str, patience_s: float) -> None:
    """Return when the server answers, or after so many seconds: who asks next says what is wrong.

    A server that is started in the background takes some seconds to come up.
    """
    deadline = time.monotonic() + patience_s
    while problem_of(api) is not None and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_S)
