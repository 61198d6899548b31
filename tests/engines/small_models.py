"""Small seeded models, their rows and requests: nothing here needs a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.build import CalibrationSpec, EngineRequest, Sample
from engines.devices import this_cpu
from engines.gate import GateSpec
from engines.model import FeatureInput, ImageInput, ModelSpec
from engines.runner import Array

NUM_FEATURES = 8
TINTS = ((50, 50, 200), (200, 50, 60), (60, 200, 50), (210, 200, 60), (127, 127, 127))
SIDE = 12
IMAGES = ImageInput(height=SIDE, width=SIDE, mean=(127.0, 120.0, 110.0), std=(128.0, 64.0, 32.0))


def write_features_model(path: Path, *, seed: int = 1, batch: int | str = "batch") -> Path:
    """Gemm, Relu, Gemm: float32 [batch, 8] -> y [batch, 1]."""
    rng = np.random.default_rng(seed)
    arrays = {
        "w1": rng.standard_normal((32, NUM_FEATURES)),
        "b1": rng.standard_normal(32),
        "w2": rng.standard_normal((1, 32)),
        "b2": rng.standard_normal(1),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="g1", transB=1),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="g2", transB=1),
    ]
    return _save(path, nodes, arrays, [batch, NUM_FEATURES], [batch, 1])


def write_image_model(path: Path, *, seed: int = 1) -> Path:
    """Conv, Relu, pool, Gemm: float32 [batch, 3, 12, 12] -> logits [batch, 5]."""
    rng = np.random.default_rng(seed)
    arrays = {
        "w1": rng.standard_normal((16, 3, 3, 3)) * 0.3,
        "b1": rng.standard_normal(16) * 0.1,
        "w2": rng.standard_normal((5, 16)) * 4,
        "b2": rng.standard_normal(5) * 0.1,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten", axis=1),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], name="fc", transB=1),
    ]
    return _save(path, nodes, arrays, ["batch", 3, SIDE, SIDE], ["batch", 5])


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    arrays: dict[str, Array],
    shape_in: list[int | str],
    shape_out: list[int | str],
) -> Path:
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def features_spec(path: Path) -> ModelSpec:
    return ModelSpec(source=str(path), input=FeatureInput(num_features=NUM_FEATURES), head="scores")


def images_spec(path: Path, top_k: int = 2) -> ModelSpec:
    return ModelSpec(source=str(path), input=IMAGES, head="classes", top_k=top_k)


def request_for(spec: ModelSpec, *, min_agreement: float = 0.9) -> EngineRequest:
    return EngineRequest(
        model=spec,
        calibration=CalibrationSpec(num_rows=32),
        gate=GateSpec(num_rows=64, min_agreement=min_agreement),
        device=this_cpu(2),
        batch_size=4,
    )


def feature_rows(num_rows: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_rows, NUM_FEATURES), dtype=np.float32)


def image_rows(num_rows: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    tint = rng.integers(0, 256, (num_rows, 1, 1, 3))  # rows of one noise would all look alike
    noise = rng.integers(-40, 40, (num_rows, SIDE, SIDE, 3))
    pixels: Array = np.clip(tint + noise, 0, 255).astype(np.uint8)
    return pixels


def feature_sample(num_rows: int, seed: int) -> Sample:
    return Sample(rows=feature_rows(num_rows, seed))


def image_sample(num_rows: int, seed: int) -> Sample:
    return Sample(rows=image_rows(num_rows, seed))


def labelled_pictures(num_rows: int, seed: int) -> Sample:
    """Noise over one of five tints, which is the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(TINTS), num_rows)
    noise = rng.integers(-40, 40, (num_rows, SIDE, SIDE, 3))
    pixels = np.clip(np.array(TINTS)[labels, None, None] + noise, 0, 255).astype(np.uint8)
    return Sample(rows=pixels, labels=labels.astype(np.float64))


def planes(num_rows: int, seed: int = 0) -> Array:
    """Labelled pictures as nets take them: float32 [rows, 3, 12, 12]."""
    pixels = labelled_pictures(num_rows, seed=seed).rows.astype(np.float32)
    return np.ascontiguousarray(((pixels - 127) / 64).transpose(0, 3, 1, 2))
