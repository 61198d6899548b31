from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.errors import ModelError
from engines.export import fixed_batch, load_core
from engines.graph import output_specs, wrap
from engines.model import FeatureInput, Head, ImageInput, ModelSpec
from engines.runner import LOGITS
from tests.engines.small_graphs import (
    features,
    gemm,
    linear,
    linear_weights,
    make_model,
    run_graph,
    save,
)

ROWS = np.random.default_rng(3).standard_normal((4, 8), dtype=np.float32)


def linear_answers() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    weights = linear_weights()
    return np.asarray(ROWS @ weights["w"].T + weights["b"], np.float32)


def test_pixels_are_normalised_in_the_graph_as_numpy_would(tmp_path: Path) -> None:
    images = ImageInput(height=4, width=6, mean=(1.0, 100.0, 250.0), std=(0.5, 64.0, 200.0))
    node = helper.make_node("Flatten", ["x"], ["y"])
    path = save(make_model([node], {}, ["b", 72], shape_in=("b", 3, 4, 6)), tmp_path / "m.onnx")
    spec = ModelSpec(source=str(path), input=images, head="scores")
    rows = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    graph = wrap(load_core(spec), spec, batch_size=2)
    assert graph.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    expected = (rows - np.array(images.mean)) / np.array(images.std)
    (score,) = run_graph(graph, rows)
    np.testing.assert_allclose(score, expected.transpose(0, 3, 1, 2).reshape(2, -1), rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_classes_head_gives_the_best_classes_and_their_shares(
    tmp_path: Path, top_k: int
) -> None:
    spec = features(save(linear(), tmp_path / "m.onnx"), "classes", top_k)
    graph = wrap(load_core(spec), spec, batch_size=4)
    class_id, probability, found = run_graph(graph, ROWS)
    logits = linear_answers().astype(np.float64)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert class_id.dtype == np.int32
    np.testing.assert_array_equal(class_id, np.argsort(-shares, axis=1)[:, :top_k])
    np.testing.assert_allclose(probability, -np.sort(-shares, axis=1)[:, :top_k], atol=1e-6)
    outputs = output_specs(graph, spec)
    assert [each.shape for each in outputs] == [(4, top_k), (4, top_k), (4, 4)]


@pytest.mark.parametrize("columns", [1, 4], ids=["[b]", "[b, m]"])
def test_the_scores_head_gives_one_column_for_each_output(tmp_path: Path, columns: int) -> None:
    model, expected = linear(), linear_answers()
    if columns == 1:
        mean = helper.make_node("ReduceMean", ["z"], ["y"], axes=[1], keepdims=0)
        model = make_model([gemm(target="z"), mean], linear_weights(), ["b"])
        expected = expected.mean(axis=1, keepdims=True)
    spec = features(save(model, tmp_path / "m.onnx"))
    (score,) = run_graph(wrap(load_core(spec), spec, batch_size=4), ROWS)
    np.testing.assert_allclose(score, expected, atol=1e-5)


@pytest.mark.parametrize("names", [("x", "score"), ("rows", "y"), ("x", "probability")])
@pytest.mark.parametrize("head", ["scores", "classes"])
def test_a_model_may_use_the_names_that_the_engine_uses(
    tmp_path: Path, names: tuple[str, str], head: Head
) -> None:
    model = make_model([gemm(*names)], linear_weights(), ["b", 4], names=names)
    spec = features(save(model, tmp_path / "m.onnx"), head)
    outputs = run_graph(wrap(load_core(spec), spec, batch_size=4), ROWS)
    expected = linear_answers()
    if head == "scores":
        np.testing.assert_allclose(outputs[0], expected, atol=1e-5)
    else:
        np.testing.assert_array_equal(outputs[0][:, 0], expected.argmax(axis=1))


def branching(name: str) -> onnx.ModelProto:
    """Reads a tensor of its own in both branches, and gives it a name inside of one, too."""

    def branch(target: str, operator: str) -> onnx.GraphProto:
        nodes = [helper.make_node(operator, [name], [target])]
        out = helper.make_tensor_value_info(target, TensorProto.FLOAT, None)
        return helper.make_graph(nodes, target, [], [out])

    nodes = [
        gemm(target=name),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "low"], ["is_high"]),
        helper.make_node(
            "If",
            ["is_high"],
            ["y"],
            then_branch=branch("class_id" if name == LOGITS else LOGITS, "Identity"),
            else_branch=branch("other", "Neg"),
        ),
    ]
    arrays = {**linear_weights(), "low": np.array(-1e9, np.float32)}
    return make_model(nodes, arrays, ["b", 4])


@pytest.mark.parametrize("name", ["logits", "rows", "score"])
@pytest.mark.parametrize("head", ["scores", "classes"])
def test_the_names_that_the_engine_uses_may_be_those_of_tensors_that_branches_read(
    tmp_path: Path, name: str, head: Head
) -> None:
    spec = features(save(branching(name), tmp_path / "m.onnx"), head)
    outputs = run_graph(wrap(load_core(spec), spec, batch_size=4), ROWS)
    np.testing.assert_allclose(outputs[-1], linear_answers(), atol=1e-5)


def one_number() -> onnx.ModelProto:
    mean = helper.make_node("ReduceMean", ["z"], ["y"], axes=[1], keepdims=0)
    return make_model([gemm(target="z"), mean], linear_weights(), ["b"])


