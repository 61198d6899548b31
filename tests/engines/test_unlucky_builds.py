"""Models, rows and stores that make a build or its reuse difficult."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.build import RowSource, Sample, resolve_engine
from engines.devices import this_cpu
from engines.errors import AccuracyError, EngineCorruptError, EngineError
from engines.fp32 import REFERENCE
from engines.gate import GateSpec, compare, race
from engines.keys import digest_bytes
from engines.load import make_runner, open_runner
from engines.manifest import StoredEngine
from engines.model import FeatureInput, ImageInput
from engines.runner import Array
from tests.engines.small_graphs import (
    embedding,
    features,
    gemm,
    linear,
    linear_weights,
    make_model,
    save,
)
from tests.engines.small_models import feature_rows, request_for
from tests.engines.small_stores import local_store

SPAWN = multiprocessing.get_context("spawn")


def quiet(_: str) -> None:
    """Takes progress."""


def as_source(rows: Callable[[int, int], Array]) -> RowSource:
    return lambda num_rows, seed: Sample(rows=rows(num_rows, seed))


def build(
    folder: Path,
    model: onnx.ModelProto,
    rows: Callable[[int, int], Array] = feature_rows,
    min_agreement: float = 0.9,
) -> StoredEngine:
    path = save(model, folder / "m.onnx")
    request = request_for(features(path), min_agreement=min_agreement)
    store = local_store(folder / "store")
    return resolve_engine(request, store, as_source(rows), quiet).engine


def logarithm() -> onnx.ModelProto:
    nodes = [helper.make_node("Log", ["x"], ["l"]), gemm("l")]
    return make_model(nodes, linear_weights(), ["batch", 4])


def positive_rows(num_rows: int, seed: int) -> Array:
    return np.abs(feature_rows(num_rows, seed)) + np.float32(0.1)


def test_where_int8_misses_the_gate_fp32_is_chosen_and_the_reason_says_so(tmp_path: Path) -> None:
    def rows(num_rows: int, seed: int) -> Array:
        values = feature_rows(num_rows, seed)
        values[:, 0] *= 1000  # its range leaves no step for the others
        return values

    weights = linear_weights()
    weights["w"][:, 0] = 1e-6
    model = make_model([gemm()], weights, ["batch", 4])
    manifest = build(tmp_path, model, rows, min_agreement=1.0).manifest
    assert manifest.precision == "fp32"
    assert "openvino int8 missed the gate: agreement 0." in manifest.reason


def test_where_int8_cannot_be_made_fp32_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no such\noperator")

    monkeypatch.setattr("engines.quantize.quantize_static", refuse)
    manifest = build(tmp_path, linear()).manifest
    assert manifest.precision == "fp32"
    errors = {(r.runtime, r.precision): r.error for r in manifest.rungs}
    assert errors["openvino", "int8"] == "NotImplementedError: no such operator"
    assert "openvino int8 failed: NotImplementedError: no such operator" in manifest.reason
    assert "openvino int8: left out" in caplog.text


def test_a_model_that_answers_nan_gets_no_engine(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="fp32: a finite answer to none of 64 rows"):
        build(tmp_path, logarithm(), lambda num_rows, seed: -positive_rows(num_rows, seed))
    assert local_store(tmp_path / "store").list() == []


@pytest.mark.parametrize("where", [0, -1], ids=["to calibrate with", "held out"])
def test_one_row_that_fp32_has_no_answer_to_costs_no_rung(
    tmp_path: Path, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    def rows(num_rows: int, seed: int) -> Array:
        values = positive_rows(num_rows, seed)
        values[where, 0] = 0
        return values

    manifest = build(tmp_path, logarithm(), rows).manifest
    assert [(rung.passed, rung.error) for rung in manifest.rungs] == [(True, None)] * 4
    assert manifest.accuracy.num_rows == (64 if where == 0 else 63)
    said = "1 of 32 calibration rows" if where == 0 else "1 of 64 held-out rows"
    assert f"{said}: left out" in caplog.text


def test_rows_that_fp32_cannot_be_run_with_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An id beyond the table ends a whole batch."""

    def rows(num_rows: int, seed: int) -> Array:
        values = feature_rows(num_rows, seed)
        values[:, 0] = np.arange(num_rows) % 20
        values[[3, 20, 40, 41, 95], 0] = 20
        return values

    manifest = build(tmp_path, embedding(20), rows).manifest
    assert [rung.error for rung in manifest.rungs[:4]] == [None] * 4
    assert manifest.accuracy.num_rows == 61
    for said in ("2 of 32 rows: left out", "3 of 64 rows: left out"):
        assert f"fp32: {said}" in caplog.text


