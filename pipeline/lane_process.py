"""How a lane's process begins: it imports while its parent plans, and is bound to its device."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

from engines.devices import show_only
from pipeline import start_up
from pipeline.work_marks import WorkMarks

THREADS = Path("/proc/self/task")


def lane_main(connection: Connection, marks: WorkMarks) -> None:
    """Entry point of the process; ends when the parent closes its inbox or dies.

    What every lane needs is imported before it is known what the process is bound to.

    Args:
        connection: To the parent; a `Binding` comes first.
        marks: Where it says what rows it is at.
    """
    start_up.begin()
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the group: the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=die_with_parent, name="watch-parent", daemon=True).start()
    from pipeline.lane_child import score_what_comes  # no runtime, and nothing that uses CUDA

    try:
        binding = connection.recv()
    except (EOFError, OSError):  # the parent does not need us
        return
    bind_process(binding.gpu_uuid, binding.cores)
    for name in binding.ahead:
        module, _, function = name.partition(":")
        with suppress(Exception):  # told with its reason where it is used
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
    score_what_comes(connection, marks)
    start_up.leave(0)


def bind_process(gpu_uuid: str | None, cores: frozenset[int]) -> None:
    """Let this process see one GPU or slice, and run on the cores near to it.

    Before CUDA is used: later it has no effect. Threads that libraries started when they were
    imported are bound, too, and those that come later inherit it.
    """
    show_only(gpu_uuid)
    if not cores:
        return
    for thread in THREADS.iterdir():
        with suppress(OSError):  # cores taken away meanwhile, or a thread: slower, not wrong
            os.sched_setaffinity(int(thread.name), cores)


def die_with_parent() -> None:
    """End this process when the parent is gone, so that nothing keeps the device."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
