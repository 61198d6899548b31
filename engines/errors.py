"""Errors of the engine layer.

EngineError
|-- ModelError          the model or what the job says of it is wrong
|-- EngineNotFoundError no engine of the store has the key that was asked for, or several have
|-- AccuracyError       no engine reaches the accuracy that the job demands
|-- EngineCorruptError  a stored engine is not what was published, or computes something else
|-- LockTimeoutError    another process has been building the same engine for too long
|-- RollbackError       no earlier engine may answer the job's request again
|-- BuildError          a compiler refused the graph, or gave it up
|-- CudaError           a call to the driver or to the CUDA runtime failed
`-- OutOfDeviceMemoryError  device or pinned memory does not hold batches of this size
"""

from __future__ import annotations

import errno

from engines.masking import masked

SHORT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE})
"""Errors of a machine that may be well again tomorrow; an engine is for all nights."""


class EngineError(Exception):
    """Base of all errors that the engine layer raises on purpose; secrets in them are masked."""

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class ModelError(EngineError):
    """The model cannot be loaded, exported, or does not fit its description."""


class EngineNotFoundError(EngineError):
    """A key, or the beginning of one, that does not name exactly one stored engine."""


class AccuracyError(EngineError):
    """Every candidate failed, or missed the gate on held-out rows."""


class EngineCorruptError(EngineError):
    """A stored engine differs from its manifest, or its probe batch gives other results."""


class LockTimeoutError(EngineError):
    """The lock on a build was not free in time."""


class RollbackError(EngineError):
    """There is no earlier engine, or it answers another request, or may not be used."""


class BuildError(EngineError):
    """A compiler such as TensorRT's builder refused the graph, or gave it up."""


class CudaError(EngineError):
    """A call of the CUDA runtime failed, or work that was queued before it did."""


class OutOfDeviceMemoryError(EngineError):
    """The device's memory, or pinned host memory, is used up; a smaller batch may fit."""


def raise_if_short(error: Exception) -> None:
    """Raise an error that says nothing of the candidate, or it would be left out for good.

    Raises:
        CudaError: The device serves this process no more: all other candidates would fail, too.
        MemoryError: There is too little memory just now.
        OSError: A disk is full or fails, or too many files are open.
    """
    if isinstance(error, CudaError | MemoryError) or (
        isinstance(error, OSError) and error.errno in SHORT
    ):
        raise error
