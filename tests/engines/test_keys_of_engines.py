"""Keys: all that changes an answer, or where an engine is valid, gives another; nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.build import (
    CalibrationSpec,
    EngineRequest,
    Sample,
    common_key,
    engine_key,
    request_key,
    resolve_engine,
)
from engines.candidates import Candidate
from engines.devices import LIMITS, Cpu, Device, Gpu, this_cpu
from engines.gate import GateSpec
from engines.model import FeatureInput, ImageInput, ModelSpec, fingerprint_model
from engines.runner import TensorSpec
from engines.tensorrt_build import BuilderSettings
from tests.engines.small_devices import H200
from tests.engines.small_models import (
    feature_rows,
    features_spec,
    images_spec,
    request_for,
    write_features_model,
    write_image_model,
)
from tests.engines.small_stores import local_store

CPU = Cpu(name="A Xeon", architecture="Linux-x86_64", instructions=("avx512_vnni",), num_threads=2)
GPU = H200
MODEL = ModelSpec(source="m.onnx", input=FeatureInput(num_features=8), head="scores")
OTHER_VALUES: dict[type, dict[str, Any]] = {
    CalibrationSpec: {"num_rows": 64, "seed": 1, "method": "entropy"},
    GateSpec: {
        "num_rows": 9,
        "min_agreement": 0.5,
        "min_cosine": 0.5,
        "max_divergence": 0.5,
        "max_metric_loss": 0.5,
        "label": "clicked",
    },
    BuilderSettings: {"optimization_level": 5, "workspace_bytes": 1 << 30, "tf32": False},
    Cpu: {
        "name": "An EPYC",
        "architecture": "Linux-aarch64",
        "instructions": ("avx2",),
        "num_threads": 4,
    },
    Gpu: {
        "name": "NVIDIA H100",
        "compute_capability": (8, 0),
        "num_sms": 114,
        "memory_bytes": 80 << 30,
        "mig_profile": "1g.18gb",
        "driver": "590.10.00",
        "cuda": (13, 1),
        "architecture": "Linux-aarch64",
    },
}
NO_PART = {Gpu: {"driver": "580.126.01", "uuid": "GPU-2", "num_threads": 16}}


def request(device: Device = CPU) -> EngineRequest:
    return EngineRequest(
        model=MODEL, calibration=CalibrationSpec(), gate=GateSpec(), device=device, batch_size=8
    )


def cases(kinds: dict[type, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(kind, name, value, id=f"{kind.__name__}.{name}")
        for kind, values in kinds.items()
        for name, value in values.items()
    ]


def changed(asked: EngineRequest, kind: type, name: str, value: object) -> EngineRequest:
    """The request with one field of one of its parts changed."""
    for field in dataclasses.fields(asked):
        part = getattr(asked, field.name)
        if isinstance(part, kind):
            other = dataclasses.replace(part, **{name: value})  # type: ignore[type-var]
            assert other != part
            return dataclasses.replace(asked, **{field.name: other})
    raise AssertionError(f"a request has no {kind.__name__}")


@pytest.mark.parametrize("kind", OTHER_VALUES)
def test_each_field_is_changed_below(kind: type) -> None:
    """A field that is added must be decided upon here."""
    named = {*OTHER_VALUES[kind], *NO_PART.get(kind, {})}
    assert named == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(("kind", "name", "value"), cases(OTHER_VALUES))
def test_another_value_asks_another_question(kind: type, name: str, value: object) -> None:
    asked = request(GPU if kind in (Gpu, BuilderSettings) else CPU)
    assert request_key(changed(asked, kind, name, value), "m") != request_key(asked, "m")


@pytest.mark.parametrize(("kind", "name", "value"), cases(NO_PART))
def test_what_does_not_bind_an_engine_asks_the_same_question(
    kind: type, name: str, value: object
) -> None:
    asked = request(GPU)
    assert request_key(changed(asked, kind, name, value), "m") == request_key(asked, "m")


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES[BuilderSettings].items())
def test_settings_of_tensorrt_do_not_count_on_a_cpu(name: str, value: object) -> None:
    asked = request(CPU)
    assert request_key(changed(asked, BuilderSettings, name, value), "m") == request_key(asked, "m")


def test_another_model_batch_or_kind_of_device_asks_another_question() -> None:
    asked = request()
    keys = {
        request_key(asked, "m"),
        request_key(asked, "another fingerprint"),
        request_key(dataclasses.replace(asked, batch_size=16), "m"),
        request_key(dataclasses.replace(asked, batch_size=None), "m"),
        request_key(dataclasses.replace(asked, device=GPU), "m"),
    }
    assert len(keys) == 5
    assert request_key(request(), "m") in keys


@pytest.mark.parametrize(
    ("device", "runtime", "counts"),
    [
        (CPU, "openvino", True),
        (CPU, "onnxruntime", True),
        (CPU, "tensorrt", False),
        (GPU, "tensorrt", True),
        (GPU, "torch", True),
        (GPU, "onnxruntime", True),
        (GPU, "cuda-bindings", True),
        (GPU, "nvidia-cuda-runtime", True),
        (GPU, "openvino", False),
    ],
)
def test_the_full_version_of_all_that_makes_an_engine_there_counts(
    device: Device, runtime: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"openvino": "2026.4.1", "onnxruntime": "1.31.1"}
    versions |= {"tensorrt": "11.4.0.106", "torch": "2.13.0"}
    versions |= {"cuda-bindings": "13.5.0", "nvidia-cuda-runtime": "none"}
    monkeypatch.setattr("engines.build.version_of", versions.__getitem__)
    before = request_key(request(device), "m")
    versions[runtime] += ".1"
    assert (request_key(request(device), "m") != before) is counts


def test_another_revision_of_the_builder_asks_another_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = request_key(request(), "m")
    monkeypatch.setattr("engines.build.BUILDER_REVISION", -1)
    assert request_key(request(), "m") != before


def test_other_weights_inputs_heads_or_top_k_give_another_fingerprint(tmp_path: Path) -> None:
    spec = images_spec(write_image_model(tmp_path / "a.onnx"))
    assert isinstance(spec.input, ImageInput)
    inputs = [
        dataclasses.replace(spec.input, **change)  # type: ignore[arg-type]
        for change in (
            {"height": 24},
            {"width": 24},
            {"mean": (1.0, 2.0, 3.0)},
            {"std": (1.0, 2.0, 3.0)},
        )
    ]
    specs = [
        spec,
        images_spec(write_image_model(tmp_path / "b.onnx", seed=2)),
        *(dataclasses.replace(spec, input=each) for each in inputs),
        dataclasses.replace(spec, input=FeatureInput(num_features=432)),
        dataclasses.replace(spec, input=FeatureInput(num_features=433)),
        dataclasses.replace(spec, head="scores"),
        dataclasses.replace(spec, top_k=1),
    ]
    assert len({fingerprint_model(each) for each in specs}) == len(specs)


CANDIDATE = Candidate(
    runtime="tensorrt",
    precision="mixed",
    graph=Path("m.plan"),
    input=TensorSpec(name="rows", dtype="float32", shape=(8, 8)),
    outputs=(TensorSpec(name="score", dtype="float32", shape=(8, 1)),),
    float_layers=("g1",),
)


def test_each_thing_that_was_built_otherwise_has_a_key_of_its_own() -> None:
    def key(candidate: Candidate = CANDIDATE, asked: str = "r", **changes: object) -> str:
        given: dict[str, Any] = {"artifact": b"plan", "validity": {"gpu": 1}} | changes
        return engine_key(asked, candidate, given["artifact"], given["validity"])

    other_input = dataclasses.replace(CANDIDATE.input, shape=(16, 8))
    keys = {
        key(),
        key(asked="another request"),
        key(artifact=b"plaN"),
        key(validity={"gpu": 2}),
        key(dataclasses.replace(CANDIDATE, runtime="torch")),
        key(dataclasses.replace(CANDIDATE, precision="int8")),
        key(dataclasses.replace(CANDIDATE, float_layers=("g2",))),
        key(dataclasses.replace(CANDIDATE, input=other_input)),
        key(dataclasses.replace(CANDIDATE, outputs=(other_input,))),
    }
    assert len(keys) == 9
    assert key(dataclasses.replace(CANDIDATE, graph=Path("elsewhere.plan"))) in keys


def int8_first(runners: dict[str, object], *_: object) -> dict[str, float]:
    # OpenVINO's blobs are the same in another process only; see tests/engines/test_ovino.py.
    return {name: float(name == "onnxruntime int8") for name in runners}


@pytest.mark.parametrize(
    ("change", "same_question"),
    [("rows", True), ("method", False), ("weights", False)],
)
def test_other_scales_make_another_engine(
    change: str, same_question: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same shapes, same names: what differs is in the graph's bytes only."""
    monkeypatch.setattr("engines.ladder.race", int8_first)
    model = write_features_model(tmp_path / "m.onnx")
    asked = request_for(features_spec(model), min_agreement=0.5)
    first = built(tmp_path / "first", asked, lambda rows: rows)
    if change == "method":
        calibration = CalibrationSpec(num_rows=32, method="percentile")
        asked = dataclasses.replace(asked, calibration=calibration)
    elif change == "weights":
        write_features_model(model, seed=2)
    factor = np.float32(1.5 if change == "rows" else 1.0)
    second = built(tmp_path / "second", asked, lambda rows: rows * factor)
    assert (first.request_key == second.request_key) is same_question
    assert first.key != second.key
    assert first.precision == second.precision == "int8"
    again = built(tmp_path / "again", asked, lambda rows: rows * factor)
    assert (again.key, again.artifact_sha256) == (second.key, second.artifact_sha256)


