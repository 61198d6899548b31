from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.build import CalibrationSpec, Sample, request_key, resolve_engine
from engines.devices import this_cpu
from engines.errors import AccuracyError, ModelError
from engines.gate import MIN_ROWS, run_rows
from engines.load import open_runner
from engines.model import FeatureInput, ImageInput, fingerprint_model
from engines.store import EngineStore
from tests.engines.small_models import (
    IMAGES,
    feature_sample,
    features_spec,
    image_rows,
    image_sample,
    images_spec,
    request_for,
    write_features_model,
    write_image_model,
)


def no_rows(num_rows: int, seed: int) -> Sample:
    raise AssertionError(f"{num_rows} rows asked with seed {seed}: nothing is to be built")


def quiet(_: str) -> None:
    """Takes progress."""


def test_every_candidate_is_measured_and_the_fastest_that_passes_is_chosen(
    store: EngineStore, tmp_path: Path, said: tuple[list[str], Callable[[str], None]]
) -> None:
    spec = images_spec(write_image_model(tmp_path / "model.onnx"))
    manifest = resolve_engine(request_for(spec), store, image_sample, said[1]).engine.manifest
    assert {(rung.runtime, rung.precision) for rung in manifest.rungs} == {
        (runtime, precision)
        for runtime in ("openvino", "onnxruntime")
        for precision in ("int8", "fp32")
    }
    best = max((r for r in manifest.rungs if r.passed), key=lambda rung: rung.rows_per_s)
    assert (manifest.runtime, manifest.precision) == (best.runtime, best.precision)
    assert manifest.accuracy == best.accuracy
    assert manifest.reason in said[0][-1]
    assert [spec.name for spec in manifest.outputs] == ["class_id", "probability"]  # no logits
    assert manifest.num_classes == 5


def test_an_engine_normalises_and_picks_classes_as_numpy_does(
    store: EngineStore, tmp_path: Path
) -> None:
    import onnxruntime

    path = write_image_model(tmp_path / "model.onnx")
    engine = resolve_engine(request_for(images_spec(path)), store, image_sample, quiet).engine
    rows = image_rows(10, seed=9)
    mean, std = (np.asarray(values, np.float32) for values in (IMAGES.mean, IMAGES.std))
    planes = ((rows - mean) / std).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": planes.astype(np.float32)})
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    best = np.argsort(-shares, axis=1)[:, :2]
    with open_runner(engine) as runner:
        answers = run_rows(runner, rows)
    class_id, probability = answers["class_id"], answers["probability"]
    if engine.manifest.precision == "fp32":
        np.testing.assert_array_equal(class_id, best)
    np.testing.assert_allclose(probability[:, 0], shares.max(axis=1), atol=0.1)


def test_a_second_night_takes_the_engine_from_the_store_and_asks_for_no_rows(
    store: EngineStore, tmp_path: Path
) -> None:
    request = request_for(features_spec(write_features_model(tmp_path / "model.onnx")))
    first = resolve_engine(request, store, feature_sample, quiet)
    second = resolve_engine(request, store, no_rows, quiet)
    assert (first.built, second.built) == (True, False)
    assert second.engine == first.engine


def test_a_corrupt_engine_is_built_again_with_a_warning(
    store: EngineStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = request_for(features_spec(write_features_model(tmp_path / "model.onnx")))
    first = resolve_engine(request, store, feature_sample, quiet).engine
    first.artifact.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING, logger="engines.build"):
        again = resolve_engine(request, store, feature_sample, quiet)
    assert again.built
    assert "built again" in caplog.text
    again.engine.check()


def test_calibration_and_held_out_rows_are_drawn_once_and_disjoint(
    store: EngineStore, tmp_path: Path
) -> None:
    asked: list[tuple[int, int]] = []

    def rows(num_rows: int, seed: int) -> Sample:
        asked.append((num_rows, seed))
        return feature_sample(num_rows, seed)

    request = request_for(features_spec(write_features_model(tmp_path / "model.onnx")))
    manifest = resolve_engine(request, store, rows, quiet).engine.manifest
    assert asked == [(96, 0)]
    assert (manifest.calibration_rows, manifest.accuracy.num_rows) == (32, 64)


@pytest.mark.parametrize(("num_rows", "num_judged"), [(200, 64), (101, 50), (2, 1)])
def test_many_calibration_rows_leave_the_gate_its_own_or_half_of_all(
    store: EngineStore, tmp_path: Path, num_rows: int, num_judged: int
) -> None:
    request = request_for(features_spec(write_features_model(tmp_path / "model.onnx")))
    request = dataclasses.replace(request, calibration=CalibrationSpec(num_rows=100_000))
    sample = feature_sample(num_rows, seed=1)
    manifest = resolve_engine(request, store, lambda *_: sample, quiet).engine.manifest
    assert manifest.accuracy.num_rows == num_judged
    assert manifest.calibration_rows == num_rows - num_judged


