"""How processes begin and end: nothing that was printed or scored is lost by leaving early."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed waits in a buffer, as it does unless someone asked for something else."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


LEAVE = "from pipeline import start_up; start_up.begin(); print('x' * 1000); start_up.leave({})"


def leave(code: int, stdout: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LEAVE.format(code)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("code", [0, 3, 75])
def test_what_was_printed_arrives_before_a_process_leaves(code: int) -> None:
    done = leave(code)
    assert (done.returncode, done.stdout, done.stderr) == (code, "x" * 1000 + "\n", "")


def test_a_reader_that_went_away_is_no_error() -> None:
    command = f'{sys.executable} -c "{LEAVE.format(0)}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("code", "said"), [(0, 1), (3, 3)])
def test_a_full_disk_behind_the_output_is_told_in_a_sentence(code: int, said: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = leave(code, full.fileno())
    assert done.returncode == said
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: standard output: No space left")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_output_changes_nothing(closed: str, tmp_path: Path) -> None:
    opens = f"import sys; print('y', file=sys.stderr); assert open('{tmp_path}/f').fileno() > 2"
    (tmp_path / "f").touch()
    script = LEAVE.format(0).replace("start_up.leave", f"{opens}; start_up.leave")
    command = f'{sys.executable} -c "{script}" {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_character_that_a_console_does_not_know_is_escaped(encoding: str) -> None:
    script = LEAVE.format(0).replace("'x' * 1000", r"'\u65e5'")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u65e5\n", "")


def test_numpy_starts_no_threads_of_its_own() -> None:
    count = "import numpy, os; print(len(os.listdir('/proc/self/task')))"
    source = f"from pipeline import start_up; start_up.begin(); {count}"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def test_arrow_does_not_import_pandas_until_somebody_asks_for_it() -> None:
    script = """
import sys
from pipeline.start_up import keep_pandas_out
keep_pandas_out()
import pyarrow as pa
table = pa.Table.from_pylist([{"a": 1}])
print("pandas" in sys.modules)
print(table.to_pandas()["a"].tolist(), "pandas" in sys.modules)
keep_pandas_out()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["False", "[1] True"]


RESUME = "received; committed shards are kept. Run the same command again to go on."


@pytest.mark.parametrize(
    ("name", "inside", "said"),
    [
        ("SIGINT", "nullcontext()", "KeyboardInterrupt()"),
        ("SIGINT", "interruptible()", f"Interrupted('SIGINT {RESUME}')"),
        ("SIGTERM", "interruptible()", f"Interrupted('SIGTERM {RESUME}')"),
    ],
)
def test_a_signal_that_meets_a_callback_is_not_lost(name: str, inside: str, said: str) -> None:
    script = f"""
import os, signal, time
from contextlib import nullcontext
from flows.commands.terminal import interruptible
from pipeline import start_up
start_up.begin()
signal.signal(signal.SIGINT, signal.default_int_handler)
class Meets:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(1)
try:
    with {inside}:
        del (met := [Meets()])[0]
        time.sleep(90)
except BaseException as error:
    print(repr(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == (said + "\n", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_meets_one_at_a_lock_leaves_no_lock_taken(name: str) -> None:
    """Other threads of a pool, say, would wait for it for ever."""
    script = f"""
import os, signal, time
from functools import partial
from threading import Condition, Lock
from types import SimpleNamespace
from flows.commands.terminal import interruptible
lock = Lock()
lock.acquire()
# What the condition calls as soon as it has its lock: C, so that the signal meets its own frame.
met = partial(os.kill, os.getpid(), signal.{name})
condition = Condition(SimpleNamespace(
    acquire=lock.acquire, release=lock.release,
    __enter__=met, __exit__=lambda *_: lock.release(),
))
try:
    with interruptible():
        with condition:
            print("inside")
        time.sleep(90)
except BaseException as error:
    print(repr(error), lock.locked())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == f"inside\nInterrupted('{name} {RESUME}') False\n", done.stderr
