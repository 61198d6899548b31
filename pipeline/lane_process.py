"""How a lane's process begins: bound to its device, and importing while its parent plans."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait

from engines.devices import show_only
from pipeline import start_up
from pipeline.work_marks import WorkMarks


def lane_main(
    connection: Connection,
    marks: WorkMarks,
    gpu_uuid: str | None,
    cores: frozenset[int],
    ahead: tuple[str, ...],
) -> None:
    """Entry point of the process; ends when the parent closes its inbox or dies.

    Args:
        connection: To the parent.
        marks: Where it says what rows it is at.
        gpu_uuid: The one GPU or slice that it may see; None: it computes on the CPU.
        cores: That it is bound to; empty: not bound.
        ahead: Modules that it will need; to import them takes about as long as the plan.
    """
    start_up.begin()
    bind_process(gpu_uuid, cores)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the group: the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=die_with_parent, name="watch-parent", daemon=True).start()
    from pipeline.lane_child import score_what_comes  # after it is bound: NumPy starts threads

    for module in ahead:
        with suppress(ImportError):  # told with its reason where it is used
            importlib.import_module(module)
    score_what_comes(connection, marks)
    start_up.leave(0)


def bind_process(gpu_uuid: str | None, cores: frozenset[int]) -> None:
    """Let this process see one GPU or slice, and run on the cores near to it.

    Before CUDA is used and threads are started: later, both would have no effect on them.
    """
    show_only(gpu_uuid)
    if cores:
        with suppress(OSError):  # cores taken away meanwhile: slower, not wrong
            os.sched_setaffinity(0, cores)


def die_with_parent() -> None:
    """End this process when the parent is gone, so that nothing keeps the device."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