@pytest.mark.parametrize(("num_rows", "num_judged"), [(1, 1), (2, 1), (10, 7), (11, 8)])
def test_an_input_with_few_rows_still_gets_an_engine_but_no_int8(
    store: EngineStore, tmp_path: Path, num_rows: int, num_judged: int
) -> None:
    request = request_for(features_spec(write_features_model(tmp_path / "model.onnx")))
    sample = feature_sample(num_rows, seed=1)
    manifest = resolve_engine(request, store, lambda *_: sample, quiet).engine.manifest
    assert manifest.accuracy.num_rows == num_judged
    errors = [rung.error for rung in manifest.rungs if rung.precision == "int8"]
    if num_judged >= MIN_ROWS:
        assert errors == [None, None]
        return
    assert manifest.precision == "fp32"
    said = f"{num_judged} held-out rows; expected 8 to judge int8 by"
    assert [str(error).startswith(said) for error in errors] == [True, True]
    assert f"openvino int8 failed: {said}" in manifest.reason


def test_a_candidate_that_fails_is_a_rung_with_its_error(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("this processor is too old")

    monkeypatch.setattr("engines.ovino.OpenVinoRunner.__enter__", refuse)
    request = request_for(features_spec(write_features_model(tmp_path / "model.onnx")))
    manifest = resolve_engine(request, store, feature_sample, quiet).engine.manifest
    assert manifest.runtime == "onnxruntime"
    errors = {rung.runtime: rung.error for rung in manifest.rungs}
    assert errors["openvino"] == "RuntimeError: this processor is too old"


def test_nothing_is_published_when_no_candidate_passes(store: EngineStore, tmp_path: Path) -> None:
    spec = features_spec(write_features_model(tmp_path / "model.onnx"))
    with pytest.raises(AccuracyError, match="no engine passes the gate"):
        resolve_engine(request_for(spec, min_agreement=1.1), store, feature_sample, quiet)
    assert store.list() == []


def test_another_question_has_another_key(tmp_path: Path) -> None:
    spec = features_spec(write_features_model(tmp_path / "model.onnx"))
    request = request_for(spec)
    keys = {
        request_key(request, "m"),
        request_key(request, "n"),
        request_key(dataclasses.replace(request, batch_size=8), "m"),
        request_key(dataclasses.replace(request, device=this_cpu(1)), "m"),
        request_key(request_for(spec, min_agreement=0.95), "m"),
    }
    assert len(keys) == 5
    assert request_key(request, "m") in keys


def test_other_weights_input_head_or_top_k_give_another_fingerprint(tmp_path: Path) -> None:
    path = write_image_model(tmp_path / "a.onnx")
    spec = images_spec(path)
    other_size = ImageInput(height=24, width=24, mean=IMAGES.mean, std=IMAGES.std)
    specs = [
        spec,
        images_spec(write_image_model(tmp_path / "b.onnx", seed=2)),
        dataclasses.replace(spec, input=other_size),
        dataclasses.replace(spec, head="scores"),
        dataclasses.replace(spec, top_k=1),
    ]
    assert len({fingerprint_model(each) for each in specs}) == len(specs)
    assert fingerprint_model(spec) == fingerprint_model(images_spec(path))


def test_the_same_model_in_another_folder_has_the_same_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = write_features_model(tmp_path / "a.onnx")
    second = write_features_model(tmp_path / "other" / "b.onnx")
    assert fingerprint_model(features_spec(first)) == fingerprint_model(features_spec(second))


def test_a_model_bound_to_a_batch_keeps_it(store: EngineStore, tmp_path: Path) -> None:
    spec = features_spec(write_features_model(tmp_path / "model.onnx", batch=3))
    assert resolve_engine(
        request_for(spec), store, feature_sample, quiet
    ).engine.manifest.input.shape
    assert store.list()[0].manifest.batch_size == 3


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx: No such file"):
        fingerprint_model(features_spec(tmp_path / "none.onnx"))


def test_a_model_that_changes_while_its_engine_is_built_gets_none(
    store: EngineStore, tmp_path: Path
) -> None:
    path = write_features_model(tmp_path / "model.onnx")
    request = request_for(features_spec(path))

    def release(num_rows: int, seed: int) -> Sample:
        write_features_model(path, seed=2)
        return feature_sample(num_rows, seed)

    with pytest.raises(ModelError, match=r"model\.onnx: changed while its engine was built"):
        resolve_engine(request, store, release, quiet)
    assert store.list() == []
    assert resolve_engine(request, store, feature_sample, quiet).built


def test_a_file_that_is_no_onnx_is_named(store: EngineStore, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("hello")
    with pytest.raises(ModelError, match="expected a valid ONNX file"):
        resolve_engine(request_for(features_spec(path)), store, feature_sample, quiet)


def test_a_model_with_another_input_is_refused_with_both_shapes(
    store: EngineStore, tmp_path: Path
) -> None:
    path = write_features_model(tmp_path / "model.onnx")
    wrong = FeatureInput(num_features=5)
    spec = dataclasses.replace(features_spec(path), input=wrong)
    rows = np.zeros((96, 5), np.float32)
    with pytest.raises(ModelError, match=r"is float32 \?x8; expected float32 batchx5"):
        resolve_engine(request_for(spec), store, lambda *_: Sample(rows=rows), quiet)


@pytest.mark.parametrize("source", ["no_such_module:model", "engines.demo_models:no_such"])
def test_a_callable_that_is_not_there_is_named(tmp_path: Path, source: str) -> None:
    spec = dataclasses.replace(features_spec(tmp_path), source=source)
    with pytest.raises(ModelError, match=r"expected module:callable that returns a torch\.nn"):
        fingerprint_model(spec)


def test_nothing_heavy_is_imported_before_an_engine_is_built_or_run() -> None:
    code = (
        "import sys, engines.build, engines.load, engines.store, engines.model, engines.keys\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
