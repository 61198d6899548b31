"""A job file from a look at data and model, which the other commands take at once."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper

from flows.init import InitRequest, draft_job, write_job_file
from pipeline.errors import ConfigError
from pipeline.job_file import load_job

DATE = "2026-11-20"
JPEG = b"\xff\xd8\xff\xe0rest"


def save_pictures_net(
    path: Path, *, row: tuple[Any, ...] = (3, 64, 64), classes: int = 10, last: str = ""
) -> str:
    """A small convolutional net; `last` is put behind its logits."""
    rng = np.random.default_rng(0)
    weights = {"w": (8, 3, 3, 3), "k": (8, classes)}
    tensors = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "k"], ["logits" if last else "y"]),
        *([helper.make_node(last, ["logits"], ["y"])] if last else []),
    ]
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", *row])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", classes])
    graph = helper.make_graph(nodes, "net", [rows], [out], tensors)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return str(path)


def save_features_net(path: Path) -> str:
    """32 features, one score."""
    weights = numpy_helper.from_array(np.ones((32, 1), np.float32), "w")
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 32])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 1])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "net", [rows], [out], [weights])), path)
    return str(path)


def write_rows(root: Path, **columns: Any) -> str:
    folder = root / "data" / f"dt={DATE}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "part-0.parquet")
    return str(root / "data")


def request(uri: str, model: str, **changes: Any) -> InitRequest:
    return InitRequest(**{"uri": uri, "model": model, "name": None, "output": None, **changes})


def test_a_features_job_is_planned_and_run_at_once(
    score: Callable[..., Any], features_folder: Path, tmp_path: Path
) -> None:
    users, model, job = (
        features_folder / "users",
        features_folder / "ranking.onnx",
        tmp_path / "j.yaml",
    )
    made = score(
        "init", users, "--model", model, "--file", job, "--output", tmp_path / "out", "--json"
    )
    assert made.code == 0, made.err
    assert made.json["newest_date"] == DATE
    store = f"engine.store={features_folder / 'engines'}"
    planned = score("plan", job, "--date", DATE, "--json", "--set", store)
    assert planned.json["rows"] == 40_000
    ran = score("run", job, "--date", DATE, "--json", "--set", store)
    assert (ran.code, ran.json["status"]) == (0, "published"), ran.err


def test_a_pictures_job_is_planned_at_once(
    score: Callable[..., Any], pictures_folder: Path, tmp_path: Path
) -> None:
    model, job = save_pictures_net(tmp_path / "net.onnx"), tmp_path / "job.yaml"
    made = score("init", pictures_folder / "pictures", "--model", model, "--file", job)
    assert made.code == 0, made.err
    assert "check: model.mean, model.std: ImageNet's" in made.out
    planned = score("plan", job, "--date", DATE, "--json")
    assert (planned.code, planned.json["rows"]) == (0, 512), planned.err
    loaded = load_job(str(job))
    assert loaded.input.images is not None
    assert (loaded.input.images.column, loaded.model.size) == ("image", (64, 64))
    assert (loaded.model.head, loaded.input.passthrough) == ("classes", ("picture_id",))


def test_a_file_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    save_features_net(tmp_path / "m.onnx")
    uri = write_rows(tmp_path, user_id=[1], **{f"f{n}": [0.5] for n in range(32)})
    path = tmp_path / "job.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists; expected a new file"):
        write_job_file(request(uri, str(tmp_path / "m.onnx")), str(path))
    assert path.read_text() == "mine"


def test_features_are_those_that_the_model_takes(tmp_path: Path) -> None:
    save_features_net(tmp_path / "m.onnx")
    floats = {f"f{n}": [0.5] for n in range(31)}
    draft = draft_job(
        request(write_rows(tmp_path, user_id=[1], age=[40.0], **floats), f"{tmp_path}/m.onnx")
    )
    assert "columns: [age, f0, f1," in draft.text
    assert any("expected the model's own order" in check for check in draft.checks)


def test_a_model_of_sequences_is_to_take_plain_rows(tmp_path: Path) -> None:
    path = save_features_net(tmp_path / "m.onnx")
    model = onnx.load(path)
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4, 8])
    model.graph.input[0].CopyFrom(rows)
    onnx.save(model, path)
    draft = draft_job(request(write_rows(tmp_path, user_id=[1], f0=[0.5], f1=[0.5]), path))
    assert any("takes batch x 4 x 8; expected batch x features" in c for c in draft.checks)


def test_features_that_are_too_few_are_said(tmp_path: Path) -> None:
    save_features_net(tmp_path / "m.onnx")
    draft = draft_job(
        request(write_rows(tmp_path, user_id=[1], f0=[0.5], f1=[0.5]), f"{tmp_path}/m.onnx")
    )
    assert "input.features.columns: f* are 2 numbers; the model takes 32" in draft.checks


@pytest.mark.parametrize(
    ("net", "head", "said"),
    [
        ({}, "classes", "ImageNet's"),
        ({"classes": 1}, "scores", "ImageNet's"),
        ({"last": "Softmax"}, "classes", "ImageNet's"),
        ({"last": "Sigmoid"}, "scores", "because Sigmoid makes probabilities"),
        ({"last": "Hardmax"}, "scores", "because Hardmax gives ranks"),
        ({"row": (3, "h", "w")}, "classes", "the model does not say it"),
        ({"row": (64, 64, 3)}, "classes", "expected channels first"),
    ],
)
def test_the_head_and_what_to_check_follow_from_the_graph(
    net: dict[str, Any], head: str, said: str, tmp_path: Path
) -> None:
    uri = write_rows(tmp_path, picture_id=[1], jpeg=[JPEG])
    draft = draft_job(request(uri, save_pictures_net(tmp_path / "net.onnx", **net)))
    assert f"head: {head} " in draft.text
    assert any(said in check for check in draft.checks)


def test_of_several_outputs_the_one_that_is_taken_is_said(tmp_path: Path) -> None:
    path = save_pictures_net(tmp_path / "net.onnx", classes=3, last="Relu")
    model = onnx.load(path)
    hidden = helper.make_tensor_value_info("f", TensorProto.FLOAT, ["b", 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 3])
    model.graph.output.insert(0, hidden)
    model.graph.output.append(logits)
    onnx.save(model, path)
    draft = draft_job(request(write_rows(tmp_path, picture_id=[1], jpeg=[JPEG]), path))
    assert "model.source: output logits is taken, not f, y" in draft.checks
    assert "# 3 logits" in draft.text


def test_data_and_model_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_features_net(tmp_path / "m.onnx")
    net = save_pictures_net(tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=r"no binary column.*takes batch x 3 x 64 x 64"):
        draft_job(request(write_rows(tmp_path, user_id=[1], f0=[0.5]), net))
    with pytest.raises(ConfigError, match=r"no numeric columns.*takes batch x 32"):
        draft_job(request(write_rows(tmp_path, picture_id=[1], jpeg=[JPEG]), f"{tmp_path}/m.onnx"))


def test_a_torch_model_is_described_by_the_data(tmp_path: Path) -> None:
    uri = write_rows(tmp_path, picture_id=[1], jpeg=[JPEG])
    draft = draft_job(request(uri, "my.models:net"))
    assert "source: my.models:net" in draft.text
    assert "size: [224, 224]" in draft.text


@pytest.mark.parametrize(("name", "expected"), [(None, "data"), ("nightly", "nightly")])
def test_the_name_is_the_folders_unless_one_is_given(
    name: str | None, expected: str, tmp_path: Path
) -> None:
    asked = request(write_rows(tmp_path, picture_id=[1], jpeg=[JPEG]), "my.models:net", name=name)
    path = tmp_path / "job.yaml"
    assert write_job_file(asked, str(path))["job"] == expected
    assert load_job(str(path)).output.uri == f"{tmp_path}/scores"


def test_a_name_that_is_none_writes_nothing(tmp_path: Path) -> None:
    uri = write_rows(tmp_path, picture_id=[1], jpeg=[JPEG])
    with pytest.raises(ConfigError, match="the new job file, line 2: name"):
        write_job_file(request(uri, "my.models:net", name="a: b"), str(tmp_path / "job.yaml"))
    assert not (tmp_path / "job.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "foo"}, "--model: 'foo'; expected an ONNX file"),
        ({"model": ""}, "--model: ''; expected"),
        ({"model": "j.yaml"}, "--model: 'j.yaml'; expected"),
        ({"model": "http://x/y"}, "--model: 'http://x/y'; expected"),
        ({"output": "http://x"}, "http://x: unknown kind of storage"),
    ],
)
def test_what_no_run_would_take_writes_nothing(
    changes: dict[str, str], said: str, tmp_path: Path
) -> None:
    uri = write_rows(tmp_path, picture_id=[1], jpeg=[JPEG])
    asked = {"uri": uri, "model": "my.models:net", **changes}
    with pytest.raises(ConfigError, match=said):
        write_job_file(request(**asked), str(tmp_path / "job.yaml"))
    assert not (tmp_path / "job.yaml").exists()


def test_what_to_type_next_can_be_pasted(tmp_path: Path) -> None:
    uri = write_rows(tmp_path, picture_id=[1], jpeg=[JPEG])
    path = str(tmp_path / "my job.yaml")
    (line,) = write_job_file(request(uri, "my.models:net"), path)["next"]
    assert shlex.split(line)[:3] == ["score", "plan", path]


@pytest.mark.parametrize(
    ("uri", "beside"),
    [
        ("s3://bucket/a/pictures/", "s3://bucket/a"),
        ("s3://bucket/pictures", "s3://bucket"),
        ("s3://bucket", "s3://bucket"),
        ("pictures", "."),
        ("/data/pictures", "/data"),
    ],
)
def test_scores_go_beside_the_data(uri: str, beside: str) -> None:
    from flows.init import _beside

    assert _beside(uri) == beside
