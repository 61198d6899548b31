"""Stores on a local disk, and engines that were never built: a store does not care."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.devices import this_cpu
from engines.gate import Accuracy, GateSpec
from engines.keys import digest, digest_bytes, runtime_version
from engines.load import make_runner, probe_answer
from engines.manifest import EngineManifest, Rung
from engines.runner import TensorSpec
from engines.store import EngineStore
from pipeline.local_storage import LocalStorage

INPUT = TensorSpec(name="x", dtype="float32", shape=(4, 8))
OUTPUT = TensorSpec(name="y", dtype="float32", shape=(4, 1))


def local_store(root: Path) -> EngineStore:
    return EngineStore(LocalStorage(str(root)))


def a_manifest(key: str = "key", request: str = "request", **changes: object) -> EngineManifest:
    """A manifest of an engine that passed its gate; both keys are hashed first."""
    accuracy = Accuracy(num_rows=64, agreement=0.99, mean_abs_diff=0.01, max_abs_diff=0.1)
    rungs = (
        Rung(
            runtime="onnxruntime",
            precision="fp32",
            batch_size=4,
            rows_per_s=1000.0,
            accuracy=accuracy,
            passed=True,
            failures=(),
            error=None,
            note=None,
            float_layers=(),
        ),
        Rung(
            runtime="openvino",
            precision="int8",
            batch_size=0,
            rows_per_s=0.0,
            accuracy=None,
            passed=False,
            failures=(),
            error="NotImplementedError: no",
            note=None,
            float_layers=(),
        ),
    )
    manifest = EngineManifest(
        key=digest(key),
        request_key=digest(request),
        model_source="model.onnx",
        model_fingerprint=digest("model"),
        runtime="onnxruntime",
        runtime_version=runtime_version("onnxruntime"),
        precision="fp32",
        batch_size=4,
        input=INPUT,
        outputs=(OUTPUT,),
        artifact="graph.onnx",
        artifact_sha256="",
        artifact_bytes=0,
        attachments={},
        device=this_cpu(2),
        calibration_rows=32,
        calibration_seed=0,
        calibration_sha256=digest_bytes(b"rows"),
        calibration_method="max",
        gate=GateSpec(min_agreement=0.9),
        accuracy=accuracy,
        rungs=rungs,
        reason="the fastest that passes",
        build_s=1.5,
        created_at="2026-11-20T01:02:03+00:00",
        probe=(0.5, -0.5),
    )
    return dataclasses.replace(manifest, **changes)  # type: ignore[arg-type]


def linear_graph(seed: int = 0) -> bytes:
    """y = x w for float32 [4, 8]."""
    weights = np.random.default_rng(seed).standard_normal((8, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, INPUT.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, OUTPUT.shape)],
        [numpy_helper.from_array(weights, "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=9)
    return model.SerializeToString()


def probe_of(graph: bytes, folder: Path) -> tuple[float, ...]:
    """What the graph answers to the probe batch."""
    path = folder / "probe.onnx"
    path.write_bytes(graph)
    with make_runner("onnxruntime", path, INPUT, (OUTPUT,), this_cpu(2)) as runner:
        return probe_answer(runner)
