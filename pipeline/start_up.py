"""How our processes begin and end: without work that a short-lived process does for nothing."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

COLLECT_AFTER_OBJECTS = 50_000
"""What imports leave behind is no garbage: to look for some every 700 objects costs 0.05 s."""
AGAIN_AFTER_S = 0.05
"""Of a signal that met a callback, or someone at a lock, who is done by then."""
AT_A_LOCK = frozenset(
    {f"Condition.{name}" for name in ("__enter__", "__exit__", "_acquire_restore", "_release_save")}
    | {f"_AcquireFutures.{name}" for name in ("__enter__", "__exit__")}
)
"""Python's own functions that take or leave the locks of semaphores, events, futures and pools."""
Handler = Callable[[int, FrameType | None], None]
EXIT_NOT_PRINTED = 1
NOT_PRINTED = "expected room for what is printed. All else is done; print it somewhere else."
_not_printed: list[OSError] = []


def begin() -> None:
    """Call it before NumPy is imported; processes that start from here inherit a part of it."""
    gc.set_threshold(COLLECT_AFTER_OBJECTS)
    # Nothing here multiplies large matrices in NumPy, and OpenBLAS's threads spin when they start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Pydantic looks for plug-ins in the metadata of all that is installed: 13 ms in each process.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    sys.unraisablehook = _not_lost
    _keep_printing()


class Stop(BaseException):
    """Raised where a signal meets the program; no `except Exception` on the way may take it.

    An attempt that it ends says so by these words: `Stop: SIGTERM`.

    Args:
        number: The signal.
        handler: Raises this, and is not in its place any more.
    """

    def __init__(self, number: int, handler: Handler) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.handler = number, handler


def between_locks(handler: Handler) -> Handler:
    """The handler of a signal, to be called a moment later where the signal meets one at a lock.

    `with` leaves only what it has entered: raised while Python's own code enters or leaves a
    condition, an error leaves the lock taken, and whoever comes next waits for ever.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if _is_at_a_lock(frame):
            _again(number)
        else:
            handler(number, frame)

    return handle


def _is_at_a_lock(frame: FrameType | None) -> bool:
    """Whether one of the calls is; the last may be of a handler that was called there."""
    while frame is not None:
        if frame.f_code.co_qualname in AT_A_LOCK:
            return True
        frame = frame.f_back
    return False


def _again(number: int) -> None:
    timer = threading.Timer(AGAIN_AFTER_S, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _not_lost(found: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a callback, such as importlib's, and a signal with it."""
    if isinstance(found.exc_value, Stop):
        number = found.exc_value.number
        signal.signal(number, found.exc_value.handler)
    elif isinstance(found.exc_value, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        sys.__unraisablehook__(found)
        return
    _again(number)


def _keep_printing() -> None:
    """What cannot be printed changes nothing of what is done."""
    for number in range(3):  # one that is closed (`>&-`) would be the number of the next file
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):  # a console that knows fewer characters than we
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def printing() -> Iterator[None]:
    """For what writes to standard output: that it is full stops nothing; `leave` says it."""
    try:
        yield
    except BrokenPipeError:  # as in `score report ... | head`
        pass
    except OSError as error:
        _not_printed.append(error)


class _NoPandas:
    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def keep_pandas_out() -> None:
    """Let Arrow not look for pandas, whose import takes 0.2 s: `pa.array` asks for its classes.

    PyArrow goes without where pandas cannot be imported, as here for a moment, and tries again in
    `to_pandas`. Source: pyarrow/pandas-shim.pxi.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)


def leave(code: int) -> NoReturn:
    """End this process now: to unload the libraries that it imported takes 0.1 s.

    Whatever has to be closed is closed by now; only what is printed may still wait in a buffer.
    """
    logging.shutdown()
    with printing():
        sys.stdout.flush()
    with suppress(OSError):
        for error in _not_printed[:1]:
            sys.stderr.write(f"error: standard output: {error.strerror}; {NOT_PRINTED}\n")
        sys.stderr.flush()
    os._exit(code or (EXIT_NOT_PRINTED if _not_printed else 0))
