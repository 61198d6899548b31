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
