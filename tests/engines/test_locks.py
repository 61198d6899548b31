"""Leases: kept by signs of life, taken over when these end, and what goes wrong in between."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines.errors import EngineError, LockTimeoutError
from engines.locks import Patience, lease
from pipeline.local_storage import LocalStorage
from pipeline.storage import FileInfo

LEASE_S = 0.3
LIVE_S = 2.0
"""Of owners that live: a sign of life takes as long as the disk does."""
FOLDER = "locks/request"


@pytest.fixture
def files(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def patience(timeout_s: float, said: list[str] | None = None) -> Patience:
    return Patience(timeout_s=timeout_s, say=(said if said is not None else []).append)


def names(files: LocalStorage) -> list[str]:
    return [file.path.removeprefix(f"{FOLDER}/") for file in files.list_files(FOLDER)]


def dead_owner(files: LocalStorage) -> None:
    files.create(f"{FOLDER}/000001.json", b'{"host": "gone-7", "pid": 42, "token": "t"}')
    files.create(f"{FOLDER}/000001.t.3", b"")


def test_a_lease_that_is_renewed_is_not_taken(files: LocalStorage) -> None:
    with (
        lease(files, FOLDER, patience(1), LIVE_S),
        pytest.raises(LockTimeoutError, match=r"held by process \d+ on .* for 3 s"),
        lease(files, FOLDER, patience(1.5 * LIVE_S), LIVE_S),
    ):
        pytest.fail("two owners")


def test_a_silent_owner_is_replaced_after_its_time(
    files: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    dead_owner(files)
    said: list[str] = []
    started = time.monotonic()
    with lease(files, FOLDER, patience(20, said), LEASE_S):
        assert time.monotonic() - started >= LEASE_S
        assert [name for name in names(files) if name.endswith(".json")] == ["000002.json"]
    assert said == ["process 42 on gone-7 builds this engine; waiting for it"]
    assert "taken over, its owner is silent" in caplog.text
    assert names(files) == []


def test_of_several_that_wait_for_a_dead_owner_one_is_next(files: LocalStorage) -> None:
    dead_owner(files)
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with lease(files, FOLDER, patience(30), LIVE_S):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.1)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


class Late(LocalStorage):
    """Somebody takes over from the dead owner, ends, and is followed while we only begin to."""

    was_late = False

    def create(self, path: str, data: bytes) -> bool:
        if path.endswith("000002.json") and not self.was_late:
            self.was_late = True
            super().delete(f"{FOLDER}/000001.t.3")
            super().delete(f"{FOLDER}/000001.json")
            super().create(f"{FOLDER}/000001.json", b"of somebody else")
        return super().create(path, data)


def test_whoever_takes_over_too_late_waits_for_the_next_owner(tmp_path: Path) -> None:
    files = Late(str(tmp_path))
    dead_owner(files)
    with (
        pytest.raises(LockTimeoutError),
        lease(files, FOLDER, patience(1.5 * LEASE_S), LEASE_S),
    ):
        pytest.fail("two owners")
    assert files.was_late
    assert names(files) == ["000001.json"]


def test_a_sign_of_life_without_a_term_holds_nothing(files: LocalStorage) -> None:
    files.create(f"{FOLDER}/000001.t.3", b"")
    with lease(files, FOLDER, patience(0), LEASE_S):
        pass
    assert names(files) == []


def test_an_owner_that_was_replaced_stops_and_leaves_the_next_one_alone(
    files: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    with lease(files, FOLDER, patience(0), LEASE_S):
        files.delete(f"{FOLDER}/000001.json")  # as its successor does
        files.create(f"{FOLDER}/000001.json", b"of somebody else")
        deadline = time.monotonic() + 10
        while "somebody took over from us" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert names(files) == ["000001.json"]


class Unreliable(LocalStorage):
    """Fails for a while."""

    down = False

    def read(self, path: str) -> bytes | None:
        if self.down:
            raise OSError("503 Slow Down")
        return super().read(path)


def test_a_store_that_is_away_for_a_while_ends_neither_build_nor_lease(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Unreliable(str(tmp_path))
    with lease(files, FOLDER, patience(0), LEASE_S):
        files.down = True
        deadline = time.monotonic() + 10
        while "not renewed: 503" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        files.down = False
        before = names(files)
        while names(files) == before:
            assert time.monotonic() < deadline, "no sign of life after the store was back"
            time.sleep(0.01)
    assert names(files) == []


def test_a_lease_that_cannot_be_released_does_not_fail_the_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Unreliable(str(tmp_path))
    with caplog.at_level(logging.WARNING), lease(files, FOLDER, patience(0), LEASE_S):
        files.down = True
    assert "not released: 503" in caplog.text


def test_a_waiter_that_slept_looks_again_before_it_takes_over(
    files: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended for an hour between two looks: the owner renewed meanwhile, and keeps its lease."""
    clock = Sleeper()
    monkeypatch.setattr("engines.locks.time.monotonic", clock.monotonic)
    dead_owner(files)
    beats = 3

    def sleep(_: float) -> None:
        nonlocal beats
        clock.now += 3600
        files.delete(f"{FOLDER}/000001.t.{beats}")
        beats += 1
        files.create(f"{FOLDER}/000001.t.{beats}", b"")

    monkeypatch.setattr("engines.locks.time.sleep", sleep)
    with (
        pytest.raises(LockTimeoutError, match="process 42 on gone-7"),
        lease(files, FOLDER, patience(5 * 3600), LEASE_S),
    ):
        pytest.fail("took over from an owner that is alive")
    assert beats > 5


class Careless(LocalStorage):
    """Replaces what is there, as rclone's S3 server does."""

    def create(self, path: str, data: bytes) -> bool:
        self.delete(path)
        return super().create(path, data)


def test_a_store_that_replaces_objects_is_refused(tmp_path: Path) -> None:
    files = Careless(str(tmp_path))
    with (
        pytest.raises(EngineError, match=r"replaces existing objects; expected conditional"),
        lease(files, FOLDER, patience(0), LEASE_S),
    ):
        pytest.fail("a lease that anybody can take")
    assert names(files) == []


class Interrupted(LocalStorage):
    """Ctrl-C comes right after the first object was made."""

    def create(self, path: str, data: bytes) -> bool:
        super().create(path, data)
        raise KeyboardInterrupt


def test_an_interrupt_while_a_lease_is_acquired_leaves_nothing(tmp_path: Path) -> None:
    files = Interrupted(str(tmp_path))
    with pytest.raises(KeyboardInterrupt), lease(files, FOLDER, patience(0), LEASE_S):
        pytest.fail("went on")
    assert names(files) == []


class Sleeper:
    """A clock that moves when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@contextmanager
def counted(files: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    number = 0
    listing = files.list_files

    def count(prefix: str) -> list[FileInfo]:
        nonlocal number
        number += 1
        return listing(prefix)

    monkeypatch.setattr(files, "list_files", count)
    yield lambda: number


def test_waiting_asks_the_store_about_once_a_second(
    files: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the usual lease of a minute: a bucket charges for every listing."""
    clock = Sleeper()
    monkeypatch.setattr("engines.locks.time.monotonic", clock.monotonic)
    monkeypatch.setattr("engines.locks.time.sleep", lambda s: setattr(clock, "now", clock.now + s))
    dead_owner(files)
    with counted(files, monkeypatch) as number, lease(files, FOLDER, patience(600)):
        assert 60 <= number() <= 62