def test_int8_that_answers_rows_that_fp32_does_not_is_not_chosen(tmp_path: Path) -> None:
    def rows(num_rows: int, seed: int) -> Array:
        values = positive_rows(num_rows, seed)
        values[::10, 0] = -1  # NaN, which int8 takes for a number
        return values

    manifest = build(tmp_path, logarithm(), rows).manifest
    answers = dict.fromkeys(["openvino int8", "onnxruntime int8"], ())
    failures = {rung.name: rung.failures for rung in manifest.rungs if rung.name in answers}
    assert set(failures.values()) == {("answers to 6 rows that fp32 has none to",)}
    assert manifest.rungs[3].passed
    assert manifest.accuracy.num_invented == 0


def test_calibration_rows_without_any_answer_cost_int8_alone(tmp_path: Path) -> None:
    def rows(num_rows: int, seed: int) -> Array:
        values = positive_rows(num_rows, seed)
        values[:32] *= -1
        return values

    manifest = build(tmp_path, logarithm(), rows).manifest
    assert manifest.precision == "fp32"
    assert manifest.rungs[0].error is not None
    assert "a finite answer to none of 32 rows" in manifest.rungs[0].error


def test_an_engine_whose_probe_is_nan_opens_all_the_same(tmp_path: Path) -> None:
    def rows(num_rows: int, seed: int) -> Array:
        return positive_rows(num_rows, seed) + np.float32(1)

    nodes = [helper.make_node("Sub", ["x", "one"], ["d"]), helper.make_node("Log", ["d"], ["l"])]
    arrays = linear_weights() | {"one": np.float32([1])}
    model = make_model([*nodes, gemm("l")], arrays, ["batch", 4])
    # Only fp32 agrees to the last bit; int8 would turn the NaN into a number.
    engine = build(tmp_path, model, rows, min_agreement=1.0)
    assert np.isnan(engine.manifest.probe).any()
    with open_runner(engine) as runner:
        (scores,) = next(iter(runner.infer([np.full((4, 8), 2, np.float32)])))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("num_ids", [1, 2, 3])
def test_the_probe_stays_within_the_smallest_tables(tmp_path: Path, num_ids: int) -> None:
    def rows(num_rows: int, seed: int) -> Array:
        values = feature_rows(num_rows, seed)
        values[:, 0] = np.arange(num_rows) % num_ids
        return values

    engine = build(tmp_path, embedding(num_ids), rows)
    assert [rung.error for rung in engine.manifest.rungs[:4]] == [None] * 4
    with open_runner(engine):
        pass


@pytest.mark.parametrize(
    "rows",
    [np.zeros((0, 8), np.float32), np.zeros((9, 7), np.float32), np.zeros((9, 8))],
    ids=["none", "another width", "another dtype"],
)
def test_rows_that_are_none_or_of_another_kind_are_refused(tmp_path: Path, rows: Array) -> None:
    with pytest.raises(EngineError, match=r"rows to calibrate with: .*expected float32"):
        build(tmp_path, linear(), lambda *_: rows)


@pytest.mark.parametrize("opset", [13, 17])
def test_a_graph_of_an_old_opset_gets_all_its_candidates(tmp_path: Path, opset: int) -> None:
    rungs = build(tmp_path, linear(opset=opset)).manifest.rungs
    assert [rung.error for rung in rungs] == [None] * 4


def test_a_build_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    engine = build(tmp_path, linear())
    assert list(folder.iterdir()) == []
    assert engine.artifact.parent.stat().st_mode & 0o055 == ~_umask() & 0o055


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_other_calibration_rows_make_another_engine_but_not_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the race says, the int8 engine of OpenVINO wins here.
    monkeypatch.setattr(
        "engines.ladder.race", lambda r, *_: {name: float(name == "openvino int8") for name in r}
    )
    path = save(linear(), tmp_path / "m.onnx")
    request = request_for(features(path), min_agreement=0.5)
    found = [
        resolve_engine(
            request, local_store(tmp_path / name), as_source(rows), quiet
        ).engine.manifest
        for name, rows in {
            "a": feature_rows,
            "b": feature_rows,
            "c": lambda n, seed: feature_rows(n, seed) * np.float32(1.5),
        }.items()
    ]
    assert len({m.request_key for m in found}) == 1
    assert found[0].key == found[1].key != found[2].key
    assert found[0].calibration_sha256 == found[1].calibration_sha256
    assert found[0].calibration_sha256 != found[2].calibration_sha256


