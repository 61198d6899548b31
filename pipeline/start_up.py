"""How our processes begin and end: without work that a short-lived process does for nothing."""

from __future__ import annotations

import gc
import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

COLLECT_AFTER_OBJECTS = 50_000
"""What imports leave behind is no garbage: to look for some every 700 objects costs 0.05 s."""


def begin() -> None:
    """Call it before NumPy is imported; processes that start from here inherit a part of it."""
    gc.set_threshold(COLLECT_AFTER_OBJECTS)
    # Nothing here multiplies large matrices in NumPy, and OpenBLAS's threads spin when they start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


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
    with suppress(BrokenPipeError):  # as in `score report ... | head`
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
