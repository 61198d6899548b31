from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable

import pytest

from engines.devices import this_cpu
from engines.errors import AccuracyError, EngineError
from flows.cli import exit_code_of
from pipeline.engine_process import run_bound
from pipeline.errors import LaneError
from tests.engines.small_devices import H200

Say = Callable[[str], None]
GPU = dataclasses.replace(H200, uuid="GPU-1234", name="NVIDIA L4")


def tell(first: int, second: int, *, say: Say) -> tuple[int, int, str | None]:
    say("half way")
    return os.getpid(), first + second, os.environ.get("CUDA_VISIBLE_DEVICES")


def refuse(*, say: Say) -> None:
    say("about to refuse")
    raise AccuracyError("no engine passes")


def fail(*, say: Say) -> None:
    del say
    raise ZeroDivisionError("by zero")


def run_out_of_disk(*, say: Say) -> None:
    del say
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/engine")


def die(*, say: Say) -> None:
    del say
    os._exit(9)


def test_work_runs_in_a_process_that_sees_only_its_gpu() -> None:
    said: list[str] = []
    pid, total, visible = run_bound(GPU, tell, (1, 2), said.append)
    assert pid != os.getpid()
    assert (total, visible, said) == (3, "GPU-1234", ["half way"])


def test_a_cpu_needs_no_binding() -> None:
    assert run_bound(this_cpu(1), tell, (1, 2), lambda _: None)[2] is None


def test_our_own_errors_come_through_as_they_are() -> None:
    with pytest.raises(AccuracyError, match=r"^no engine passes$"):
        run_bound(this_cpu(1), refuse, (), lambda _: None)


def test_other_errors_come_through_as_text() -> None:
    with pytest.raises(LaneError, match=r"ZeroDivisionError.*by zero"):
        run_bound(this_cpu(1), fail, (), lambda _: None)


def test_a_full_disk_stays_one_so_that_the_night_may_go_on_later() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        run_bound(this_cpu(1), run_out_of_disk, (), lambda _: None)
    assert (exit_code_of(caught.value), caught.value.filename) == (75, "/cache/engine")


def test_a_process_that_dies_is_an_error_with_its_code() -> None:
    said = "^work on NVIDIA L4: its process ended with code 9; expected a result"
    with pytest.raises(EngineError, match=said):
        run_bound(GPU, die, (), lambda _: None)


def test_an_interruption_of_the_parent_ends_the_process() -> None:
    pids: list[int] = []

    def interrupt(text: str) -> None:
        pids.append(int(text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bound(this_cpu(1), linger, (), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def linger(*, say: Say) -> None:
    import time

    say(str(os.getpid()))
    time.sleep(60)
