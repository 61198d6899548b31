"""A small net with a residual Add, in float and as TensorRT does and does not want it in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from engines.runner import Array
from tests.engines.small_graphs import make_model

BATCH = 8
SIZE = 16
FOR_TENSORRT = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": ["Conv", "Add", "GlobalAveragePool", "Gemm"],
}
"""Symmetric, float biases, and no quantised outputs between a convolution and its Relu."""


class Rows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        shape = (BATCH, 3, SIZE, SIZE)
        self._feeds = iter([{"x": rng.standard_normal(shape).astype(np.float32)}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def residual_net(batch: int | str = BATCH) -> onnx.ModelProto:
    """Two convolutions round a skip, a depthwise one, pool and head: float32 in, [batch, 5] out."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 1, 3, 3), "w4": (5, 16)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {f"b{n}": rng.standard_normal(16).astype(np.float32) for n in (1, 2, 3)}
    arrays["b4"] = np.zeros(5, np.float32)
    pads = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="c1", pads=pads),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="c2", pads=pads),
        helper.make_node("Add", ["c2", "r1"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["r2"], name="r2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], name="c3", pads=pads, group=16),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"], name="p"),
        helper.make_node("Flatten", ["p"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], name="y", transB=1),
    ]
    return make_model(nodes, arrays, [batch, 5], shape_in=(batch, 3, SIZE, SIZE))


def quantised(folder: Path, options: dict[str, object] | None) -> bytes:
    """The net with Q/DQ nodes as TensorRT wants them, or as ONNX Runtime does by default."""
    source, target = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(residual_net()), source)
    if options is None:
        quantize_static(source, target, Rows())
    else:
        quantize_static(
            source,
            target,
            Rows(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )
    return target.read_bytes()


def resnet() -> onnx.ModelProto:
    """Stem, an identity block, a block with a projection, a depthwise end with Clip, and a head.

    float32 [batch, 3, 12, 12] -> logits [batch, 5].
    """
    rng = np.random.default_rng(5)
    arrays: dict[str, Array] = {
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
        "w_head": rng.standard_normal((5, 24)).astype(np.float32),
        "b_head": np.zeros(5, np.float32),
    }
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, inputs: list[str], target: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [target], name=f"{target}_node", **attributes))
        return target

    def conv(source: str, target: str, shape: tuple[int, int, int], **attributes: object) -> str:
        num_outputs, num_inputs, size = shape
        weight = rng.standard_normal((num_outputs, num_inputs, size, size))
        weight *= 0.2 + 2 * rng.random((num_outputs, 1, 1, 1))  # scales per channel matter
        weight *= (num_inputs * size * size) ** -0.5
        arrays[f"w_{target}"] = weight.astype(np.float32)
        arrays[f"b_{target}"] = (rng.standard_normal(num_outputs) * 0.1).astype(np.float32)
        inputs = [source, f"w_{target}", f"b_{target}"]
        return node("Conv", inputs, target, pads=[size // 2] * 4, **attributes)

    x = node("Relu", [conv("x", "stem", (16, 3, 3))], "stem_relu")
    x = node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    main = node("Relu", [conv(x, "a1", (16, 16, 3))], "a1_relu")
    x = node("Relu", [node("Add", [conv(main, "a2", (16, 16, 3)), x], "a_sum")], "a_relu")
    main = node("Relu", [conv(x, "b1", (24, 16, 3), strides=[2, 2])], "b1_relu")
    skip = conv(x, "b_skip", (24, 16, 1), strides=[2, 2])
    x = node("Relu", [node("Add", [conv(main, "b2", (24, 24, 3)), skip], "b_sum")], "b_relu")
    x = node("Clip", [conv(x, "deep", (24, 1, 3), group=24), "zero", "six"], "deep_clip")
    x = node("Flatten", [node("GlobalAveragePool", [x], "average")], "flat")
    node("Gemm", [x, "w_head", "b_head"], "y", transB=1)
    return make_model(nodes, arrays, ["batch", 5], shape_in=("batch", 3, 12, 12))
