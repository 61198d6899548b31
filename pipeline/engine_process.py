"""Build an engine in a process of its own, which sees one GPU and gives its memory back.

A process that has used CUDA keeps some of the device's memory, and sees the GPUs that it saw first:
the parent of several lanes must do neither.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from engines.devices import Device, Gpu
from engines.errors import EngineError
from pipeline.errors import portable
from pipeline.lane_process import bind_process, die_with_parent
from pipeline.store_errors import is_outage

Say = Callable[[str], None]
Work = Callable[..., Any]
"""A module's function; its keyword argument `say` is told what takes long."""


@dataclass(frozen=True, slots=True)
class _Ended:
    result: Any
    error: Exception | None


def run_bound(device: Device, work: Work, arguments: tuple[Any, ...], say: Say) -> Any:
    """Call `work(*arguments, say=...)` in a spawned process that sees only this device.

    Raises:
        Exception: What `work` raised, where it is one of our own.
        OSError: Some store was out of reach or full.
        LaneError: Another error; its text.
        EngineError: The process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    uuid = device.uuid if isinstance(device, Gpu) else None
    process = context.Process(target=_main, args=(theirs, uuid, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while isinstance(message := ours.recv(), str):
            say(message)
    except EOFError:
        process.join()
        raise EngineError(
            f"work on {device.name}: its process ended with code {process.exitcode}; expected a "
            "result. Look at the lines above; -9 is a lack of memory."
        ) from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if message.error is not None:
        raise message.error
    return message.result


def _main(connection: Connection, uuid: str | None, work: Work, arguments: tuple[Any, ...]) -> None:
    bind_process(uuid, frozenset())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group: the parent decides
    threading.Thread(target=die_with_parent, name="watch-parent", daemon=True).start()
    try:
        connection.send(_Ended(work(*arguments, say=connection.send), None))
    except Exception as error:  # the boundary of the process
        connection.send(_Ended(None, _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """As `portable`, but a full disk stays one: the same command goes on later."""
    if isinstance(error, OSError) and is_outage(error):
        return OSError(error.errno, error.strerror, error.filename)
    return portable(error)
