"""The graphs for TensorRT: parsed and compiled by TensorRT-RTX, and as accurate as the gate asks.

What a GPU computes with them is checked in tests/gpu. Here ONNX Runtime evaluates the very graph
that the parser accepts, node by node, which is exactly fake quantisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from engines.candidates import CandidateFactory
from engines.errors import BuildError
from engines.gate import Answers, GateSpec
from engines.graph import wrap
from engines.ladder import HeldOut
from engines.model import ImageInput, ModelSpec
from engines.runner import Array
from engines.tensorrt_build import BuilderSettings, BuiltPlan, Toolkit, build_plan, rtx_toolkit
from tests.engines.fitted_nets import BATCH, Net, kinds_of, make_net, num_classes_seen

FAST = BuilderSettings(optimization_level=0)
GATES = {
    "int8": GateSpec(),
    "fp16": GateSpec(min_agreement=0.995, min_cosine=0.999, max_divergence=1e-3),
    "fp32": GateSpec(min_agreement=1.0, min_cosine=1 - 1e-12, max_divergence=0.0),
}
SMALL = ["conv", "resnet", "mlp"]


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return rtx_toolkit(("SM89",))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Net]:
    folder = tmp_path_factory.mktemp("nets")
    return {kind: make_net(kind, folder) for kind in SMALL}


def compiled(net: Net, core: onnx.ModelProto, toolkit: Toolkit) -> bytes:
    """What TensorRT-RTX makes ahead of time of a graph, with preprocessing and head."""
    graph = wrap(core, net.spec, BATCH).SerializeToString()
    built = build_plan(graph, FAST, timing_cache=None, say=lambda _: None, toolkit=toolkit)
    return built.plan


@pytest.mark.parametrize("precision", GATES)
@pytest.mark.parametrize("kind", SMALL)
def test_a_small_nets_graphs_are_compiled_and_pass_the_gate(
    nets: dict[str, Net], toolkit: Toolkit, kind: str, precision: str
) -> None:
    net = nets[kind]
    core = net.factory.graph(precision, "tensorrt")
    assert len(compiled(net, core, toolkit)) > 1_000
    found = net.answers(core)
    judged = net.judge(found)
    assert judged.failures(GATES[precision]) == ()
    assert (judged.max_abs_diff > 0) is (precision != "fp32")


@pytest.mark.parametrize("precision", GATES)
def test_only_fp32_is_built_without_tf32(
    nets: dict[str, Net], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def build(_: bytes, settings: BuilderSettings, **__: object) -> BuiltPlan:
        asked.append(settings.tf32)
        return BuiltPlan(plan=b"", timing_cache=b"", inspector=None, build_s=0.0, warnings=())

    monkeypatch.setattr("engines.tensorrt_build.build_plan", build)
    assert nets["mlp"].factory.make("tensorrt", precision, BATCH).precision == precision
    assert asked == [precision != "fp32"]


def test_a_mixed_graph_is_compiled_and_passes_the_gate(
    nets: dict[str, Net], toolkit: Toolkit
) -> None:
    net = nets["resnet"]
    core = net.factory.graph("mixed", "tensorrt", ["stem_node", "a2_node", "deep_node"])
    assert compiled(net, core, toolkit)
    assert net.judge(net.answers(core)).failures(GATES["int8"]) == ()


@pytest.mark.parametrize("kind", SMALL)
def test_the_cpu_graph_is_refused_which_is_why_there_are_two(
    nets: dict[str, Net], toolkit: Toolkit, kind: str
) -> None:
    net = nets[kind]
    with pytest.raises(BuildError, match="Quantise the graph for TensorRT"):
        compiled(net, net.factory.graph("int8", "cpu"), toolkit)


def photographs(num_rows: int) -> Array:
    """Crops of photographs that come with scikit-image, 224 x 224, seeded."""
    from skimage import data
    from skimage.transform import resize

    names = ("astronaut", "coffee", "cat")
    pictures = [_picture(data, name) for name in names]
    rng = np.random.default_rng(0)
    rows = []
    for position in range(num_rows):
        picture = pictures[position % len(pictures)]
        size = int(rng.integers(min(picture.shape[:2]) // 2, min(picture.shape[:2])))
        top, left = (int(rng.integers(0, edge - size + 1)) for edge in picture.shape[:2])
        crop = picture[top : top + size, left : left + size]
        rows.append(resize(crop, (224, 224), preserve_range=True, order=1))
    return np.round(np.stack(rows)).astype(np.uint8)


def _picture(data: Any, name: str) -> Array:
    picture: Array = getattr(data, name)()
    return picture[..., :3]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Net:
    """EfficientNet-Lite0 with its own weights, calibrated with a few photographs."""
    folder = tmp_path_factory.mktemp("demo")
    images = ImageInput(height=224, width=224, mean=(127.0,) * 3, std=(128.0,) * 3)
    spec = ModelSpec(source="engines.demo_models:efficientnet_lite0", input=images, head="classes")
    rows = photographs(72)
    factory = CandidateFactory(spec, rows[:24], "max", folder, lambda _: None)
    return Net(
        spec=spec,
        factory=factory,
        held_out=HeldOut(rows=rows[24:], labels=None),
        folder=folder,
    )


@pytest.fixture(scope="module")
def reference(demo: Net) -> Answers:
    answers = demo.answers(demo.factory.core, is_literal=False)
    assert num_classes_seen(answers) > 5
    return answers


@pytest.mark.scenario
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_demo_models_graphs_are_compiled_and_pass_the_gate(
    demo: Net, reference: Answers, toolkit: Toolkit, precision: str
) -> None:
    core = demo.factory.graph(precision, "tensorrt")
    if precision == "int8":
        assert kinds_of(core).count("Conv") == 49
        assert kinds_of(core).count("QuantizeLinear") > 100
    assert len(compiled(demo, core, toolkit)) > 1_000_000
    assert demo.judge(demo.answers(core), reference).failures(GateSpec()) == ()
