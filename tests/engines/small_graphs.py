"""Small ONNX graphs of any shape, opset and name, for tests of export, graph and quantiser."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.model import FeatureInput, Head, ModelSpec
from engines.runner import Array

NUM_FEATURES = 8


def gemm(source: str = "x", target: str = "y", **attributes: float) -> onnx.NodeProto:
    return helper.make_node("Gemm", [source, "w", "b"], [target], transB=1, **attributes)


def linear_weights(num_outputs: int = 4) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {
        "w": rng.standard_normal((num_outputs, NUM_FEATURES)).astype(np.float32),
        "b": rng.standard_normal(num_outputs).astype(np.float32),
    }


def make_model(
    nodes: list[onnx.NodeProto],
    arrays: dict[str, Array],
    shape_out: list[int | str],
    *,
    names: tuple[str, str] = ("x", "y"),
    shape_in: tuple[int | str, ...] = ("batch", NUM_FEATURES),
    kinds: tuple[int, int] = (TensorProto.FLOAT, TensorProto.FLOAT),
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    inputs = [helper.make_tensor_value_info(names[0], kinds[0], list(shape_in))]
    if ir_version < 4:  # then constants were inputs too
        inputs += [helper.make_tensor_value_info(c.name, c.data_type, c.dims) for c in constants]
    outputs = [helper.make_tensor_value_info(names[1], kinds[1], shape_out)]
    graph = helper.make_graph(nodes, "model", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def linear(num_outputs: int = 4, **options: object) -> onnx.ModelProto:
    shape: list[int | str] = ["batch", num_outputs]
    return make_model([gemm()], linear_weights(num_outputs), shape, **options)  # type: ignore[arg-type]


def embedding(num_ids: int) -> onnx.ModelProto:
    """The first feature is an id: its row of a table is added to a Gemm of all features."""
    table = np.random.default_rng(3).standard_normal((num_ids, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["c"], axis=1),
        helper.make_node("Cast", ["c"], ["id"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "id"], ["e"]),
        gemm("x", "g"),
        helper.make_node("Add", ["e", "g"], ["y"]),
    ]
    arrays = linear_weights() | {"first": np.array(0), "table": table}
    return make_model(nodes, arrays, ["batch", 4])


def conv_net(seed: int = 0) -> onnx.ModelProto:
    """Conv, depthwise conv, 1x1 conv, pool, Gemm: float32 [batch, 3, 12, 12] -> [batch, 5]."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
        return (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)

    arrays = {"w1": normal(16, 3, 3, 3), "b1": normal(16), "w2": normal(16, 1, 3, 3)}
    arrays |= {"b2": normal(16), "w3": normal(24, 16, 1, 1), "b3": normal(24)}
    arrays |= {"w4": normal(5, 24) * 4, "b4": normal(5)}
    pads = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="c1", pads=pads),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="c2", pads=pads, group=16),
        helper.make_node("Relu", ["c2"], ["r2"], name="r2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], name="c3"),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"], name="p"),
        helper.make_node("Flatten", ["p"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], name="y", transB=1),
    ]
    return make_model(nodes, arrays, ["batch", 5], shape_in=("batch", 3, 12, 12))


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def features(path: Path, head: Head = "scores", top_k: int = 1) -> ModelSpec:
    source = FeatureInput(num_features=NUM_FEATURES)
    return ModelSpec(source=str(path), input=source, head=head, top_k=top_k)


def run_graph(model: onnx.ModelProto, rows: Array, names: list[str] | None = None) -> list[Array]:
    """Outputs (or inner tensors by name) of a graph, as ONNX Runtime computes them."""
    import onnxruntime

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {entry.name for entry in probed.graph.output}
    for name in names or []:
        if name not in known:
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            probed.graph.output.append(info)
    session = onnxruntime.InferenceSession(probed.SerializeToString())
    outputs: list[Array] = session.run(names, {session.get_inputs()[0].name: rows})
    return outputs


def mlp(widths: tuple[int, ...] = (NUM_FEATURES, 32, 32, 32, 32, 1)) -> onnx.ModelProto:
    """Layers g1, g2, ... with Relus between: float32 [batch, widths[0]] -> [batch, widths[-1]]."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    nodes = []
    for position in range(1, len(widths)):
        num_inputs, num_outputs = widths[position - 1 : position + 1]
        weight = rng.standard_normal((num_outputs, num_inputs)) * (2 / num_inputs) ** 0.5
        arrays[f"w{position}"] = weight.astype(np.float32)
        arrays[f"b{position}"] = (rng.standard_normal(num_outputs) * 0.1).astype(np.float32)
        is_last = position == len(widths) - 1
        names = ["x" if position == 1 else f"r{position - 1}", f"w{position}", f"b{position}"]
        target = "y" if is_last else f"h{position}"
        nodes.append(helper.make_node("Gemm", names, [target], name=f"g{position}", transB=1))
        if not is_last:
            nodes.append(helper.make_node("Relu", [target], [f"r{position}"], name=f"a{position}"))
    shape_in = ("batch", widths[0])
    return make_model(nodes, arrays, ["batch", widths[-1]], shape_in=shape_in)


def unlike_layers() -> onnx.ModelProto:
    """A MatMul, a Gemm that is not transposed, and a Gemm without a bias."""
    rng = np.random.default_rng(2)
    arrays: dict[str, Array] = {
        "m": rng.standard_normal((8, 16)),
        "g": rng.standard_normal((16, 12)) * np.arange(1, 13),
        "c": rng.standard_normal(12),
        "w": rng.standard_normal((4, 12)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "m"], ["a"], name="matmul"),
        helper.make_node("Gemm", ["a", "g", "c"], ["b"], name="plain"),
        helper.make_node("Gemm", ["b", "w"], ["y"], name="no_bias", transB=1),
    ]
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return make_model(nodes, arrays, ["batch", 4])


def replaced(model: onnx.ModelProto, **arrays: Array) -> onnx.ModelProto:
    """A copy with other constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            array = arrays[tensor.name].astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def constants_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def hard_to_round(how: str) -> onnx.ModelProto:
    """`mlp()`, answers and all, but that int8 destroys what layer g3 computes.

    `input`: one channel of what it reads is 1,000 times the others, which leaves those no levels.
    `weights`: so is one of each output's weights, on a channel that is always 0.
    """
    model = mlp()
    arrays = {name: array.copy() for name, array in constants_of(model).items()}
    if how == "input":
        arrays["w2"][0] *= 1000
        arrays["b2"][0] *= 1000
        arrays["w3"][:, 0] /= 1000
    else:
        arrays["b2"][0] = -1000
        arrays["w3"][:, 0] = 1000
    return replaced(model, **arrays)


def fit_last_layer(model: onnx.ModelProto, rows: Array, labels: Array) -> onnx.ModelProto:
    """A copy whose last Gemm tells the labelled rows apart, with the margins of a trained net."""
    last = model.graph.node[-1]
    (inner,) = run_graph(model, rows, [last.input[0]])
    num_classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    wanted = 8.0 * np.eye(num_classes)[labels.astype(int)]
    with_one = np.concatenate([inner, np.ones((len(inner), 1))], axis=1).astype(np.float64)
    ridge = 1e-3 * np.eye(with_one.shape[1]) * len(rows)
    solved = np.linalg.solve(with_one.T @ with_one + ridge, with_one.T @ wanted)
    return replaced(model, **{last.input[1]: solved[:-1].T, last.input[2]: solved[-1]})
