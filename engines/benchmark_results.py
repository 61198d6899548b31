"""What a benchmark gives: medians with their spread, and which variant is the base line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.benchmark_variants import Variant
from engines.gate import Accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFigures:
    """What the device itself says of a measurement; None where it does not tell."""

    utilisation: float | None
    """Share from 0 to 1: of time with any kernel on a GPU, of cores busy on a CPU."""
    memory_bytes: int | None
    joules_per_1000: float | None
    sm_clock_mhz: float | None = None
    """Mean, of a GPU."""
    power_w: float | None = None
    """Mean, of a GPU."""
    throttled: float | None = None
    """Largest share of samples with lowered clocks, over the reasons."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A median, and the quartiles that half of all rounds lie between."""

    median: float
    q1: float
    q3: float
    values: tuple[float, ...]
    """One for each round."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values, one at least."""
        q1, median, q3 = (float(np.percentile(values, share)) for share in (25, 50, 75))
        return cls(median=median, q1=q1, q3=q3, values=tuple(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """A variant at one batch size."""

    batch_size: int
    load_s: float
    """To load and compile."""
    rows_per_s: Spread
    cpu_s_per_1000: float
    """CPU seconds of the process for 1,000 rows; median."""
    latency_ms: Mapping[str, float]
    """p50, p95, p99 of one batch after the other, over all rounds."""
    num_latencies: int
    peak_rss_bytes: int
    """Of the variant's process: all batch sizes are open in it."""
    accuracy: Accuracy
    """Answers of the timed run against fp32, on the rows that it came to."""
    device: DeviceFigures | None


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantResult:
    """All that was measured of a variant."""

    variant: Variant
    measurements: tuple[Measurement, ...]
    errors: Mapping[int, str]
    """Batch size -> why it was not measured; 0 stands for all of them."""

    @property
    def best(self) -> Measurement | None:
        """The measurement with the highest throughput."""
        return max(self.measurements, key=lambda m: m.rows_per_s.median, default=None)

    @property
    def reason(self) -> str | None:
        """Why there is no measurement, or what failed besides."""
        return next(iter(self.errors.values()), None)


def base_line(results: Sequence[VariantResult]) -> VariantResult | None:
    """Torch eager fp32 as most scripts run it, on the GPU where it ran there; else any fp32."""
    ran = [result for result in results if result.best]
    for wanted in (
        [r for r in ran if r.variant.is_base and _is_gpu(r)],
        [r for r in ran if r.variant.is_base],
        [r for r in ran if r.variant.name == "onnxruntime fp32"],
        [r for r in ran if r.variant.precision == "fp32"],
    ):
        if wanted:
            return max(wanted, key=best_rate)
    return None


def best_rate(result: VariantResult) -> float:
    """Rows per second at the best batch size; 0 when it did not run."""
    return result.best.rows_per_s.median if result.best else 0.0


def _is_gpu(result: VariantResult) -> bool:
    return result.variant.device is not None and result.variant.device.kind == "gpu"
