"""When a process began, by the kernel's clock: a wall clock may jump."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


def process_age_s(pid: int) -> float | None:
    """Seconds since a process began; None: there is none, it is a zombie, or this is no Linux."""
    ticks = _start_ticks(pid)
    if ticks is None:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def process_name(pid: int) -> str:
    """A name that no other process of this machine ever has; empty as above."""
    ticks = _start_ticks(pid)
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{pid}/{ticks}" if ticks is not None else ""
    return ""


def _start_ticks(pid: int) -> int | None:
    """Ticks from boot to its start: the 22nd field of its `stat`. Source: proc_pid_stat(5)."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) if fields[0] != "Z" else None
    return None
