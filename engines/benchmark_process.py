"""The parent's side of a variant's process: commands, replies, time limits, and no leftovers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from engines.benchmark_child import Broken, Command, variant_main
from engines.benchmark_variants import Variant
from engines.errors import EngineError

END_TIMEOUT_S = 10.0
T = TypeVar("T")


class VariantProcess:
    """The process of one variant; a context manager that leaves nothing behind."""

    def __init__(self, variant: Variant, rows: Path) -> None:
        context = multiprocessing.get_context("spawn")  # runtimes do not survive a fork
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(
            target=variant_main, args=(self._theirs, variant, rows), name=variant.name, daemon=True
        )

    def __enter__(self) -> VariantProcess:
        self._process.start()
        self._theirs.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let it end by itself; what is left of it then is killed, at once after an error."""
        self._connection.close()
        self._process.join(END_TIMEOUT_S if kind is None else 0)
        self.kill()

    def kill(self) -> None:
        """End it now."""
        if self._process.pid is None:
            return
        with suppress(ProcessLookupError):  # it has not begun its own group yet, or all are gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def ask(self, command: Command, expected: type[T], timeout_s: float) -> T:
        """Send a command and wait for its reply.

        Raises:
            EngineError: It failed, in which case the process goes on.
            ConnectionError: The process is dead, or was killed because it did not answer in time.
        """
        try:
            self._connection.send(command)
            if not self._connection.poll(timeout_s):
                self.kill()
                raise ConnectionError(f"no answer in {timeout_s:.0f} s; its process was killed")
            reply = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            raise ConnectionError(f"its process died (exit code {code})") from None
        if isinstance(reply, Broken):
            raise EngineError(reply.error)
        assert isinstance(reply, expected)
        return reply
