"""A variant during a benchmark: its process, what was seen so far, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from engines.benchmark_child import Streamed
from engines.benchmark_process import VariantProcess
from engines.benchmark_results import DeviceFigures, Measurement, Spread, VariantResult
from engines.benchmark_variants import Variant
from engines.errors import EngineError
from engines.gate import Answers, compare
from engines.model import Head, shown


@dataclass(kw_only=True, slots=True)
class Cell:
    """What was seen of a variant at one batch size so far."""

    batch_size: int
    load_s: float
    answers: Path
    streams: list[Streamed] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    figures: list[DeviceFigures] = field(default_factory=list)


class Contestant:
    """A variant, its process, and its cells; once its process is gone nothing more is asked."""

    def __init__(self, variant: Variant, process: VariantProcess) -> None:
        self.variant = variant
        self.cells: dict[int, Cell] = {}
        self.errors: dict[int, str] = {}
        self._process = process

    def attempt(self, batch_size: int, step: Callable[[VariantProcess], None]) -> None:
        """Do something; what fails costs this batch size, or the variant if its process died."""
        if 0 in self.errors:
            return
        try:
            step(self._process)
        except ConnectionError as error:
            self.cells.clear()
            self.errors = {0: str(error)}
        except Exception as error:  # exporters, builders and runtimes fail in their own ways
            self.cells.pop(batch_size, None)
            told = isinstance(error, EngineError)
            self.errors[batch_size] = str(error) if told else shown(error)

    def result(self, head: Head, reference: Answers) -> VariantResult:
        """What was measured, judged against the reference's answers."""
        return VariantResult(
            variant=self.variant,
            measurements=tuple(
                _summary(cell, head, reference) for cell in self.cells.values() if cell.streams
            ),
            errors=self.errors,
        )


def _summary(cell: Cell, head: Head, reference: Answers) -> Measurement:
    rates = [stream.num_rows / stream.wall_s for stream in cell.streams]
    costs = [stream.cpu_s / stream.num_rows * 1000 for stream in cell.streams]
    with np.load(cell.answers) as answers:
        num_rows = min(len(array) for array in (*answers.values(), *reference.values()))
        found, expected = ({k: v[:num_rows] for k, v in a.items()} for a in (answers, reference))
    return Measurement(
        batch_size=cell.batch_size,
        load_s=cell.load_s,
        rows_per_s=Spread.of(rates),
        cpu_s_per_1000=median(costs),
        latency_ms={
            f"p{share}": float(np.percentile(cell.latencies_s, share)) * 1000
            for share in (50, 95, 99)
        },
        num_latencies=len(cell.latencies_s),
        peak_rss_bytes=max(stream.peak_rss_bytes for stream in cell.streams),
        accuracy=compare(head, expected, found),
        device=_middle(cell.figures),
    )


def _middle(figures: Sequence[DeviceFigures]) -> DeviceFigures | None:
    if not figures:
        return None

    def middle(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    sizes = [f.memory_bytes for f in figures if f.memory_bytes is not None]
    throttled = [f.throttled for f in figures if f.throttled is not None]
    return DeviceFigures(
        utilisation=middle([f.utilisation for f in figures]),
        memory_bytes=max(sizes, default=None),
        joules_per_1000=middle([f.joules_per_1000 for f in figures]),
        sm_clock_mhz=middle([f.sm_clock_mhz for f in figures]),
        power_w=middle([f.power_w for f in figures]),
        throttled=max(throttled, default=None),
    )
