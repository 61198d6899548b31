"""Which errors of a disk or a bucket mean what, and for how long a bucket is asked again.

A store may be *unavailable*: full, broken or out of reach; the same command goes on later. Or it
*refuses*: a wrong address, no permission; asking again does not help. What is not there, or is
there already, is no error of the store.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError, StoreRefusedError, StoreUnavailableError, one_line

UNAVAILABLE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
    }
)
"""A disk that is full or fails, a network file system whose server does not answer."""
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR})
SOON_S = 0.01
"""Pauses are no shorter."""


def why(error: BaseException) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, PipelineError) and error.__cause__ is not None:
        return why(error.__cause__)
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__


def unavailable(where: str, error: BaseException) -> StoreUnavailableError:
    """A store that did not do what it was asked for, and may do it later."""
    return StoreUnavailableError(
        f"{where}: {why(error)}; expected a store that reads and writes. Nothing that was "
        "committed is lost, and the same command goes on once the store is back."
    )


def refused(where: str, error: BaseException) -> StoreRefusedError:
    """A store that will not do what it was asked for."""
    return StoreRefusedError(
        f"{where}: {why(error)}; expected access to it. Check the address and its permissions; for "
        "a bucket also AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (of temporary "
        "keys; none of others) and AWS_ENDPOINT_URL."
    )


def is_outage(error: BaseException) -> bool:
    """Whether an error of the operating system says that a store is unavailable for now."""
    return isinstance(error, OSError) and error.errno in UNAVAILABLE


@contextmanager
def named(where: str) -> Iterator[None]:
    """Say what errors of a file system at `where` mean; others, and Arrow's, are left as they are.

    Raises:
        StoreUnavailableError: It is full, broken or out of reach.
        StoreRefusedError: It does not let us.
    """
    try:
        yield
    except OSError as error:
        if is_outage(error):
            raise unavailable(where, error) from error
        if error.errno in REFUSED:
            raise refused(where, error) from error
        raise


@contextmanager
def resumable() -> Iterator[None]:
    """In the middle of a run a store that refuses is one that is unavailable: it let us in before.

    Raises:
        StoreUnavailableError: Instead of StoreRefusedError.
    """
    try:
        yield
    except StoreRefusedError as error:
        raise StoreUnavailableError(f"{error} Then the same command goes on.") from error


class Patience:
    """How long the requests to a store are repeated that it may answer well a moment later.

    The clock starts with the first failure of a request, or with that of another one since which
    no request was answered: one that comes during an outage does not wait for all of it again.

    Args:
        deadline_s: Seconds until a request is given up.
    """

    FIRST_DEADLINE_S = 15.0
    """Before the first answer: then the address is wrong more often than the store is broken."""
    FIRST_PAUSE_S = 0.2
    MAX_PAUSE_S = 5.0

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._has_answered = False
        self._silent_since: float | None = None

    def failed(self) -> None:
        """A request got no answer that says anything."""
        self._silent_since = self._silent_since or time.monotonic()

    def answered(self) -> None:
        """The store has answered some request, be it with a refusal."""
        self._has_answered = True
        self._silent_since = None

    def pauses(self) -> Iterator[float]:
        """Seconds to wait after each failure of one request; they end when it is given up."""
        failing_since = time.monotonic()
        pause_s = self.FIRST_PAUSE_S
        while True:
            limit_s = self._deadline_s
            if not self._has_answered:
                limit_s = min(limit_s, self.FIRST_DEADLINE_S)
            since = min(failing_since, self._silent_since or failing_since)
            left_s = since + limit_s - time.monotonic()
            if left_s < SOON_S:
                return
            yield min(pause_s * random.uniform(0.5, 1.0), left_s)
            pause_s = min(2 * pause_s, self.MAX_PAUSE_S)
