from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.demo_models import NUM_FEATURES, imagenet_classes, ranking_mlp
from engines.errors import ModelError
from engines.export import load_core
from engines.model import FeatureInput, ModelSpec, fingerprint_model, load_torch_model, shown
from tests.engines.small_graphs import features, linear, run_graph, save

CODE = """
import torch
from their_layers import Layer

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()
        self.register_buffer("shift", torch.tensor(0.5), persistent=False)
    def forward(self, x):
        print("scoring")
        return self.layer(x) + self.shift

def net():
    print("loading")
    torch.manual_seed(0)
    return Net()

def stops(): raise SystemExit("no licence")
def fails(): raise RuntimeError("line one\\nline two")
def no_model(): return 7
def broken(): return Broken()
def compiled(): return torch.compile(net())
def compiled_inside(): return torch.nn.Sequential(torch.compile(net()))
def exported():
    any_batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(net(), (torch.zeros(2, 4),), dynamic_shapes=any_batch).module()
def scripted(): return torch.jit.trace(net(), torch.zeros(2, 4))

def depends(): return Depends()

class Depends(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Broken(torch.nn.Module):
    def forward(self, x):
        return self.not_there(x)
"""
SCALED = """
from pathlib import Path
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.tensor(float(Path(__file__).with_name("scale.txt").read_text()))
    def forward(self, x):
        return x * self.scale

def net():
    return Net()
"""
LAYERS = """
import torch

class Layer(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 1)
    def forward(self, x):
        return super().forward(x) * 2
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a model's code in two modules."""
    (tmp_path / "their_model.py").write_text(CODE)
    (tmp_path / "their_layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    return tmp_path


def forget() -> None:
    for name in ("their_model", "their_layers"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def torch_spec(name: str) -> ModelSpec:
    source = FeatureInput(num_features=4)
    return ModelSpec(source=f"their_model:{name}", input=source, head="scores")


def test_the_fingerprint_of_a_torch_model_is_the_same_in_every_process(code: Path) -> None:
    script = (
        "from engines.model import *; print(fingerprint_model(ModelSpec("
        "source='their_model:net', input=FeatureInput(num_features=4), head='scores')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(code)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    # One line also shows that what the model prints does not reach standard output.
    assert done.stdout.split("\n") == [fingerprint_model(torch_spec("net")), ""]
    assert "loading" in done.stderr


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("their_model.py", "manual_seed(0)", "manual_seed(1)"),
        ("their_model.py", "tensor(0.5)", "tensor(0.25)"),
        ("their_layers.py", "* 2", "* 3"),
    ],
    ids=["weights", "a buffer that is not saved", "the code of a layer elsewhere"],
)
def test_the_fingerprint_of_a_torch_model_notices(
    code: Path, file: str, before: str, after: str
) -> None:
    first = fingerprint_model(torch_spec("net"))
    text = (code / file).read_text()
    assert before in text
    (code / file).write_text(text.replace(before, after))
    forget()
    assert fingerprint_model(torch_spec("net")) != first


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("name", ["stops", "fails", "no_model", "not_there"])
def test_a_callable_without_a_model_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ModelError, match=rf"their_model:{name}: .*torch\.nn\.Module") as caught:
        load_torch_model(f"their_model:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("code")
def test_a_torch_model_is_exported_with_any_batch_and_stays_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    core = load_core(torch_spec("net"))
    assert capsys.readouterr().out == ""
    rows = np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)
    import torch

    with torch.no_grad():
        expected = load_torch_model("their_model:net")(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(run_graph(core, rows)[0], expected, atol=1e-5)


@pytest.mark.usefixtures("code")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, for itself
@pytest.mark.parametrize("name", ["compiled", "compiled_inside", "exported"])
def test_a_torch_model_that_is_compiled_or_exported_answers_as_the_plain_one(name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)
    expected, found = (run_graph(load_core(torch_spec(n)), rows)[0] for n in ("net", name))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert fingerprint_model(torch_spec(name)) == fingerprint_model(torch_spec(name))


@pytest.mark.usefixtures("code")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_module_is_told_from_a_plain_one() -> None:
    with pytest.raises(ModelError, match=r"a TorchScript module; expected the torch\.nn\.Module"):
        load_torch_model("their_model:scripted")


@pytest.mark.usefixtures("code")
def test_a_torch_model_that_cannot_be_exported_is_named() -> None:
    with pytest.raises(ModelError, match=r"their_model:broken: .*expected a model that"):
        load_core(torch_spec("broken"))


@pytest.mark.usefixtures("code")
def test_why_a_torch_model_cannot_be_exported_is_said_and_not_only_where() -> None:
    with pytest.raises(ModelError, match=r"onnx\.export: GuardOnDataDependent\w+: Could not guard"):
        load_core(torch_spec("depends"))


def test_an_error_of_others_is_shown_on_one_line_without_colours() -> None:
    error = ValueError("\x1b[96mtorch\n\x1b[0;1mexport\x1b[0m")
    assert shown(error) == "ValueError: torch export"


@pytest.mark.parametrize("name", ["m.onnx.data", "m.onnx_data", "weights.bin"])
def test_weights_beside_the_file_are_part_of_the_fingerprint(tmp_path: Path, name: str) -> None:
    spec = features(tmp_path / "m.onnx")
    onnx.save(
        linear(),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location=name,
        size_threshold=0,
    )
    first = fingerprint_model(spec)
    assert fingerprint_model(spec) == first
    weights = bytearray((tmp_path / name).read_bytes())
    weights[0] ^= 1
    (tmp_path / name).write_bytes(weights)
    assert fingerprint_model(spec) != first
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=rf"{name}: No such file"):
        fingerprint_model(spec)


