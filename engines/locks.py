"""Locks on a build: a file lock on a local disk, a lease on an object store.

Both only save work. What is published is safe without them: publication creates and never
overwrites, so that two builders of one engine end up with the engine of one of them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.errors import EngineError, LockTimeoutError
from engines.files import FileStore

log = logging.getLogger(__name__)

FILE_POLL_S = 0.2
LEASE_S = 60.0
"""A lease that was not renewed for so long belongs to whoever is next."""
POLLS_PER_LEASE = 60
BEATS_PER_LEASE = 6

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How a lock is waited for."""

    timeout_s: float
    say: Say
    """Told once that, and on whom, we wait."""


@contextmanager
def file_lock(path: Path, patience: Patience) -> Iterator[None]:
    """Hold a lock that the kernel frees when its owner dies.

    Raises:
        LockTimeoutError: Somebody else has held it for too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = _Waiting(str(path), patience)
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting.go_on("another process of this machine", FILE_POLL_S)
        yield


@contextmanager
def lease(
    files: FileStore, folder: str, patience: Patience, lease_s: float = LEASE_S
) -> Iterator[None]:
    """Hold a lease: objects that its owner renews, and that somebody else takes over if it stops.

    `<folder>/<term>.json` is created by its owner, and only by one; `<folder>/<term>.<owner>.<n>`
    are its signs of life. Whoever waits takes the next term when nothing has changed for
    `lease_s` of its own clock: clocks of two machines are never compared.

    Raises:
        LockTimeoutError: Others have held it for too long.
        EngineError: The store replaces objects, so that nothing in it can be held.
    """
    owner = _Owner(files, folder)
    beats = threading.Thread(
        target=owner.beat, args=(lease_s / BEATS_PER_LEASE,), name="lease", daemon=True
    )
    try:  # a signal may come in the middle of acquiring it
        owner.acquire(patience, lease_s)
        beats.start()
        yield
    finally:
        owner.stop.set()
        if beats.ident is not None:
            beats.join()
        owner.release()


class _Waiting:
    """Waits with a deadline, and says so once."""

    def __init__(self, what: str, patience: Patience) -> None:
        self._what = what
        self._patience = patience
        self._deadline = time.monotonic() + patience.timeout_s
        self._said = False

    def go_on(self, owner: str, pause_s: float) -> None:
        if time.monotonic() > self._deadline:
            raise LockTimeoutError(
                f"{self._what}: held by {owner} for {self._patience.timeout_s:.0f} s; expected its "
                "build to end. Look for a hanging `score` process."
            )
        if not self._said:
            self._patience.say(f"{owner} builds this engine; waiting for it")
            self._said = True
        time.sleep(pause_s)


class _Owner:
    """One owner of a lease, or somebody who wants to be."""

    def __init__(self, files: FileStore, folder: str) -> None:
        self._files = files
        self._folder = folder
        self._token = uuid.uuid4().hex
        self._data = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        ).encode()
        self._term = 0
        self._num_beats = 0
        self.stop = threading.Event()

    def acquire(self, patience: Patience, lease_s: float) -> None:
        waiting = _Waiting(f"{self._files.uri}/{self._folder}", patience)
        last, since, holder = None, time.monotonic(), None
        while True:
            now = time.monotonic()  # before looking: a pause in between must not look like silence
            state = self._paths()
            held = max(map(_term_of, state), default=0)
            if state != last:
                last, since, holder = state, now, self._read_term(held)
            if held == 0 or now - since >= lease_s:
                self._term = held + 1
                if self._files.create(self._path, self._data):
                    self._prove_exclusive()
                    if self._read_term(held) != holder:  # another took it over, and is done since
                        self._files.delete(self._path)
                        continue
                    self._clear(state)
                    if held:
                        log.warning("%s/%s: taken over, its owner is silent.", *self._where)
                    return
                continue
            waiting.go_on(self._describe(held), lease_s / POLLS_PER_LEASE)

    def _prove_exclusive(self) -> None:
        if self._files.create(self._path, b"{}"):
            self._files.delete(self._path)
            raise EngineError(
                f"{self._files.uri}: the store replaces existing objects; expected conditional "
                "writes (If-None-Match). Machines could overwrite each other: use another store."
            )

    def beat(self, period_s: float) -> None:
        """Renew until told to stop, or until somebody has taken over."""
        while not self.stop.wait(period_s):
            try:
                if self._files.read(self._path) != self._data:
                    log.warning(
                        "%s/%s: somebody took over from us; this build goes on and may be one too "
                        "many, which does no harm.",
                        *self._where,
                    )
                    return
                self._num_beats += 1
                self._files.create(self._beat_path(self._num_beats), b"")
                self._files.delete(self._beat_path(self._num_beats - 1))
            except Exception as error:  # the store may be back for the next one
                log.warning("%s/%s: not renewed: %s", *self._where, error)

    def release(self) -> None:
        try:
            # The term goes last: as long as it is there, everybody sees that the lease is held.
            self._clear({path for path in self._paths() if f".{self._token}." in path})
            if self._files.read(self._path) == self._data:
                self._files.delete(self._path)
        except Exception as error:  # what was built counts; a lease that is left behind ends itself
            log.warning("%s/%s: not released: %s", *self._where, error)

    @property
    def _where(self) -> tuple[str, str]:
        return self._files.uri, self._folder

    @property
    def _path(self) -> str:
        return f"{self._folder}/{self._term:06d}.json"

    def _beat_path(self, number: int) -> str:
        return f"{self._folder}/{self._term:06d}.{self._token}.{number}"

    def _paths(self) -> set[str]:
        return {file.path for file in self._files.list_files(self._folder)}

    def _clear(self, paths: set[str]) -> None:
        for path in paths:
            self._files.delete(path)

    def _read_term(self, term: int) -> bytes | None:
        return self._files.read(f"{self._folder}/{term:06d}.json")

    def _describe(self, term: int) -> str:
        try:
            owner = json.loads(self._read_term(term) or b"{}")
            return f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError):  # released meanwhile
            return "another process"


def _term_of(path: str) -> int:
    """The term that a path stands for; 0 for a sign of life, which holds nothing by itself."""
    found = re.search(r"/(\d+)\.json$", path)
    return int(found[1]) if found else 0
