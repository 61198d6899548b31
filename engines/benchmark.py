"""The fair benchmark: every variant in a process of its own, measured in interleaved rounds.

All processes live through the whole benchmark, and one at a time is told to work: spinning threads
of one runtime would distort another, and a busy moment of the machine must not hit one variant only
(A B C A B C ..., medians).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from engines.benchmark_child import Open, Opened, Series, Stream, Streamed, Timed
from engines.benchmark_contestant import Cell, Contestant
from engines.benchmark_process import VariantProcess
from engines.benchmark_results import DeviceFigures, VariantResult
from engines.benchmark_variants import Variant
from engines.calibrate import Method
from engines.candidates import CandidateFactory
from engines.devices import this_cpu
from engines.export import fixed_batch
from engines.fp32 import reference_answers
from engines.model import ModelSpec
from engines.runner import Array
from engines.tensorrt_build import BuilderSettings

OPEN_TIMEOUT_S = 900.0
"""To load and compile one candidate: torch.compile takes a minute on two busy cores."""
REFERENCE_BATCH = 8
PATIENCE_S = 120.0
"""Beyond its duration, for a measurement: one batch may take long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """How much is measured."""

    batch_sizes: tuple[int, ...]
    num_rounds: int = 5
    warmup_s: float = 0.5
    """Before each measurement, not counted."""
    duration_s: float = 2.0
    """Of each throughput measurement."""
    latency_s: float = 1.0
    """Of each latency measurement."""
    method: Method = "max"
    """How int8 scales are taken from the calibration rows."""
    builder: BuilderSettings = field(default_factory=BuilderSettings)
    """What is asked of TensorRT."""


class Metering(Protocol):
    """A device's sensors around one measurement."""

    def figures(self, num_rows: int) -> DeviceFigures:
        """After the block, in which so many rows were run."""


Meter = Callable[[Variant], AbstractContextManager[Metering]]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRows:
    """Real decoded rows of the job's input."""

    calibration: Array
    """For the int8 scales; none of them is measured."""
    measured: Array


def run_benchmark(
    spec: ModelSpec,
    variants: Sequence[Variant],
    rows: BenchRows,
    options: BenchOptions,
    say: Callable[[str], None],
    meter: Meter | None = None,
) -> list[VariantResult]:
    """Measure variants; one that fails is a result with its reason, never an exception.

    Args:
        spec: The model.
        variants: What is compared, see `all_variants`.
        rows: What it is compared on.
        options: How much is measured.
        say: Told what takes long.
        meter: Reads the device's sensors around a measurement.

    Raises:
        ModelError: The model cannot be exported at all.
        AccuracyError: ONNX Runtime cannot run it, and there is nothing to compare with.
    """
    cpu = this_cpu(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="nightscore-bench-") as folder, ExitStack() as opened:
        files = CandidateFactory(
            spec,
            rows.calibration,
            options.method,
            Path(folder),
            say,
            settings=options.builder,
            weight_bits=cpu.weight_bits,
        )
        batch_sizes = _batch_sizes(options, fixed_batch(files.core))
        batch_size = fixed_batch(files.core) or min(REFERENCE_BATCH, len(rows.measured))
        reference = reference_answers(files, rows.measured, batch_size, cpu)
        np.save(rows_path := Path(folder, "rows.npy"), rows.measured[reference.ran])
        contestants = [
            Contestant(variant, opened.enter_context(VariantProcess(variant, rows_path)))
            for variant in variants
            if variant.problem is None
        ]
        rounds = _Rounds(options, contestants, meter, say)
        rounds.open(batch_sizes, files, Path(folder))
        rounds.run(batch_sizes)
        measured = {c.variant.name: c.result(spec.head, reference.answers) for c in contestants}
    return [measured.get(v.name) or _not_run(v) for v in variants]


def _not_run(variant: Variant) -> VariantResult:
    return VariantResult(variant=variant, measurements=(), errors={0: variant.problem or ""})


def _batch_sizes(options: BenchOptions, fixed: int | None) -> tuple[int, ...]:
    return (fixed,) if fixed else options.batch_sizes


class _Rounds:
    """Opens all candidates, then measures them one at a time, over and over."""

    def __init__(
        self,
        options: BenchOptions,
        contestants: Sequence[Contestant],
        meter: Meter | None,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._contestants = contestants
        self._meter = meter
        self._say = say

    def open(self, batch_sizes: Sequence[int], files: CandidateFactory, folder: Path) -> None:
        """Make and open every candidate."""
        for contestant in self._contestants:
            self._say(f"opening {contestant.variant.name}")
            for batch_size in batch_sizes:
                _open(contestant, batch_size, files, folder)

    def run(self, batch_sizes: Sequence[int]) -> None:
        """All rounds."""
        for number in range(self._options.num_rounds):
            self._say(f"round {number + 1} of {self._options.num_rounds}")
            for batch_size in batch_sizes:
                for contestant in self._contestants:
                    if cell := contestant.cells.get(batch_size):
                        self._measure(contestant, cell)

    def _measure(self, contestant: Contestant, cell: Cell) -> None:
        options = self._options

        def stream(process: VariantProcess, duration_s: float, answers: Path | None) -> Streamed:
            command = Stream(batch_size=cell.batch_size, duration_s=duration_s, answers=answers)
            return process.ask(command, Streamed, duration_s + PATIENCE_S)

        def step(process: VariantProcess) -> None:
            if options.warmup_s:
                stream(process, options.warmup_s, None)
            answers = None if cell.streams else cell.answers
            if self._meter is None:
                cell.streams.append(stream(process, options.duration_s, answers))
            else:
                with self._meter(contestant.variant) as metering:
                    streamed = stream(process, options.duration_s, answers)
                cell.streams.append(streamed)
                cell.figures.append(metering.figures(streamed.num_rows))
            series = Series(batch_size=cell.batch_size, duration_s=options.latency_s)
            timed = process.ask(series, Timed, options.latency_s + PATIENCE_S)
            cell.latencies_s += timed.latencies_s

        contestant.attempt(cell.batch_size, step)


def _open(contestant: Contestant, batch_size: int, files: CandidateFactory, folder: Path) -> None:
    variant = contestant.variant

    def step(process: VariantProcess) -> None:
        candidate = files.make(variant.runtime, variant.precision, batch_size)
        done = process.ask(Open(candidate=candidate), Opened, OPEN_TIMEOUT_S)
        contestant.cells[batch_size] = Cell(
            batch_size=batch_size,
            load_s=done.load_s,
            answers=folder / f"{variant.name}-{batch_size}.npz",
        )

    contestant.attempt(batch_size, step)