def test_one_bit_of_a_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    path = save(linear(), tmp_path / "m.onnx")
    first = fingerprint_model(features(path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert fingerprint_model(features(path)) != first


def test_there_are_a_thousand_different_class_names() -> None:
    names = imagenet_classes()
    assert len(names) == 1000
    assert all(name.strip() == name and name for name in names)
    assert names[0] == "tench"


def test_the_ranking_model_is_the_same_every_time() -> None:
    import torch

    torch.manual_seed(1)
    first, drawn = ranking_mlp(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "making it must not draw from the caller's generator"
    rows = torch.linspace(-1, 1, 3 * NUM_FEATURES).reshape(3, NUM_FEATURES)
    with torch.no_grad():
        scores = first(rows)
        assert torch.equal(scores, ranking_mlp()(rows))
    assert scores.shape == (3, 1)


def test_a_constant_that_a_layer_keeps_as_a_plain_attribute_is_part_of_the_fingerprint(
    code: Path,
) -> None:
    (code / "scaled.py").write_text(SCALED)
    spec = ModelSpec(source="scaled:net", input=FeatureInput(num_features=4), head="scores")
    (code / "scale.txt").write_text("1.0")
    first = fingerprint_model(spec)
    assert fingerprint_model(spec) == first
    (code / "scale.txt").write_text("2.0")
    assert fingerprint_model(spec) != first


def test_a_file_with_operators_of_other_domains_only_is_no_crash(tmp_path: Path) -> None:
    node = helper.make_node(
        "LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[1.0] * 8, targets=1
    )
    graph = helper.make_graph(
        [node],
        "trees",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3)])
    model.ir_version = 9
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    spec = ModelSpec(source=str(path), input=FeatureInput(num_features=8), head="scores")
    assert [n.op_type for n in load_core(spec).graph.node] == ["LinearRegressor"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.usefixtures("code")
def test_a_torch_model_of_other_floats_is_exported_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    import their_model  # type: ignore[import-not-found]
    import torch

    made = their_model.net
    monkeypatch.setattr(their_model, "net", lambda: made().to(getattr(torch, dtype)))
    core = load_core(torch_spec("net"))
    rows = np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)
    with torch.no_grad():
        expected = their_model.net().float()(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(run_graph(core, rows)[0], expected, atol=1e-5)


def test_a_graph_that_onnx_runtime_refuses_is_named(tmp_path: Path) -> None:
    three = numpy_helper.from_array(np.ones(3, np.float32), "three")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "three"], ["y"])],
        "mismatch",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [three],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path = save(model, tmp_path / "m.onnx")
    with pytest.raises(
        ModelError, match=r"m\.onnx: .*expected a graph that ONNX Runtime"
    ) as caught:
        load_core(features(path))
    assert "\n" not in str(caught.value)
