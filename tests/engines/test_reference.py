"""The fp32 graph that is kept beside an engine answers as the model does, on every night."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from engines.build import Sample, resolve_engine
from engines.errors import EngineCorruptError, EngineError
from engines.gate import run_rows
from engines.load import open_runner
from engines.manifest import REFERENCE
from engines.reference import fp32_answers, has_reference
from engines.store import EngineStore
from tests.engines.small_graphs import embedding, features, save
from tests.engines.small_models import (
    feature_rows,
    feature_sample,
    features_spec,
    image_rows,
    image_sample,
    images_spec,
    request_for,
    write_features_model,
    write_image_model,
)
from tests.engines.small_stores import a_manifest, linear_graph, probe_of


def quiet(_: str) -> None:
    """Takes progress."""


@pytest.mark.parametrize("num_rows", [1, 13, 40])
def test_fp32_answers_come_as_the_engines_do_and_near_to_them(
    store: EngineStore, tmp_path: Path, num_rows: int
) -> None:
    spec = images_spec(write_image_model(tmp_path / "model.onnx"))
    engine = resolve_engine(request_for(spec), store, image_sample, quiet).engine
    # Rows that int8 is near to with weights of 7 bits, too: the machine chooses the engine.
    rows = image_rows(num_rows, seed=2)
    expected = fp32_answers(engine, rows)
    with open_runner(engine) as runner:
        found = run_rows(runner, rows)
    assert expected.keys() == found.keys() == {"class_id", "probability"}
    for name, array in expected.items():
        assert (array.shape, array.dtype) == (found[name].shape, found[name].dtype)
    np.testing.assert_allclose(expected["probability"], found["probability"], atol=0.1)


def test_fp32_is_that_of_the_model_whatever_the_engine_is(
    store: EngineStore, tmp_path: Path
) -> None:
    import onnxruntime

    path = write_features_model(tmp_path / "model.onnx")
    engine = resolve_engine(request_for(features_spec(path)), store, feature_sample, quiet).engine
    rows = feature_sample(20, 5).rows
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"x": rows})
    path.unlink()  # a night needs no model file for it
    np.testing.assert_allclose(fp32_answers(engine, rows)["score"], scores, rtol=1e-5, atol=1e-5)


def test_a_graph_that_does_not_run_is_an_error_of_the_engine(
    store: EngineStore, tmp_path: Path
) -> None:
    spec = features_spec(write_features_model(tmp_path / "model.onnx"))
    engine = resolve_engine(request_for(spec), store, feature_sample, quiet).engine
    assert has_reference(engine)
    rows = feature_sample(20, 5).rows
    graph = engine.attachment(REFERENCE)
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(EngineCorruptError, match=r"reference\.onnx: sha256 .*was changed"):
        fp32_answers(engine, rows)
    engine.check()  # it scores all the same
    graph.write_bytes(content)
    with pytest.raises(EngineError, match=r"reference\.onnx: .*expected fp32 to run"):
        fp32_answers(engine, rows[:, :-1])
    bare = dataclasses.replace(
        engine, manifest=dataclasses.replace(engine.manifest, attachments={})
    )
    assert not has_reference(bare)


def test_a_row_that_fp32_cannot_be_run_with_has_no_answer_and_costs_no_other(
    store: EngineStore, tmp_path: Path
) -> None:
    def rows(num_rows: int, seed: int) -> Sample:
        values = feature_rows(num_rows, seed)
        values[:, 0] = np.arange(num_rows) % 20
        return Sample(rows=values)

    spec = features(save(embedding(20), tmp_path / "model.onnx"))
    engine = resolve_engine(request_for(spec), store, rows, quiet).engine
    some = rows(13, 5).rows
    expected = fp32_answers(engine, some)["score"]
    assert np.isfinite(expected).all()
    some[[2, 12], 0] = 20
    expected[[2, 12]] = np.nan
    np.testing.assert_array_equal(fp32_answers(engine, some)["score"], expected)


def test_an_engine_that_is_its_own_reference_is_checked_all_the_same(
    store: EngineStore, tmp_path: Path
) -> None:
    graph = linear_graph()
    manifest = a_manifest(probe=probe_of(graph, tmp_path))
    engine = store.publish(manifest, graph, {REFERENCE: graph})
    engine.artifact.write_bytes(graph[:-1])
    with pytest.raises(EngineCorruptError, match=r"graph\.onnx: sha256"):
        engine.check()
