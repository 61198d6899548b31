"""`score bench`: composes the benchmark of a job's model: rows, devices, set-up, files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.benchmark import BenchOptions, BenchRows, run_benchmark
from engines.benchmark_results import DeviceFigures, VariantResult, base_line, best_rate
from engines.benchmark_variants import Variant, all_variants
from engines.devices import Gpu, this_cpu
from engines.keys import digest_bytes
from engines.model import fingerprint_model
from engines.nvml import discover
from flows.devices import lane_devices, num_cores
from flows.measuring.bench_markdown import to_markdown
from flows.measuring.bench_plot import to_svg
from flows.measuring.bench_setup import load_facts, machine_facts
from pipeline.config import Job
from pipeline.engine import decoded_sample, request_for
from pipeline.errors import ConfigError
from pipeline.plan import make_plan
from pipeline.storage import open_storage
from pipeline.telemetry import Sampler, joules_per_1000

Facts = dict[str, Any]
Say = Callable[[str], None]
SAMPLE_EVERY_S = 0.25
BATCH_SIZES = {
    ("cpu", "images"): (1, 8, 32),
    ("cpu", "features"): (256, 2048, 8192),
    ("gpu", "images"): (32, 128, 512),
    ("gpu", "features"): (4096, 16_384, 65_536),
}
ROWS = {"images": 512, "features": 16_384}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """What is asked for; None: what suits the device and the input."""

    batch_sizes: tuple[int, ...] | None = None
    num_rounds: int = 5
    duration_s: float = 2.0
    warmup_s: float = 0.5
    names: tuple[str, ...] = ()
    """Only variants with one of these in their name; empty: all."""
    num_threads: int | None = None
    num_rows: int | None = None
    seed: int = 0
    out: Path | None = None


def bench_facts(job: Job, date: str, request: BenchRequest, say: Say) -> Facts:
    """Measure, and write bench.json, bench.md and bench.svg.

    Raises:
        ConfigError: No variant has a name as asked for.
    """
    source = open_storage(job.input.uri)
    plan = make_plan(job, date, source)
    kind = "images" if job.input.images is not None else "features"
    cpu = this_cpu(request.num_threads or job.lanes.threads or num_cores())
    gpu = next((d.gpu for d in lane_devices(job) if d.gpu), None)
    asked = request_for(job, plan.num_features, gpu or cpu)
    spec = asked.model
    variants = _chosen(all_variants(spec, cpu, gpu, _why_no_gpu(job)), request.names)
    machine, before = machine_facts(cpu, gpu), load_facts()  # before anything is at work here
    num_rows = request.num_rows or ROWS[kind]
    wanted = num_rows + job.engine.calibration.rows
    say(f"decoding {wanted:,} rows of the input")
    sample = decoded_sample(job, plan, source, wanted, request.seed, cpu.num_threads).rows
    split = max(1, len(sample) * job.engine.calibration.rows // wanted)
    rows = BenchRows(calibration=sample[:split], measured=sample[split:])
    options = BenchOptions(
        batch_sizes=request.batch_sizes or BATCH_SIZES[(gpu or cpu).kind, kind],
        num_rounds=request.num_rounds,
        warmup_s=request.warmup_s,
        duration_s=request.duration_s,
        latency_s=request.duration_s / 2,
        method=job.engine.calibration.method,
        builder=asked.builder,
    )
    results = run_benchmark(spec, variants, rows, options, say, DeviceMeter)
    facts = {
        "job": job.name,
        "setup": {
            **machine,
            "model": {
                "source": spec.source,
                "fingerprint": fingerprint_model(spec),
                "input": dataclasses.asdict(spec.input),
                "head": spec.head,
            },
            "dataset": {
                "uri": job.input.uri,
                "date": date,
                "rows_sha256": digest_bytes(np.ascontiguousarray(sample).data),
                "rows": len(rows.measured),
                "calibration_rows": len(rows.calibration),
                "seed": request.seed,
            },
            "options": dataclasses.asdict(options),
            "load_before": before,
            "load_after": load_facts(),
        },
        **result_facts(results),
    }
    return {**facts, "files": _write(facts, request.out or Path(f"bench-{job.name}-{date}"))}


def _why_no_gpu(job: Job) -> str:
    if job.lanes.device == "cpu":
        return "the job's lanes.device is cpu"
    return discover().problem or "no GPU of this machine can be used"


def _chosen(variants: list[Variant], names: tuple[str, ...]) -> list[Variant]:
    chosen = [v for v in variants if not names or any(name in v.name for name in names)]
    if not chosen:
        known = ", ".join(variant.name for variant in variants)
        raise ConfigError(
            f"--variants: none has {' or '.join(names)} in its name; expected a part of one of: "
            f"{known}."
        )
    return chosen


class DeviceMeter:
    """Samples the device of a variant while it is measured."""

    def __init__(self, variant: Variant) -> None:
        self._gpu = variant.device if isinstance(variant.device, Gpu) else None
        self._sampler = Sampler([self._gpu] if self._gpu else [], SAMPLE_EVERY_S)

    def __enter__(self) -> DeviceMeter:
        self._sampler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._sampler.__exit__()

    def figures(self, num_rows: int) -> DeviceFigures:
        """What the sensors say of the measurement."""
        uses = self._sampler.use()
        kind = "gpu" if self._gpu else "cpu"
        use = next((use for use in uses if use.kind == kind), None)
        return DeviceFigures(
            utilisation=use.utilisation_mean if use else None,
            memory_bytes=use.memory_peak_bytes if use else None,
            joules_per_1000=joules_per_1000(uses, num_rows),
            sm_clock_mhz=use.sm_clock_mean_mhz if use else None,
            power_w=use.power_mean_w if use else None,
            throttled=max(use.throttled.values(), default=None) if use else None,
        )


def result_facts(results: list[VariantResult]) -> Facts:
    """All measurements as plain values, in per cent of the base line too."""
    base = base_line(results)
    base_rate = best_rate(base) if base else 0.0
    return {
        "base_line": base.variant.name if base else None,
        "variants": [_variant_facts(result, base_rate) for result in results],
    }


def _variant_facts(result: VariantResult, base_rate: float) -> Facts:
    variant = result.variant
    measurements = []
    for measurement in result.measurements:
        facts = dataclasses.asdict(measurement)
        rate = measurement.rows_per_s.median
        facts["percent_of_base"] = 100 * rate / base_rate if base_rate else None
        measurements.append(facts)
    return {
        "name": variant.name,
        "runtime": variant.runtime,
        "precision": variant.precision,
        "how": variant.how,
        "reason": result.reason,
        "errors": {("all" if size == 0 else str(size)): e for size, e in result.errors.items()},
        "best_batch_size": result.best.batch_size if result.best else None,
        "measurements": measurements,
    }


def _write(facts: Facts, folder: Path) -> Facts:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(facts, indent=1, ensure_ascii=False, default=str) + "\n",
        "md": to_markdown(facts),
        "svg": to_svg(facts),
    }
    paths = {}
    for suffix, text in texts.items():
        path = folder / f"bench.{suffix}"
        path.write_text(text, encoding="utf-8")
        paths[suffix] = str(path)
    return paths
