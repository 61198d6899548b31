"""Rounded weights: on the quantiser's levels, and better for the layer than the nearest ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from engines import layer_inputs, round_weights
from engines.calibrate import calibrate
from engines.devices import WeightBits
from engines.export import name_nodes
from engines.layer_inputs import Floats, layers_of
from engines.quantize import quantize
from engines.round_weights import (
    LARGEST_WEIGHT,
    Rounding,
    _rounded,
    _shrunk,
    nearest,
    round_layers,
    with_rounding,
)
from engines.runner import Array
from tests.engines.small_graphs import (
    constants_of,
    conv_net,
    gemm,
    linear,
    linear_weights,
    make_model,
    mlp,
    replaced,
    run_graph,
    unlike_layers,
)
from tests.engines.small_models import planes

BITS: list[WeightBits] = [7, 8]
LAYERS = ["c1", "c2", "c3", "y"]


def alike(num_rows: int, num_inputs: int = 8, seed: int = 0) -> Array:
    """Rows whose columns move together, as those of real tables and layers do."""
    mixing = np.random.default_rng(99).standard_normal((3, num_inputs))
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, 3)) @ mixing
    return (rows + 0.1 * rng.standard_normal((num_rows, num_inputs)) + 1).astype(np.float32)


def rounding_of(core: onnx.ModelProto, rows: Array, bits: WeightBits = 8) -> Rounding:
    name_nodes(core)
    return round_layers(core, lambda: [{"x": rows}], bits)


def nearest_net(core: onnx.ModelProto, bits: WeightBits) -> onnx.ModelProto:
    """The graph with each weight on its nearest level."""
    weights = {name: array for name, array in constants_of(core).items() if array.ndim > 1}
    return replaced(core, **{n: nearest(w.astype(np.float64), 0, bits) for n, w in weights.items()})


def biases(model: onnx.ModelProto) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in constants_of(model).items() if array.ndim == 1}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["conv", "mlp", "unlike"])
def test_weights_lie_on_the_very_levels_that_the_quantiser_chooses(
    kind: str, bits: WeightBits
) -> None:
    rows = planes(40) if kind == "conv" else alike(40)
    core = {"conv": conv_net, "mlp": mlp, "unlike": unlike_layers}[kind]()
    core = onnx.shape_inference.infer_shapes(core)
    rounding = rounding_of(core, rows, bits)
    assert len(rounding) == len(layers_of(core))
    table = calibrate(core, lambda: [{"x": rows}], "max")
    arrays = constants_of(quantize(core, rounding, table, "cpu", (), bits))
    weights = {node.name: node.input[1] for node in core.graph.node if node.name in rounding}
    for layer, name in weights.items():
        levels, scale = arrays[f"{name}_quantized"], arrays[f"{name}_scale"]
        axis = levels.shape.index(len(scale))
        wide = scale.reshape([-1 if i == axis else 1 for i in range(levels.ndim)])
        np.testing.assert_allclose(levels * wide, rounding[layer].weight, rtol=1e-5, atol=1e-7)
        assert np.abs(levels.astype(int)).max() == LARGEST_WEIGHT[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_a_net_is_nearer_to_fp32_than_with_the_nearest_levels_on_rows_it_has_not_seen(
    kind: str, bits: WeightBits
) -> None:
    core = conv_net() if kind == "conv" else mlp()
    make = planes if kind == "conv" else alike
    rows, others = make(256), make(256, seed=1)
    nets = (nearest_net(core, bits), with_rounding(core, rounding_of(core, rows, bits)))
    (expected,) = run_graph(core, others)
    before, after = (float(np.var(run_graph(net, others)[0] - expected)) for net in nets)
    assert after < 0.5 * before


@pytest.mark.parametrize("bits", BITS)
def test_the_mean_error_of_each_layer_is_taken_back(bits: WeightBits) -> None:
    core, rows = conv_net(), planes(256)
    expected = run_graph(core, rows, LAYERS)
    nets = (nearest_net(core, bits), with_rounding(core, rounding_of(core, rows, bits)))

    def errors(net: onnx.ModelProto) -> list[float]:
        axes = [(0, 2, 3), (0, 2, 3), (0, 2, 3), (0,)]
        pairs = zip(run_graph(net, rows, LAYERS), expected, axes, strict=True)
        return [float(np.abs((a - b).mean(axis=axis)).mean()) for a, b, axis in pairs]

    for before, after in zip(*map(errors, nets), strict=True):
        assert after < 0.5 * before


def moments_like(num_inputs: int, groups: int = 1) -> Floats:
    rows = [alike(200, num_inputs, seed).astype(np.float64) for seed in range(groups)]
    return np.stack([each.T @ each / 200 + 0.01 * np.eye(num_inputs) for each in rows])


def solved_one_by_one(weight: Floats, products: Floats, bits: WeightBits) -> Floats:
    """Round an input, solve for all that are left, and so on: what `_rounded` does faster."""
    scale = np.abs(weight).max() / LARGEST_WEIGHT[bits]
    left = weight.copy()
    for i in range(len(weight)):
        level = np.clip(np.round(left[i] / scale), -LARGEST_WEIGHT[bits], LARGEST_WEIGHT[bits])
        is_largest = abs(weight[i]) == np.abs(weight).max()
        left[i] = np.round(weight[i] / scale) * scale if is_largest else level * scale
        done, rest = slice(0, i + 1), slice(i + 1, None)
        error = products[rest, done] @ (left[done] - weight[done])
        left[rest] = weight[rest] - np.linalg.solve(products[rest, rest], error)
    return left


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("bits", BITS)
def test_each_rounding_is_made_up_for_by_the_best_of_all_that_is_left(
    block: int, bits: WeightBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_weights, "BLOCK", block)
    weight = np.random.default_rng(3).standard_normal((2, 3, 10))
    products = moments_like(10, groups=2)
    found = _rounded(weight, products, bits)
    expected = [
        [solved_one_by_one(output, moment, bits) for output in group]
        for group, moment in zip(weight, products, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert not np.allclose(found[0], nearest(weight[0], 0, bits))


def test_inputs_that_have_nothing_to_do_with_each_other_have_the_nearest_levels() -> None:
    weight = np.random.default_rng(3).standard_normal((1, 5, 20))
    found = _rounded(weight, np.diag(np.arange(1.0, 21))[None], 8)
    np.testing.assert_allclose(found[0], nearest(weight[0], 0, 8))


@pytest.mark.parametrize("num_rows", [1, 2, 8, 32])
def test_with_few_rows_a_layer_is_no_worse_than_with_the_nearest_levels(num_rows: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((1, 64, 64))
    others = alike(2000, 64, seed=5)
    rows = alike(num_rows, 64).astype(np.float64)
    products = _shrunk((rows.T @ rows / num_rows)[None], num_rows)
    found = _rounded(weight, products, 7)
    weights = (nearest(weight[0], 0, 7), found[0])
    before, after = (np.square((each - weight[0]) @ others.T).mean() for each in weights)
    assert after <= before


@pytest.mark.parametrize("num_rows", [2, 12, 400])
def test_shrinkage_is_scikit_learns(num_rows: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    rows = alike(num_rows, 6).astype(np.float64)
    expected, _ = covariance.oas(rows, assume_centered=True)
    np.testing.assert_allclose(_shrunk((rows.T @ rows / num_rows)[None], num_rows)[0], expected)


@pytest.mark.parametrize("constant", [0.1, 3.3, 2024, 1e8])
def test_channels_that_never_change_can_be_rounded_for(constant: float) -> None:
    """A batch norm that switched some channels off leaves constants to the next layer."""
    rng = np.random.default_rng(0)
    planes = rng.standard_normal((16, 8, 6, 6)).astype(np.float32)
    planes[:, ::2] = np.float32(constant) * np.arange(1, 5)[:, None, None]
    weights = {"w": rng.standard_normal((8, 1, 3, 3)), "b": np.zeros(8)}
    weights |= {"w2": rng.standard_normal((8, 8, 1, 1)), "b2": np.zeros(8)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["d"], group=8),
        helper.make_node("Conv", ["x", "w2", "b2"], ["p"]),
        helper.make_node("Concat", ["d", "c"], ["y"], axis=1),
    ]
    nodes.insert(2, helper.make_node("MaxPool", ["p"], ["c"], kernel_shape=[3, 3]))
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    core = make_model(nodes, arrays, ["batch", 16, 4, 4], shape_in=("batch", 8, 6, 6))
    for some in (planes, np.full_like(planes, constant)):
        for rounded in rounding_of(core, some).values():
            assert rounded.weight is not None
            assert np.isfinite(rounded.weight).all()


@pytest.mark.parametrize("how", ["shared", "large"])
def test_weights_that_are_not_rounded_together_still_have_their_mean_error_taken_back(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_inputs, "MOST_INPUTS", 7 if how == "large" else 8)
    shared = helper.make_node("Gemm", ["x", "w"], ["q"], transB=1)
    nodes = [gemm(target="p"), shared, helper.make_node("Add", ["p", "q"], ["y"])]
    core = make_model(nodes if how == "shared" else [gemm()], linear_weights(), ["batch", 4])
    rows = alike(64)
    rounding = rounding_of(core, rows, 7)
    changed = with_rounding(core, rounding)
    weight = constants_of(core)["w"]
    np.testing.assert_array_equal(constants_of(changed)["w"], weight)
    error = nearest(weight.astype(np.float64), 0, 7) - weight
    shift = constants_of(core)["b"] - constants_of(changed)["b"]
    np.testing.assert_allclose(shift, error @ rows.mean(axis=0), atol=1e-5)


def test_inputs_and_weights_that_are_always_zero_stay_finite() -> None:
    core = linear()
    weight = constants_of(core)["w"].copy()
    weight[1] = 0
    rows = alike(16)
    rows[:, 3] = 0
    for some in (rows, np.zeros_like(rows)):
        (rounded,) = rounding_of(replaced(core, w=weight), some).values()
        assert rounded.weight is not None
        assert rounded.bias is not None
        assert np.isfinite(rounded.weight).all()
        assert np.isfinite(rounded.bias).all()
        assert not rounded.weight[1].any()


@pytest.mark.parametrize("num_rows", [1, 16, 4096])
def test_inputs_of_any_size_beside_each_other_can_be_rounded_for(num_rows: int) -> None:
    rows = alike(num_rows)
    rows[:, :4] *= np.array([1e-20, 1e-4, 1e6, 1e15], np.float32)
    rows[:, 4] = rows[:, 5] + 1.6e9
    (rounded,) = rounding_of(linear(), rows).values()
    assert rounded.weight is not None
    assert rounded.bias is not None
    weight = constants_of(linear())["w"]
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(rounded.weight - weight) <= 2 * step).all()
    assert np.isfinite(rounded.bias).all()


@pytest.mark.parametrize("case", ["no bias", "shared"])
def test_a_bias_that_cannot_hold_a_correction_is_left_alone(case: str) -> None:
    weights = linear_weights()
    nodes = {
        "no bias": [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "shared": [
            gemm(target="p"),
            helper.make_node("Gemm", ["x", "w2", "b"], ["q"], transB=1),
            helper.make_node("Add", ["p", "q"], ["y"]),
        ],
    }[case]
    core = make_model(nodes, {**weights, "w2": weights["w"] + 1}, ["batch", 4])
    rounding = rounding_of(core, alike(16))
    assert rounding
    assert [rounded.bias for rounded in rounding.values()] == [None] * len(rounding)
    assert biases(with_rounding(core, rounding)) == biases(core)


def test_the_original_is_left_alone() -> None:
    core = conv_net()
    name_nodes(core)
    before = core.SerializeToString()
    changed = with_rounding(core, rounding_of(core, planes(8)))
    assert core.SerializeToString() == before
    assert [t.name for t in changed.graph.initializer] == [t.name for t in core.graph.initializer]


def test_a_layer_that_stays_in_float_keeps_its_own_weights_and_bias() -> None:
    core = conv_net()
    rounding = rounding_of(core, planes(16))
    assert set(rounding) == set(LAYERS)
    found = constants_of(with_rounding(core, rounding, float_layers=["c2"]))
    own, all_changed = constants_of(core), constants_of(with_rounding(core, rounding))
    for name, array in found.items():
        is_float = name in ("w2", "b2")
        np.testing.assert_array_equal(array, (own if is_float else all_changed)[name])
        assert not np.array_equal(own[name], all_changed[name])


def test_the_same_rows_give_the_same_weights() -> None:
    first, second = (rounding_of(conv_net(), planes(16)) for _ in range(2))
    for name, rounded in first.items():
        np.testing.assert_array_equal(rounded.weight, second[name].weight)
        np.testing.assert_array_equal(rounded.bias, second[name].bias)
