"""The builder for TensorRT, driving TensorRT-RTX: its parser and compiler work without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.cuda import device_problem
from engines.errors import BuildError, EngineError, OutOfDeviceMemoryError
from engines.tensorrt_build import (
    BuilderSettings,
    BuiltPlan,
    Log,
    Toolkit,
    build_plan,
    rtx_toolkit,
    tensorrt_toolkit,
    unavailable,
)
from tests.engines.residual_graphs import BATCH, FOR_TENSORRT, quantised, residual_net
from tests.engines.small_graphs import make_model


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return rtx_toolkit(("SM80", "SM89"))


@pytest.fixture(scope="module")
def float_graph() -> bytes:
    return residual_net().SerializeToString()


def build(
    toolkit: Toolkit,
    graph: bytes,
    *,
    say: Callable[[str], None] = lambda _: None,
    timing_cache: bytes | None = None,
    settings: BuilderSettings | None = None,
) -> BuiltPlan:
    return build_plan(
        graph,
        settings or BuilderSettings(),
        timing_cache=timing_cache,
        say=say,
        toolkit=toolkit,
    )


def test_a_residual_net_quantised_for_tensorrt_is_parsed_and_built(
    toolkit: Toolkit, tmp_path: Path
) -> None:
    graph = quantised(tmp_path, FOR_TENSORRT)
    kinds = [node.op_type for node in onnx.load_from_string(graph).graph.node]
    assert kinds.count("DequantizeLinear") >= 10
    built = build(toolkit, graph)
    assert len(built.plan) > 10_000
    assert built.build_s > 0
    assert built.inspector is None  # nobody can ask a plan without a GPU
    assert not any("timing cache:" in warning for warning in built.warnings)


def test_the_quantisers_default_graph_is_refused_in_the_parsers_own_words(
    toolkit: Toolkit, tmp_path: Path
) -> None:
    graph = quantised(tmp_path, None)
    expected = r"tensorrt_rtx parser: .*has type Int32 but must have type.*Quantise the graph for"
    with pytest.raises(BuildError, match=expected) as caught:
        build(toolkit, graph)
    assert "\n" not in str(caught.value)


def test_asymmetric_activations_are_refused(toolkit: Toolkit, tmp_path: Path) -> None:
    options = FOR_TENSORRT | {"ActivationSymmetric": False}
    with pytest.raises(BuildError, match="zero point"):
        build(toolkit, quantised(tmp_path, options))


def test_a_float16_graph_is_built_as_it_is_typed(toolkit: Toolkit) -> None:
    weights = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float16)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="y")
    half = (TensorProto.FLOAT16, TensorProto.FLOAT16)
    model = make_model([node], {"w": weights.T}, [BATCH, 16], shape_in=(BATCH, 8), kinds=half)
    assert build(toolkit, model.SerializeToString()).plan


def test_bytes_that_are_no_model_are_refused(toolkit: Toolkit) -> None:
    with pytest.raises(BuildError, match="Failed to parse the ONNX model"):
        build(toolkit, b"not onnx")


def test_a_free_batch_is_refused_before_building(toolkit: Toolkit) -> None:
    graph = residual_net("batch").SerializeToString()
    with pytest.raises(BuildError, match=r"input x: shape \(-1, 3, 16, 16\); expected fixed"):
        build(toolkit, graph)


def test_what_the_compiler_gives_up_is_told_in_its_words(float_graph: bytes) -> None:
    with pytest.raises(BuildError, match=r"no plan \(.*Turing") as caught:
        build(rtx_toolkit(("SM75",)), float_graph)
    assert "\n" not in str(caught.value)


def test_a_target_that_is_not_known_is_refused(float_graph: bytes) -> None:
    with pytest.raises(BuildError, match="target SM90: not known"):
        build(rtx_toolkit(("SM90",)), float_graph)


def test_a_timing_cache_that_cannot_be_read_is_a_warning(
    toolkit: Toolkit, float_graph: bytes
) -> None:
    built = build(toolkit, float_graph, timing_cache=b"not a timing cache" * 20)
    (warning,) = [text for text in built.warnings if text.startswith("timing cache:")]
    assert "360 bytes are left out and a new one is begun" in warning
    assert built.plan
    fresh = build(toolkit, float_graph)
    assert not any("timing cache:" in text for text in fresh.warnings)
    assert fresh.timing_cache == built.timing_cache != b""


class Refusing:
    """A builder's configuration that takes no cache but an empty one."""

    def __init__(self, made: object | None) -> None:
        self._made = made
        self.kept: list[bytes] = []

    def create_timing_cache(self, data: bytes) -> object | None:
        self.kept.append(data)
        return self._made if data else "empty"

    def set_timing_cache(self, cache: object, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache == "empty"


@pytest.mark.parametrize("made", [None, "of another device"], ids=["unreadable", "mismatch"])
def test_a_timing_cache_of_another_device_is_a_warning(
    toolkit: Toolkit, made: object | None
) -> None:
    from engines.tensorrt_build import _attach_timing_cache

    config = Refusing(made)
    toolkit.log.clear()
    (warning,) = _attach_timing_cache(toolkit, config, b"old")
    assert "made on another device" in warning
    assert config.kept == [b"old", b""]


def test_progress_is_told(
    toolkit: Toolkit, float_graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    build(toolkit, float_graph, say=lines.append)
    assert lines == []  # it takes a fraction of a second
    monkeypatch.setattr("engines.tensorrt_build.PROGRESS_EVERY_S", 0.0)
    build(toolkit, float_graph, say=lines.append)
    assert len(lines) > 20
    assert all(line.startswith("tensorrt_rtx: ") for line in lines)
    assert any("Building engine, 1 of 6, after 0 s" in line for line in lines)


@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError])
def test_an_interruption_while_building_stops_it(
    toolkit: Toolkit,
    float_graph: bytes,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_told = 0

    def say(_: str) -> None:
        nonlocal num_told
        num_told += 1
        raise error

    monkeypatch.setattr("engines.tensorrt_build.PROGRESS_EVERY_S", 0.0)
    with pytest.raises(error):
        build(toolkit, float_graph, say=say)
    assert num_told <= 5  # TensorRT asks a few times more before it ends
    monkeypatch.undo()
    assert build(toolkit, float_graph).plan


def test_every_setting_reaches_the_builder(toolkit: Toolkit) -> None:
    from engines.tensorrt_build import _configure

    trt = toolkit.trt
    settings = BuilderSettings(optimization_level=1, workspace_bytes=1 << 24, tf32=False)
    builder = trt.Builder(toolkit.log.logger)
    config = _configure(toolkit, builder, settings)
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 24
    assert not config.get_flag(trt.BuilderFlag.TF32)
    usual = _configure(toolkit, builder, BuilderSettings())
    assert usual.get_flag(trt.BuilderFlag.TF32)
    assert usual.max_aux_streams == 0
    assert usual.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert usual.num_compute_capabilities == 2


def test_one_logger_serves_a_process() -> None:
    assert rtx_toolkit().log is rtx_toolkit(("SM120",)).log


@pytest.mark.parametrize(
    "message",
    [
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)",
        "Requested amount of GPU memory (1024 bytes) could not be allocated.",
        "Skipping tactic 0 due to insufficient memory on requested size of 99 detected for ...",
    ],
)
def test_messages_of_memory_that_ran_out_have_an_error_of_their_own(
    toolkit: Toolkit, message: str
) -> None:
    log, severities = Log(toolkit.trt), toolkit.trt.ILogger.Severity
    log.logger.log(severities.ERROR, "Internal Error: could not find any implementation for node")
    assert log.failure("build") is None
    log.logger.log(severities.WARNING, message)
    error = log.failure("build")
    assert isinstance(error, OutOfDeviceMemoryError)
    assert message in str(error)
    log.logger.log(severities.INFO, "kept from the log")
    log.clear()
    assert log.failure("build") is None
    assert log.last_error() == "no message"