def built(folder: Path, asked: EngineRequest, change: Callable[[Any], Any]) -> Any:
    def rows(num_rows: int, seed: int) -> Sample:
        return Sample(rows=change(feature_rows(num_rows, seed)))

    return resolve_engine(asked, local_store(folder), rows, lambda _: None).engine.manifest


def test_unlike_devices_have_a_question_in_common_and_their_runtimes_have_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = dataclasses.replace(CPU, name="An EPYC", num_threads=4)
    common = common_key(request(), "m")
    assert common == common_key(request(other), "m") == common_key(request(GPU), "m")
    assert common not in (request_key(request(), "m"), request_key(request(other), "m"))
    assert common != common_key(request(), "another")
    monkeypatch.setattr("engines.build.version_of", lambda _: "9.9")
    assert common == common_key(request(), "m")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    cases({kind: OTHER_VALUES[kind] for kind in (CalibrationSpec, GateSpec, BuilderSettings)}),
)
def test_what_a_job_asks_for_is_in_common(kind: type, name: str, value: object) -> None:
    asked = request()
    assert common_key(changed(asked, kind, name, value), "m") != common_key(asked, "m")


def test_a_processor_that_may_use_fewer_instructions_is_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    whole = this_cpu(2)
    assert "at most" not in whole.name
    monkeypatch.setenv(LIMITS[0], "AVX2")
    assert this_cpu(2) == dataclasses.replace(
        whole,
        name=f"{whole.name}, at most AVX2",
        instructions=tuple(each for each in whole.instructions if each == "avx2"),
    )