def test_another_models_graph_with_a_mended_hash_is_caught_by_the_probe(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    engine = build(tmp_path, linear())
    weights = linear_weights()
    weights["b"] += 1
    other = build(tmp_path / "other", make_model([gemm()], weights, ["batch", 4]))
    data = other.artifact.read_bytes()
    mended = dataclasses.replace(
        engine, manifest=dataclasses.replace(engine.manifest, artifact_sha256=digest_bytes(data))
    )
    mended.artifact.write_bytes(data)
    with pytest.raises(EngineCorruptError, match="probe batch gives"), open_runner(mended):
        pytest.fail("another model's graph was opened")


@pytest.mark.parametrize("damage", ["pointer", "manifest", "other key"])
def test_a_damaged_entry_is_not_found_and_said(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = build(tmp_path, linear())
    folder = tmp_path / "store" / "requests" / engine.manifest.request_key
    pointer = folder / "0001.json"
    manifest = engine.artifact.with_name("manifest.json")
    if damage == "pointer":
        pointer.write_text("[")
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:-40])
    else:
        manifest.write_text(manifest.read_text().replace(engine.key, "f" * 64))
    store = local_store(tmp_path / "store")
    with caplog.at_level(logging.WARNING):
        assert store.find(engine.manifest.request_key) is None
    assert "it is not used" in caplog.text
    again = build(tmp_path, linear())
    again.check()
    assert store.find(engine.manifest.request_key) == again


def test_an_unknown_runtime_is_refused_by_name(tmp_path: Path) -> None:
    known = build(tmp_path, linear()).manifest
    with pytest.raises(EngineError, match="runtime tensorrt: not known on a cpu"):
        make_runner("tensorrt", tmp_path / "m.onnx", known.input, known.outputs, this_cpu(1))


def test_the_race_gives_a_speed_to_every_runner(tmp_path: Path) -> None:
    engine = build(tmp_path, linear())
    with open_runner(engine) as one, open_runner(engine) as two:
        speeds = race({"one": one, "two": two}, feature_rows(4, 0))
    assert set(speeds) == {"one", "two"}
    assert min(speeds.values()) > 0
    assert REFERENCE in {(r.runtime, r.precision) for r in engine.manifest.rungs}


def test_equal_scores_reach_even_the_strictest_gate() -> None:
    scores = np.random.default_rng(0).random((999, 3), dtype=np.float32)
    strict = GateSpec(min_agreement=1.0)
    assert compare("scores", {"score": scores}, {"score": scores.copy()}).failures(strict) == ()


def test_an_image_and_a_features_input_never_share_a_row_shape() -> None:
    image = ImageInput(height=2, width=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert image.row_shape == (2, 3, 3)
    assert FeatureInput(num_features=18).row_shape == (18,)


def _hold(root: str, ready: Connection) -> None:
    with local_store(root).lock("k"):
        ready.send("held")
        signal.pause()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    here, there = SPAWN.Pipe()
    owner = SPAWN.Process(target=_hold, args=(str(tmp_path), there))
    owner.start()
    assert here.poll(60)
    assert owner.pid
    os.kill(owner.pid, signal.SIGKILL)
    owner.join(20)
    with local_store(tmp_path).lock("k", timeout_s=2.0):
        pass
    here.close()
    there.close()


def _build_and_count(folder: str) -> None:
    def counted(num_rows: int, seed: int) -> Array:
        with Path(folder, "count").open("a") as file:
            file.write("built\n")
        return feature_rows(num_rows, seed)

    request = request_for(features(Path(folder, "m.onnx")))
    resolve_engine(request, local_store(Path(folder, "store")), as_source(counted), quiet)


def test_two_processes_build_one_engine_once(tmp_path: Path) -> None:
    save(linear(), tmp_path / "m.onnx")
    workers = [SPAWN.Process(target=_build_and_count, args=(str(tmp_path),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "count").read_text() == "built\n"
    assert len(local_store(tmp_path / "store").list()) == 1