def test_a_kernel_that_was_passed_over_for_memory_does_not_explain_another_error(
    toolkit: Toolkit,
) -> None:
    log, severities = Log(toolkit.trt), toolkit.trt.ILogger.Severity
    log.logger.log(severities.WARNING, "Tactic: requested memory could not be allocated.")
    assert isinstance(log.failure("build"), OutOfDeviceMemoryError)
    log.logger.log(severities.ERROR, "Error Code 4: API Usage Error (node_of_head: not supported)")
    assert log.failure("build") is None


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="has tensorrt")
def test_without_the_package_tensorrt_is_unavailable_in_one_sentence() -> None:
    problem = unavailable()
    assert problem is not None
    assert problem.startswith(
        "TensorRT: the package tensorrt is not installed; expected version 11"
    )
    with pytest.raises(EngineError, match="not installed"):
        tensorrt_toolkit()


@pytest.mark.skipif(device_problem() is None, reason="has a driver")
def test_the_driver_is_probed_before_the_package_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    problem = unavailable()
    assert problem is not None
    assert "cudaErrorInsufficientDriver" in problem


@pytest.mark.parametrize(("version", "shown"), [("10.9.0.34", "10.9.0.34"), (None, "OSError: no")])
def test_another_major_or_a_broken_package_is_told(
    version: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Module:
        __version__ = version

    def import_module(_: str) -> type[Module]:
        if version is None:
            raise OSError("no libnvinfer.so.11")
        return Module

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("engines.tensorrt_build.device_problem", lambda: None)
    monkeypatch.setattr("importlib.import_module", import_module)
    problem = unavailable()
    assert problem is not None
    assert shown in problem
    assert "expected version 11" in problem
    Module.__version__ = version = "11.4.0.106"
    assert unavailable() is None
