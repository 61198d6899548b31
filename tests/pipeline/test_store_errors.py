"""Errors of a store: what they mean, what they say, and how long it is asked again."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.errors import (
    ConfigError,
    GuardError,
    PipelineError,
    StorageError,
    StoreRefusedError,
    StoreUnavailableError,
)
from pipeline.local_storage import LocalStorage
from pipeline.storage import open_storage, probe
from pipeline.store_errors import Patience, named, resumable, why


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("pipeline.store_errors.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def ask(clock: Clock, patience: Patience) -> list[float]:
    """The pauses of a request that always fails at once."""
    patience.failed()
    found = []
    for pause_s in patience.pauses():
        found.append(pause_s)
        clock.now += pause_s
    return found


def all_errors(base: type[Exception]) -> list[type[Exception]]:
    """Of the pipeline; other packages' are none of a lane's."""
    kinds = [kind for kind in base.__subclasses__() if kind.__module__ == errors.__name__]
    return [base, *(each for kind in kinds for each in all_errors(kind))]


@pytest.mark.parametrize("kind", all_errors(PipelineError))
def test_every_error_survives_the_way_out_of_a_lanes_process(kind: type[PipelineError]) -> None:
    words = (
        ("rows", "what: found; expected.") if kind is GuardError else ("what: found; expected.",)
    )
    error = kind(*words)
    error.add_note("Pipeline stage: write")
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is kind
    assert (str(there), there.exit_code) == (str(error), error.exit_code)
    assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN]
)
def test_a_full_or_broken_disk_is_unavailable_and_the_command_goes_on(number: int) -> None:
    with (
        pytest.raises(StoreUnavailableError, match=r"^/out/a: .*; expected .*same command goes on"),
        named("/out/a"),
    ):
        raise OSError(number, os.strerror(number))
    assert StoreUnavailableError.exit_code == 75


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR])
def test_what_is_forbidden_is_a_wrong_setting_until_the_run_has_begun(number: int) -> None:
    with pytest.raises(StoreRefusedError, match=r"^/out: .*; expected access") as caught:
        with named("/out"):
            raise OSError(number, os.strerror(number))
    assert isinstance(caught.value, ConfigError)
    with pytest.raises(StoreUnavailableError, match=r"^/out: .*the same command goes on"):
        with resumable():
            raise caught.value


def test_what_is_missing_or_damaged_is_no_error_of_the_store() -> None:
    for error in (FileNotFoundError(errno.ENOENT, "No such file"), OSError("Couldn't read page")):
        with pytest.raises(type(error)) as caught, resumable(), named("/in"):
            raise error
        assert caught.value is error


def test_what_went_wrong_is_said_on_one_line_and_once() -> None:
    assert why(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert why(ValueError("one\n  two")) == "one two"
    assert why(KeyError()) == "KeyError"
    with pytest.raises(StoreRefusedError) as caught, named("/out"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert why(caught.value) == "Permission denied"


def failing(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"pipeline.local_storage.{call}", fail)


@pytest.mark.parametrize("call", ["os.link", "os.fsync", "Path.open", "Path.mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_write_that_fails_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    storage = LocalStorage(str(tmp_path))
    with monkeypatch.context() as patch:
        failing(patch, call, number)
        with pytest.raises(StoreUnavailableError, match=rf"a/part: {os.strerror(number)}; "):
            storage.create("a/part", b"whole")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert storage.create("a/part", b"whole")


@pytest.mark.parametrize("call", ["os.link", "os.fsync", "os.rename"])
def test_a_publication_that_fails_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.create("run/part", b"part")
    with monkeypatch.context() as patch:
        failing(patch, call, errno.ENOSPC)
        with pytest.raises(StoreUnavailableError, match="No space left"):
            storage.publish({"a.parquet": "run/part"}, b"{}", "job/dt=1")
    assert [info.path for info in storage.list_files("")] == ["run/part"]
    assert storage.publish({"a.parquet": "run/part"}, b"{}", "job/dt=1")


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "dt=1").mkdir(parents=True)
    failing(monkeypatch, "os.scandir", errno.EIO)
    with pytest.raises(StoreUnavailableError, match="in: Input/output error"):
        LocalStorage(str(tmp_path)).list_files("in")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreUnavailableError),
        (errno.EIO, StoreUnavailableError),
        (errno.EROFS, ConfigError),
        (errno.EACCES, ConfigError),
    ],
)
def test_at_the_start_a_full_disk_is_resumable_and_a_forbidden_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[PipelineError]
) -> None:
    failing(monkeypatch, "os.link", number)
    with pytest.raises(kind, match=os.strerror(number)):
        probe(open_storage(str(tmp_path)), "job/_runs")


def test_pauses_grow_vary_and_end_with_the_deadline(clock: Clock) -> None:
    patience = Patience(60.0)
    patience.answered()
    began = clock.now
    first = ask(clock, patience)
    assert clock.now - began == pytest.approx(60.0)
    assert 0.1 <= first[0] <= 0.2
    assert max(first) <= Patience.MAX_PAUSE_S
    assert len(first) < 30
    patience.answered()
    second = ask(clock, patience)
    assert first != second


def test_a_store_that_has_never_answered_gets_less_time(clock: Clock) -> None:
    patience = Patience(60.0)
    began = clock.now
    ask(clock, patience)
    assert clock.now - began == pytest.approx(Patience.FIRST_DEADLINE_S)


def test_an_outage_is_waited_for_once(clock: Clock) -> None:
    patience = Patience(60.0)
    patience.answered()
    ask(clock, patience)
    assert ask(clock, patience) == []  # another request, still without an answer
    patience.answered()
    assert len(ask(clock, patience)) > 10


def test_a_request_that_alone_fails_is_given_up_too(clock: Clock) -> None:
    patience = Patience(30.0)
    patience.answered()
    began = clock.now
    for pause_s in patience.pauses():
        clock.now += pause_s
        patience.answered()  # others go through
        patience.failed()
    assert clock.now - began == pytest.approx(30.0)


def test_a_store_that_breaks_its_promise_is_not_resumable() -> None:
    assert StorageError.exit_code == 1
