"""The process of one benchmark variant: loads its files, then runs what it is told, when told.

It leads a process group of its own, so that whoever ends it ends the compilers that it started.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from engines.benchmark_variants import Variant
from engines.candidates import Candidate
from engines.devices import Gpu, show_only
from engines.errors import EngineError
from engines.load import make_runner
from engines.model import shown
from engines.runner import Array, Outputs, Runner

KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """Load and compile a candidate, and keep it open."""

    candidate: Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Run batches one after the other through `Runner.infer`, as at night, for a while."""

    batch_size: int
    duration_s: float
    answers: Path | None = None
    """Gets the outputs of the first time that each row was run (.npz); None: not kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Run single batches, each after the one before is done, for a while."""

    batch_size: int
    duration_s: float


Command = Open | Stream | Series


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A candidate is loaded and has run once."""

    load_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """What a stream of batches took."""

    num_rows: int
    wall_s: float
    cpu_s: float
    """CPU time of the whole process."""
    peak_rss_bytes: int
    """Largest resident memory of the process until now, compilation included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Seconds of each single batch."""

    latencies_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """The command failed; the process goes on."""

    error: str


Reply = Opened | Streamed | Timed | Broken


def variant_main(connection: Connection, variant: Variant, rows_path: Path) -> None:
    """Entry point of the process; ends when the parent closes the connection or dies."""
    os.setsid()  # Ctrl-C goes to the parent alone
    show_only(variant.device.uuid if isinstance(variant.device, Gpu) else None)
    threading.Thread(target=_die_with_parent, name="watch-parent", daemon=True).start()
    # Copy on write: the runners get arrays that may be written, and the pages are shared.
    rows = np.load(rows_path, mmap_mode="c")
    with ExitStack() as opened:
        bench = _Bench(variant, rows, opened)
        while True:
            try:
                command = connection.recv()
            except EOFError:
                return
            try:
                reply = bench.obey(command)
            except Exception as error:  # a runtime may fail in its own way
                reply = Broken(error=shown(error))
            connection.send(reply)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


class _Bench:
    """The open runners of a variant, by batch size."""

    def __init__(self, variant: Variant, rows: Array, opened: ExitStack) -> None:
        self._variant = variant
        self._rows = rows
        self._opened = opened
        self._runners: dict[int, Runner] = {}

    def obey(self, command: Command) -> Reply:
        match command:
            case Open():
                return self._open(command.candidate)
            case Stream():
                return self._stream(command)
            case Series():
                return self._series(command)

    def _open(self, candidate: Candidate) -> Opened:
        started = time.perf_counter()
        runner = self._opened.enter_context(self._make(candidate))
        if fallback := getattr(runner, "fallback", None):  # eager speed under another name
            raise EngineError(f"torch.compile: {fallback}")
        list(runner.infer([self._batches(candidate.input.shape[0])[0]]))
        self._runners[runner.batch_size] = runner
        return Opened(load_s=time.perf_counter() - started)

    def _make(self, candidate: Candidate) -> Runner:
        device, mode = self._variant.device, self._variant.mode
        assert device is not None
        if mode is None:
            return make_runner(
                candidate.runtime, candidate.graph, candidate.input, candidate.outputs, device
            )
        from engines.torch_run import TorchRunner

        return TorchRunner(
            candidate.graph, candidate.input, candidate.outputs, device.num_threads, mode
        )

    def _batches(self, batch_size: int) -> list[Array]:
        """Full batches over the rows in order; a last one that is not full is left out."""
        num_full = len(self._rows) // batch_size
        if num_full == 0:
            return [np.resize(self._rows, (batch_size, *self._rows.shape[1:]))]
        cut = self._rows[: num_full * batch_size]
        return list(cut.reshape(num_full, batch_size, *self._rows.shape[1:]))

    def _stream(self, command: Stream) -> Streamed:
        runner, batches = self._runners[command.batch_size], self._batches(command.batch_size)
        num_batches, first_pass = 0, list[Outputs]()
        cpu_s, started = time.process_time(), time.perf_counter()
        for outputs in runner.infer(_until(started + command.duration_s, batches)):
            if num_batches < len(batches):
                first_pass.append(outputs)
            num_batches += 1
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
        if command.answers is not None:
            names = [output.name for output in runner.outputs]
            parts = zip(*first_pass, strict=True)
            joined: dict[str, Any] = {
                name: np.concatenate(arrays) for name, arrays in zip(names, parts, strict=True)
            }
            np.savez(command.answers, **joined)
        return Streamed(
            num_rows=num_batches * command.batch_size,
            wall_s=wall_s,
            cpu_s=cpu_s,
            peak_rss_bytes=_peak_rss_bytes(),
        )

    def _series(self, command: Series) -> Timed:
        runner = self._runners[command.batch_size]
        latencies_s = []
        end = time.perf_counter() + command.duration_s
        for batch in _until(end, self._batches(command.batch_size)):
            started = time.perf_counter()
            list(runner.infer([batch]))
            latencies_s.append(time.perf_counter() - started)
        return Timed(latencies_s=tuple(latencies_s))


def _until(end: float, batches: list[Array]) -> Iterator[Array]:
    """Batches over and over until `time.perf_counter()` reaches `end`; one at least."""
    while True:
        for batch in batches:
            yield batch
            if time.perf_counter() >= end:
                return


def _peak_rss_bytes() -> int:
    # Not ru_maxrss: it survives the start of a program, and so begins with the parent's.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    return 0