def one_pixel() -> onnx.ModelProto:
    wider = helper.make_node("Unsqueeze", ["z", "last"], ["y"])
    arrays = linear_weights() | {"last": np.array([2, 3])}
    return make_model([gemm(target="z"), wider], arrays, ["b", 4, 1, 1])


def labels() -> onnx.ModelProto:
    best = helper.make_node("ArgMax", ["z"], ["y"], axis=1, keepdims=0)
    kinds = (TensorProto.FLOAT, TensorProto.INT64)
    return make_model([gemm(target="z"), best], linear_weights(), ["b"], kinds=kinds)


@pytest.mark.parametrize(
    ("model", "head", "top_k", "said"),
    [
        (one_number(), "classes", 1, r"does not fit; .*set `model\.head: scores`"),
        (
            one_pixel(),
            "classes",
            1,
            r"has shape \[batch, 4, 1, 1\]; .*flatten the output,",
        ),
        (labels(), "scores", 1, r"is y \(INT64\); expected a float32 .*logits before ArgMax"),
        (linear(), "classes", 5, r"C >= 5\. Check `model\.top_k`"),
        (linear(1), "classes", 1, r"\[batch, 1\]; .*C >= 2.*set `model\.head: scores`"),
    ],
    ids=[
        "one number is no logits",
        "a pixel's logits",
        "labels are no scores",
        "too few classes",
        "one logit",
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    tmp_path: Path, model: onnx.ModelProto, head: Head, top_k: int, said: str
) -> None:
    spec = features(save(model, tmp_path / "m.onnx"), head, top_k)
    with pytest.raises(ModelError, match=f"its output .*{said}"):
        output_specs(wrap(load_core(spec), spec, batch_size=4), spec)


@pytest.mark.parametrize(("opset", "ir_version"), [(8, 3), (9, 4), (13, 7), (17, 8)])
def test_graphs_of_old_opsets_answer_as_before(tmp_path: Path, opset: int, ir_version: int) -> None:
    spec = features(save(linear(opset=opset, ir_version=ir_version), tmp_path / "m.onnx"))
    core = load_core(spec)
    assert max(entry.version for entry in core.opset_import if not entry.domain) >= 13
    (score,) = run_graph(wrap(core, spec, batch_size=4), ROWS)
    np.testing.assert_allclose(score, linear_answers(), atol=1e-5)


def test_a_graph_bound_to_a_batch_says_so(tmp_path: Path) -> None:
    bound = save(linear(shape_in=(3, 8)), tmp_path / "bound.onnx")
    free = save(linear(), tmp_path / "free.onnx")
    assert fixed_batch(load_core(features(bound))) == 3
    assert fixed_batch(load_core(features(free))) is None


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused_in_one_sentence(tmp_path: Path, kept: float) -> None:
    data = linear().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ModelError, match="expected a valid ONNX file") as caught:
        load_core(features(path))
    assert "\n" not in str(caught.value)


def test_another_input_is_refused_with_what_was_found(tmp_path: Path) -> None:
    wrong_type = make_model(
        [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), gemm("f")],
        linear_weights(),
        ["batch", 4],
        kinds=(TensorProto.INT64, TensorProto.FLOAT),
    )
    with pytest.raises(ModelError, match=r"x is int64 .*expected float32 batchx8.*a float32 input"):
        load_core(features(save(wrong_type, tmp_path / "type.onnx")))
    two = linear()
    two.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["b", 1]))
    with pytest.raises(ModelError, match="inputs x, mask; expected exactly one"):
        load_core(features(save(two, tmp_path / "two.onnx")))
    square = ImageInput(height=8, width=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    spec = ModelSpec(source=str(tmp_path / "m.onnx"), input=square, head="scores")
    save(linear(), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"batchx3x8x8\. Check the job's `model\.size`"):
        load_core(spec)
    last = make_model([helper.make_node("Flatten", ["x"], ["y"])], {}, ["b", 192])
    for size in (8, "any"):
        shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", size, size, 3])
        last.graph.input[0].CopyFrom(shape)
        save(last, tmp_path / "m.onnx")
        with pytest.raises(ModelError, match=r"batchx3x8x8\. .*with channels first"):
            load_core(spec)


def test_inputs_that_a_graph_could_make_are_told_how(tmp_path: Path) -> None:
    grey = make_model([helper.make_node("Flatten", ["x"], ["y"])], {}, ["b", 64])
    grey.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1, 8, 8])
    )
    square = ImageInput(height=8, width=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    source = str(save(grey, tmp_path / "grey.onnx"))
    with pytest.raises(ModelError, match=r"x1x8x8; .*make one channel of the three"):
        load_core(ModelSpec(source=source, input=square, head="scores"))
    steps = make_model([helper.make_node("Flatten", ["x"], ["y"])], {}, ["b", 8])
    steps.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4, 2])
    )
    with pytest.raises(ModelError, match=r"it takes batchx8, and reshape them in the graph"):
        load_core(features(save(steps, tmp_path / "steps.onnx")))


def test_a_features_spec_describes_its_rows() -> None:
    source = FeatureInput(num_features=8)
    assert (source.row_shape, source.model_row_shape, source.dtype) == ((8,), (8,), "float32")
