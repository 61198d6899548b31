"""The benchmark: interleaved rounds, real answers, and a variant's failure costs that variant."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import pytest

from engines import benchmark
from engines.benchmark import BenchOptions, BenchRows, run_benchmark
from engines.benchmark_child import Open, Opened
from engines.benchmark_process import VariantProcess
from engines.benchmark_results import (
    DeviceFigures,
    Measurement,
    Spread,
    VariantResult,
    base_line,
)
from engines.benchmark_variants import Variant, all_variants
from engines.candidates import Candidate
from engines.devices import Device, Gpu, this_cpu
from engines.errors import EngineError
from engines.model import ModelSpec
from tests.engines.small_devices import H200
from tests.engines.small_models import (
    features_spec,
    image_rows,
    images_spec,
    write_features_model,
    write_image_model,
)

pytestmark = pytest.mark.timeout(120)
OPTIONS = BenchOptions(
    batch_sizes=(2, 4), num_rounds=3, warmup_s=0.01, duration_s=0.05, latency_s=0.03
)
ROWS = BenchRows(calibration=image_rows(32, seed=1), measured=image_rows(41, seed=2))
GPU = dataclasses.replace(H200, num_threads=2)


class Revealing:
    """A candidate that tells, instead of its runtime, what its process sees."""

    @property
    def runtime(self) -> str:
        raise EngineError(os.environ["CUDA_VISIBLE_DEVICES"])


class Watch:
    """A meter that tells which variant is about to be measured, and makes up sensors."""

    def __init__(self, act: Callable[[Variant], None] = lambda _: None) -> None:
        self.seen: list[str] = []
        self._act = act

    def __call__(self, variant: Variant) -> AbstractContextManager[Any]:
        self.seen.append(variant.name)
        self._act(variant)
        return self

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def figures(self, num_rows: int) -> DeviceFigures:
        joules = 5.0 if num_rows else None
        return DeviceFigures(utilisation=0.5, memory_bytes=None, joules_per_1000=joules)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return images_spec(write_image_model(tmp_path / "m.onnx"))


def chosen(spec: ModelSpec, *names: str) -> list[Variant]:
    variants = all_variants(spec, this_cpu(2), None, "no NVIDIA driver")
    return [variant for variant in variants if variant.name in names]


def process_of(variant: Variant) -> int:
    (pid,) = [p.pid for p in multiprocessing.active_children() if p.name == variant.name]
    assert pid is not None
    return pid


def silent(_: str) -> None:
    pass


def test_variants_are_measured_in_interleaved_rounds_and_their_answers_judged(
    spec: ModelSpec,
) -> None:
    watch = Watch()
    names = ("onnxruntime fp32", "onnxruntime int8", "openvino fp32")
    variants = chosen(spec, *names, "torch eager fp32")
    results = run_benchmark(spec, variants, ROWS, OPTIONS, silent, watch)
    assert [result.variant for result in results] == variants
    order = [v.name for v in variants if v.problem is None]
    assert watch.seen == order * len(OPTIONS.batch_sizes) * OPTIONS.num_rounds
    for result in results[1:]:
        assert result.errors == {}
        assert [m.batch_size for m in result.measurements] == [2, 4]
        for found in result.measurements:
            check_measurement(found)
    agreements = {
        r.variant.name: [m.accuracy.agreement for m in r.measurements] for r in results[1:]
    }
    assert agreements["openvino fp32"] == agreements["onnxruntime fp32"] == [1.0, 1.0]
    assert all(0.9 <= share <= 1.0 for share in agreements["onnxruntime int8"])
    assert results[0].measurements == ()
    assert results[0].reason == "the model is an ONNX file; torch needs module:callable"
    assert multiprocessing.active_children() == []


def check_measurement(found: Measurement) -> None:
    rate = found.rows_per_s
    assert len(rate.values) == OPTIONS.num_rounds
    assert 0 < rate.q1 <= rate.median <= rate.q3
    assert found.num_latencies >= OPTIONS.num_rounds
    assert 0 < found.latency_ms["p50"] <= found.latency_ms["p95"] <= found.latency_ms["p99"]
    assert found.cpu_s_per_1000 > 0
    assert found.load_s > 0
    assert found.peak_rss_bytes > 10_000_000
    assert found.accuracy.num_rows == 41 - 41 % found.batch_size
    assert found.device == DeviceFigures(utilisation=0.5, memory_bytes=None, joules_per_1000=5.0)


def test_a_process_that_dies_is_a_row_with_the_reason_and_the_others_go_on(
    spec: ModelSpec,
) -> None:
    def kill_openvino(variant: Variant) -> None:
        if variant.name == "openvino fp32":
            os.kill(process_of(variant), signal.SIGKILL)

    variants = chosen(spec, "openvino fp32", "onnxruntime fp32")
    dead, alive = sorted(
        run_benchmark(spec, variants, ROWS, OPTIONS, silent, Watch(kill_openvino)),
        key=lambda result: result.variant.name,
        reverse=True,
    )
    assert dead.measurements == ()
    assert dead.reason == "its process died (exit code -9)"
    assert len(alive.measurements) == 2
    assert alive.errors == {}


def test_a_process_that_hangs_is_killed_and_said_to_have_hung(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "PATIENCE_S", 0.5)
    variants = chosen(spec, "onnxruntime fp32")
    stop = Watch(lambda variant: os.kill(process_of(variant), signal.SIGSTOP))
    (result,) = run_benchmark(spec, variants, ROWS, OPTIONS, silent, stop)
    assert result.reason == "no answer in 1 s; its process was killed"
    assert multiprocessing.active_children() == []


def test_an_interruption_leaves_no_process_behind(spec: ModelSpec) -> None:
    pids: list[int] = []

    def interrupt(variant: Variant) -> None:
        pid = process_of(variant)
        assert os.getpgid(pid) == pid  # whatever it starts can be killed with it
        pids.append(pid)
        raise KeyboardInterrupt

    variants = chosen(spec, "onnxruntime fp32", "openvino fp32")
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(spec, variants, ROWS, OPTIONS, silent, Watch(interrupt))
    assert len(pids) == 1
    assert multiprocessing.active_children() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_batch_size_that_cannot_be_made_costs_that_batch_size(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = benchmark.CandidateFactory.make

    def no_four(factory: Any, runtime: str, precision: str, batch_size: int) -> Any:
        if batch_size == 4:
            raise MemoryError("out of memory")
        return make(factory, runtime, precision, batch_size)

    monkeypatch.setattr(benchmark.CandidateFactory, "make", no_four)
    (result,) = run_benchmark(spec, chosen(spec, "onnxruntime fp32"), ROWS, OPTIONS, silent)
    assert [found.batch_size for found in result.measurements] == [2]
    assert result.errors == {4: "MemoryError: out of memory"}


def test_a_graph_bound_to_a_batch_is_measured_with_that_one(tmp_path: Path) -> None:
    spec = features_spec(write_features_model(tmp_path / "m.onnx", batch=3))
    rows = np.random.default_rng(0).standard_normal((10, 8), dtype=np.float32)
    variants = chosen(spec, "onnxruntime fp32")
    options = replace(OPTIONS, num_rounds=1)
    (result,) = run_benchmark(
        spec, variants, BenchRows(calibration=rows, measured=rows), options, silent
    )
    assert [found.batch_size for found in result.measurements] == [3]
    assert result.measurements[0].accuracy.num_rows == 9


def test_every_variant_says_how_it_is_run_and_without_a_gpu_why_it_is_not(
    spec: ModelSpec,
) -> None:
    torch_spec = replace(spec, source="module:callable")
    variants = all_variants(torch_spec, this_cpu(3), None, "no NVIDIA driver")
    assert all(variant.how for variant in variants)
    on_gpu = [variant for variant in variants if variant.name.startswith("gpu ")]
    assert {variant.problem for variant in on_gpu} == {"no NVIDIA driver"}
    others = [variant for variant in variants if variant not in on_gpu]
    assert {variant.problem for variant in others} == {None}
    assert len({variant.name for variant in variants}) == len(variants) == 13
    with_gpu = all_variants(torch_spec, this_cpu(3), GPU, "")
    assert {v.device for v in with_gpu if v.name.startswith("gpu ")} == {GPU}


def result_of(variant: Variant, rate: float | None) -> VariantResult:
    measurements = ()
    if rate is not None:
        found = Measurement(
            batch_size=8,
            load_s=1.0,
            rows_per_s=Spread.of([rate]),
            cpu_s_per_1000=1.0,
            latency_ms={"p50": 1.0, "p95": 1.0, "p99": 1.0},
            num_latencies=1,
            peak_rss_bytes=1,
            accuracy=None,  # type: ignore[arg-type]
            device=None,
        )
        measurements = (found,)
    return VariantResult(variant=variant, measurements=measurements, errors={})


def base_of(gpu: Gpu | None, **rates: float) -> str | None:
    spec = ModelSpec(source="module:callable", input=images_spec(Path()).input, head="classes")
    variants = all_variants(spec, this_cpu(2), gpu, "none")
    known = {name.replace("_", " "): rate for name, rate in rates.items()}
    found = base_line([result_of(v, known.get(v.name)) for v in variants])
    return found.variant.name if found else None


def test_the_base_line_is_plain_eager_torch_or_any_fp32_where_there_is_none() -> None:
    eager = {"torch_eager_fp32": 9.0, "torch_eager_fp32_tuned": 10.0}
    assert base_of(None, **eager, openvino_fp32=70.0) == "torch eager fp32"
    assert base_of(GPU, **eager, gpu_torch_eager_fp32=900.0) == "gpu torch eager fp32"
    assert base_of(None, openvino_fp32=70.0, onnxruntime_fp32=30.0) == "onnxruntime fp32"
    assert base_of(None, openvino_fp32=70.0, openvino_int8=99.0) == "openvino fp32"
    assert base_of(None, openvino_int8=99.0) is None


def test_a_spread_is_the_median_between_the_quartiles() -> None:
    spread = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (spread.q1, spread.median, spread.q3) == (2.0, 3.0, 4.0)
    assert spread.values == (5.0, 1.0, 4.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("device", "seen"), [(GPU, "EngineError: GPU-1"), (this_cpu(1), "EngineError: 5")]
)
def test_the_process_of_a_gpu_variant_sees_that_gpu_alone(
    device: Device, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    np.save(rows := tmp_path / "rows.npy", ROWS.measured)
    variant = Variant(name="any", runtime="torch", precision="fp32", device=device, how="")
    with VariantProcess(variant, rows) as process, pytest.raises(EngineError, match=f"^{seen}$"):
        process.ask(Open(candidate=cast(Candidate, Revealing())), Opened, 60)
