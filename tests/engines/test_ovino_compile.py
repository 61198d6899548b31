"""Which kernels a compiled graph runs: they are raced, and give the same answers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import ovino_compile
from engines.devices import this_cpu
from engines.ovino import settings, the_core
from engines.ovino_compile import compile_graph, time_share
from tests.engines.small_stores import linear_graph

WIDTH = 16


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A 1 x 1 and a depthwise convolution in float."""
    rng = np.random.default_rng(0)
    shapes = {"narrow": (WIDTH, 3, 1, 1), "depthwise": (WIDTH, 1, 3, 3)}
    weights = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["rows", "narrow"], ["wide"]),
        helper.make_node("Conv", ["wide", "depthwise"], ["answer"], group=WIDTH),
    ]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2, 3, 12, 12])
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "convolutions", [rows], [answer], weights),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def both(graph: Path) -> tuple[bytes, bytes]:
    """The graph with older kernels, and with newer ones."""
    raced: list[tuple[bytes, bytes]] = []

    def race(older: bytes, newer: bytes) -> float:
        raced.append((older, newer))
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ovino_compile, "time_share", race)
        compile_graph(graph)
    return raced[0]


def opened(blob: bytes) -> Any:
    return the_core().import_model(blob, "CPU", settings(1))


def kernels(blob: bytes) -> set[str]:
    """Of the convolutions, as OpenVINO names them."""
    found = set()
    for layer in opened(blob).get_runtime_model().get_ops():
        facts = layer.get_rt_info()
        if facts["layerType"].astype(str) == "Convolution":
            found.add(facts["primitiveType"].astype(str))
    return found


def answer(blob: bytes) -> Any:
    request = opened(blob).create_infer_request()
    tensor = request.get_input_tensor().data
    tensor[:] = np.random.default_rng(1).normal(size=tensor.shape)
    request.infer()
    return np.array(request.get_output_tensor().data)


def test_older_kernels_give_the_same_answers(both: tuple[bytes, bytes]) -> None:
    older, newer = map(answer, both)
    np.testing.assert_allclose(older, newer, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("avx512f" not in this_cpu(1).instructions, reason="they are for AVX-512")
def test_what_is_compiled_with_older_kernels_runs_them_when_it_is_opened(
    both: tuple[bytes, bytes],
) -> None:
    older, newer = map(kernels, both)
    assert all(name.startswith("jit_") for name in older)
    assert older.isdisjoint(newer)


@pytest.mark.parametrize(("share", "runs_older"), [(0.5, True), (0.96, True), (0.98, False)])
def test_older_kernels_are_taken_where_they_are_clearly_faster(
    graph: Path, monkeypatch: pytest.MonkeyPatch, share: float, runs_older: bool
) -> None:
    raced: list[bytes] = []

    def race(*blobs: bytes) -> float:
        raced.extend(blobs)
        return share

    monkeypatch.setattr(ovino_compile, "time_share", race)
    chosen = compile_graph(graph)
    older, newer = raced
    assert older != newer
    assert chosen == (older if runs_older else newer)


def test_a_graph_without_convolutions_is_not_raced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ovino_compile, "time_share")
    path = tmp_path / "linear.onnx"
    path.write_bytes(linear_graph())
    assert compile_graph(path)


def test_a_race_is_one_of_pairs(both: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow moment costs a pair, and not the race."""
    seconds = itertools.cycle([1.0, 2.0, 9.0, 2.0, 1.0, 2.0])
    monkeypatch.setattr(ovino_compile, "_cpu_s", lambda _: next(seconds))
    assert time_share(*both) == 0.5
