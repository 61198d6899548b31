"""A small night in a forked process, with the product's own steps and an engine that is a sum."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from crash_night import PATIENCE_S
from night_cases import score_night
from pipeline_cases import SumRunner

from pipeline.config import Job
from pipeline.run import Again

NUM_SHARDS, SHARD_ROWS, BAD_ID = 4, 5, 8
IDS = range(1, NUM_SHARDS * SHARD_ROWS + 1)


def users(version: int) -> pa.Table:
    """One has no feature; scores tell the version."""
    ids = np.array(IDS)
    first = np.where(ids == BAD_ID, np.nan, ids).astype(np.float32)
    return pa.table({"user_id": ids, "f0": first, "f1": np.full(len(ids), 100.0 * version, "f4")})


class LoggingRunner(SumRunner):
    """Writes down the ids that it is asked to score, as they would be seen after a crash."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _score(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        ids = [str(int(first)) for first in batch[:, 0] if first > 0]  # neither padding nor null
        os.write(self._log, "".join(f"{each}\n" for each in ids).encode())
        return super()._score(batch)


def night(job: Job, date: str, log: Path, again: Again = "no") -> None:
    """A night that says in `<log>.published` that it published."""
    if score_night(job, date, LoggingRunner(log), again).status == "published":
        log.with_suffix(".published").touch()


def fork(work: Callable[[], None], error: Path) -> int:
    """A process that does the work; what it raises is written to `error`, and its code is 1."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            error.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int | None:
    """Exit code of a process, or None when it has stopped."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            end(pid)
            raise TimeoutError("it hangs")
        time.sleep(0.0005)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@dataclass(frozen=True, kw_only=True)
class Started:
    """A night that was started."""

    pid: int
    log: Path
    committed: set[int]
    """Shards of its input that were committed when it began."""

    def why(self) -> str:
        """What it raised."""
        error = self.log.with_suffix(".error")
        return error.read_text() if error.exists() else "it raised nothing"

    def scored(self) -> set[int]:
        """Shards of which it has scored a row."""
        ids = self.log.read_text().split() if self.log.exists() else []
        return {(int(each) - 1) // SHARD_ROWS for each in ids}


def damage(path: Path, at: int, *, cut: bool) -> None:
    data = bytearray(path.read_bytes())
    if cut:
        os.truncate(path, at % len(data))
        return
    data[at % len(data)] ^= 1
    with path.open("r+b") as file:  # the same file, as bits rot
        file.write(data)


def hashes(folder: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Path and sha256 of files."""
    for path in folder.glob(pattern):
        if path.is_file():
            yield str(path), hashlib.sha256(path.read_bytes()).hexdigest()
