"""Errors of the pipeline.

PipelineError
|-- ConfigError            the job file or the command is wrong: exit 2
|   `-- StoreRefusedError  a store does not let us in: exit 2, or 75 once a run has begun
|-- InputError             the data is wrong: exit 1
|   `-- InputChangedError  an input file is not the one that the run started with
|-- StorageError           the store does not keep its promises: exit 1
|   `-- StoreUnavailableError  it is full or out of reach; the same command resumes: exit 75
|-- LaneError              a worker process died more often than is allowed: exit 1
|-- VerifyError            published output does not agree with its input: exit 1
|-- MailError              a mail was not sent; the run is not touched: exit 1
|-- GuardError             a limit of the job file stopped publication: exit 3
`-- Interrupted            stopped from outside; the same command resumes: exit 75

Messages read `<what>: <found>; expected <what>. <what to do>.` and fit in one sentence or two.
"""

from __future__ import annotations

from collections.abc import Iterable

from engines.errors import EngineError
from engines.masking import masked

GUARDS = ("rows", "quarantine", "budget", "scores", "drift")
"""What may stop publication; pipeline/guards.py says when."""


class PipelineError(Exception):
    """Base of all errors that the pipeline raises on purpose; `exit_code` is the command's.

    Messages quote addresses and what libraries say: secrets in them are masked.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class ConfigError(PipelineError):
    """The job file, the prices file or a command-line value is wrong."""

    exit_code = 2


class StoreRefusedError(ConfigError):
    """A disk or a bucket is not there, or forbids what the run needs."""


class InputError(PipelineError):
    """The input dataset cannot be scored as it is."""


class InputChangedError(InputError):
    """An input file has another size or version than when the run was planned."""


class StorageError(PipelineError):
    """The store does not keep its promises, or holds what a run may not take or replace."""


class StoreUnavailableError(StorageError):
    """The store is full, broken or out of reach; what is committed stays, the command goes on."""

    exit_code = 75


class LaneError(PipelineError):
    """A lane's process died, or reported an error that is not one row's fault."""


class VerifyError(PipelineError):
    """What was published does not agree with the input, or is damaged."""


class MailError(PipelineError):
    """A mail was not sent; whatever it is about is not touched by that."""


class GuardError(PipelineError):
    """A limit of the job was exceeded; nothing was published.

    Args:
        guard: Which one, of `GUARDS`.
        message: What was found, and the ways out.
    """

    exit_code = 3

    def __init__(self, guard: str, message: str) -> None:
        super().__init__(message)
        self.guard = guard

    def __reduce__(self) -> tuple[type[GuardError], tuple[str, str]]:
        """For pickling: an error's own way knows only the message."""
        return GuardError, (self.guard, str(self))


def known_guards(names: Iterable[str]) -> frozenset[str]:
    """The names; ConfigError when one of them is none of `GUARDS`."""
    unknown = sorted(set(names) - set(GUARDS))
    if unknown:
        raise ConfigError(
            f"--accept {unknown[0]}: no such guard; expected one of {', '.join(GUARDS)}."
        )
    return frozenset(names)


class Interrupted(PipelineError):
    """The run was stopped from outside; committed shards stay, the same command goes on."""

    exit_code = 75


def one_line(error: BaseException) -> str:
    """What a library's error says, on one line: ours are one sentence."""
    return " ".join(str(error).split())


def portable(error: Exception) -> Exception:
    """The error itself when it survives pickling (our own do), else its text."""
    if isinstance(error, (PipelineError, EngineError)):
        return error
    notes = "; ".join(getattr(error, "__notes__", []))
    return LaneError(f"{type(error).__name__}: {error} ({notes})" if notes else repr(error))
