"""What the kernel knows of other processes, which may end while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

STATE, PARENT, GROUP, SESSION, USER_TICKS, SYSTEM_TICKS = 0, 1, 2, 3, 11, 12
"""Places in what `stat_of` gives; proc_pid_stat(5) counts from 1 and has two more in front."""


def stat_of(pid: int) -> list[str] | None:
    """The fields of its stat after the name; None once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[STATE] in "ZX" else fields


def is_alive(pid: int) -> bool:
    """Whether it has not ended; one that its parent has not waited for has."""
    return stat_of(pid) is not None


def alive_with(field: int, value: int) -> list[int]:
    """Processes whose PARENT, GROUP or SESSION is this one."""
    return [pid for pid, fields in _all() if int(fields[field]) == value]


def command_of(pid: int) -> str:
    """Its command line; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _all() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        fields = stat_of(int(folder.name))
        if fields is not None:
            yield int(folder.name), fields
