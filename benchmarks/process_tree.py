"""Run a command and measure its whole process tree from outside, with what /proc tells.

CPU seconds and resident memory of every process below this one count: workers, and the daemons
that a framework leaves behind. Linux; standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_PERIOD_S, ORPHAN_GRACE_S = 0.1, 5.0
MAX_STDERR_CHARACTERS = 400

Process = tuple[int, str]
"""Process id and start time: ids are used again."""


class CommandError(Exception):
    """A command did not end well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a command printed, and what it used."""

    stdout: str
    wall_s: float
    """From spawn to exit."""
    cpu_s: float
    peak_rss_bytes: int
    """Sum over the tree; pages that processes share count once for each."""
    other_load_cores: float
    """Cores that processes of others kept busy meanwhile."""


def adopt_orphans() -> None:
    """Become the parent of orphans below: their CPU time is seen, and none outlives its run."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_measured(
    command: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Usage:
    """Run a command to its end, and end whatever it leaves behind.

    Raises:
        CommandError: It cannot start, takes too long, or fails; with the end of its stderr.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        cpu_before, machine_before, start = _children_cpu_s(), _machine_cpu_s(), time.monotonic()
        sampler = TreeSampler()
        sampler.start()
        try:
            process = subprocess.Popen(
                command, stdout=out, stderr=err, start_new_session=True, cwd=cwd,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
            status = process.wait(timeout_s)
            wall_s = time.monotonic() - start
            end_processes(ORPHAN_GRACE_S)
        except subprocess.TimeoutExpired:
            raise CommandError(f"no end after {timeout_s:.0f} s") from None
        except OSError as error:
            raise CommandError(str(error)) from None
        finally:
            end_processes(0)
            sampler.stop()
        out.seek(0)
        err.seek(0)
        if status:
            tail = " ".join(err.read()[-MAX_STDERR_CHARACTERS:].split())
            raise CommandError(f"exit status {status}; stderr ends with: {tail or 'nothing'}")
        # rusage lacks processes whose parent ignores SIGCHLD (Ray's workers), samples lack the
        # last instants of each process: the larger of the two is the better lower bound.
        cpu_s = max(_children_cpu_s() - cpu_before, sum(sampler.cpu_s.values()))
        other_s = max(0.0, _machine_cpu_s() - machine_before - cpu_s)
        return Usage(
            stdout=out.read(),
            wall_s=wall_s,
            cpu_s=cpu_s,
            peak_rss_bytes=sampler.peak_rss_bytes,
            other_load_cores=other_s / (time.monotonic() - start),
        )


class TreeSampler(threading.Thread):
    """CPU seconds of each process seen below this one, and the peak of their resident bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.cpu_s: dict[Process, float] = {}
        self.peak_rss_bytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look ten times a second."""
        while not self._stopped.wait(SAMPLE_PERIOD_S):
            tree = read_descendants()
            self.cpu_s |= {process: cpu_s for process, (cpu_s, _) in tree.items()}
            self.peak_rss_bytes = max(self.peak_rss_bytes, sum(rss for _, rss in tree.values()))

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self.join()


def read_descendants() -> dict[Process, tuple[float, int]]:
    """CPU seconds and resident bytes of every process below this one."""
    children: dict[int, list[tuple[int, list[str]]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stat = _read_stat(name)
            children.setdefault(int(stat[1]), []).append((int(name), stat))
    found: dict[Process, tuple[float, int]] = {}
    parents = [os.getpid()]
    while parents:
        for pid, stat in children.get(parents.pop(), []):
            cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
            found[pid, stat[19]] = cpu_s, int(stat[21]) * os.sysconf("SC_PAGE_SIZE")
            parents.append(pid)
    return found


def _read_stat(pid: str) -> list[str]:
    """Fields of /proc/PID/stat from the state on, which comes after the name in parentheses."""
    # A plain read: done ten times a second for every process, `Path.read_text` would be a load.
    file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try:
        return os.read(file, 1024).rpartition(b")")[2].decode().split()
    finally:
        os.close(file)


def end_processes(grace_s: float) -> None:
    """Reap everything below this process; kill what is still there after `grace_s`."""
    deadline = time.monotonic() + grace_s
    while tree := read_descendants():
        for pid, _ in tree if time.monotonic() > deadline else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _machine_cpu_s() -> float:
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")
