"""Sensitivity: the layer that int8 destroys is found, and as few as possible stay in float."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from engines.calibrate import Feeds, ScaleTable, calibrate
from engines.export import name_nodes
from engines.quantize import quantizable_layers, quantize
from engines.round_weights import Rounding, round_layers
from engines.runner import Array
from engines.sensitivity import SWITCHES, fewest_float_layers, rank_layers, with_switches
from tests.engines.small_graphs import (
    constants_of,
    conv_net,
    hard_to_round,
    linear_weights,
    make_model,
    mlp,
    replaced,
    run_graph,
    unlike_layers,
)
from tests.engines.small_models import feature_rows, planes


class Case:
    """A float graph with its calibration."""

    def __init__(self, core: onnx.ModelProto, rows: Array) -> None:
        self.core = onnx.shape_inference.infer_shapes(core)
        name_nodes(self.core)
        self.rows = rows
        self.feeds: Feeds = lambda: iter([{"x": rows[:20]}, {"x": rows[20:]}])
        self.rounding: Rounding = round_layers(self.core, self.feeds)
        self.table: ScaleTable = calibrate(self.core, self.feeds, "max")

    def switched(self, *on: str) -> Array:
        """The output with the layers `on` in int8, and the rest in float."""
        model, layers = with_switches(self.core, self.rounding, self.table)
        switches = np.array([layer in on for layer in layers], np.float32)
        (found,) = literally(model).run(["y"], {"x": self.rows, SWITCHES: switches})
        return np.asarray(found)

    def ranked(self) -> list[str]:
        ranking = rank_layers(self.core, self.rounding, self.table, self.feeds)
        errors = [error for _, error in ranking]
        assert errors == sorted(errors, reverse=True)
        return [name for name, _ in ranking]


def literally(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.fixture(params=["mlp", "conv", "unlike"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "conv":
        return Case(conv_net(), planes(40, seed=3))
    net = mlp() if request.param == "mlp" else unlike_layers()
    return Case(net, feature_rows(40, seed=1))


def test_with_all_switches_off_the_graph_is_the_float_graph_to_the_last_bit(case: Case) -> None:
    before = case.core.SerializeToString()
    (expected,) = literally(case.core).run(["y"], {"x": case.rows})
    np.testing.assert_array_equal(case.switched(), expected)
    assert case.core.SerializeToString() == before


def test_a_switch_makes_of_its_layer_what_the_quantiser_makes_of_it(case: Case) -> None:
    """With all others in float; the switches know the layers in the graph's order."""
    layers = quantizable_layers(case.core)
    assert with_switches(case.core, case.rounding, case.table)[1] == layers
    for layer in layers:
        others = [name for name in layers if name != layer]
        int8 = quantize(case.core, case.rounding, case.table, "tensorrt", others)
        for node in list(int8.graph.node):  # the switches round layers only
            if node.op_type == "GlobalAveragePool":
                node.input[0] = "c3"
        (expected,) = literally(int8).run(["y"], {"x": case.rows})
        found = case.switched(layer)
        assert np.abs(found - case.switched()).max() > 1e-4 * np.abs(found).max()
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_a_switched_layer_is_what_numpy_rounds_by_hand() -> None:
    case = Case(mlp((8, 16, 4)), feature_rows(40, seed=1))
    arrays = constants_of(case.core)
    hidden = np.maximum(case.rows @ arrays["w1"].T + arrays["b1"], 0)
    scale = hidden.max() / np.float32(127)
    rounded_input = np.clip(np.round(hidden / scale), -128, 127) * scale
    rounded = case.rounding["g2"]
    assert rounded.weight is not None
    assert rounded.bias is not None
    expected = rounded_input @ rounded.weight.T + rounded.bias
    assert not np.array_equal(rounded.weight, arrays["w2"])
    assert not np.array_equal(rounded.bias, arrays["b2"])
    np.testing.assert_allclose(case.switched("g2"), expected, atol=1e-4)


@pytest.mark.parametrize("how", ["input", "weights"])
def test_the_layer_that_was_made_hard_to_round_is_the_worst(how: str) -> None:
    rows = feature_rows(40, seed=1)
    if how == "input":  # in float it is the same net
        answers = [run_graph(net, rows)[0] for net in (mlp(), hard_to_round(how))]
        np.testing.assert_allclose(*answers, atol=1e-4)
    assert Case(mlp(), rows).ranked()[0] != "g3", "it is not the worst anyway"
    assert Case(hard_to_round(how), rows).ranked()[0] == "g3"


def test_a_convolution_that_reads_one_channel_far_larger_is_the_worst() -> None:
    net = conv_net()
    arrays = {name: array.copy() for name, array in constants_of(net).items()}
    arrays["w1"][0] *= 3000
    arrays["b1"][0] *= 3000
    arrays["w2"][0] /= 3000  # it is depthwise
    assert Case(replaced(net, **arrays), planes(40, seed=3)).ranked()[0] == "c2"
    assert Case(net, planes(40, seed=3)).ranked()[0] != "c2", "it is not the worst anyway"


@pytest.mark.parametrize("num_layers", range(1, 41))
def test_the_fewest_layers_that_pass_are_found_in_few_trials(num_layers: int) -> None:
    """For every number that may be needed, the first that pass are found, or that half do not."""
    ranked = [f"layer{position}" for position in range(num_layers)]
    for needed in range(1, num_layers + 2):
        tried: list[int] = []

        def passes(layers: Sequence[str], needed: int = needed) -> bool:
            assert list(layers) == ranked[: len(layers)]
            tried.append(len(layers))  # noqa: B023  # called in this round only
            return len(layers) >= needed

        found = fewest_float_layers(ranked, passes)
        expected = tuple(ranked[:needed]) if needed <= num_layers // 2 else None
        assert found == expected
        assert len(tried) == len(set(tried)), "a gate takes seconds"
        assert len(tried) <= 2 * math.ceil(math.log2(num_layers + 1)) + 1
        assert max(tried, default=0) <= num_layers // 2


def test_a_model_without_layers_has_none_to_keep_in_float() -> None:
    assert fewest_float_layers([], lambda _: True) is None


def test_layers_whose_weights_are_no_constants_have_no_switch() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["p"], name="product"),
        helper.make_node("ReduceSum", ["p"], ["s"], keepdims=1),
        helper.make_node("Add", ["x", "s"], ["z"]),
        helper.make_node("Gemm", ["z", "w", "b"], ["y"], name="layer", transB=1),
    ]
    case = Case(make_model(nodes, linear_weights(), ["batch", 4]), feature_rows(40, seed=1))
    assert case.ranked() == ["layer"]
