"""torch programs: the same answers as the ONNX graph, nothing unpickled, a fall-back."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from engines.candidates import CandidateFactory
from engines.devices import this_cpu
from engines.errors import EngineCorruptError, ModelError
from engines.export import load_core
from engines.gate import run_rows
from engines.load import make_runner
from engines.model import FeatureInput, ModelSpec, input_spec
from engines.runner import LOGITS, TensorSpec
from engines.torch_program import TorchPrecision, save_program
from engines.torch_run import TorchMode, TorchRunner
from tests.engines.small_models import IMAGES, NUM_FEATURES, feature_rows, image_rows
from tests.engines.small_torch import PICTURES

BATCH = 4
EAGER = TorchMode(is_compiled=False)


def users_model() -> torch.nn.Module:
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Linear(NUM_FEATURES, 1), torch.nn.Flatten(0))


HERE = "tests.engines.test_torch_run"
USERS = ModelSpec(
    source=f"{HERE}:users_model", input=FeatureInput(num_features=NUM_FEATURES), head="scores"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[TensorSpec, ...]]:
    path = tmp_path_factory.mktemp("torch") / "pictures.pt2"
    return path, save_program(PICTURES, BATCH, path)


def open_program(
    spec: ModelSpec, path: Path, mode: TorchMode, precision: TorchPrecision = "fp32"
) -> TorchRunner:
    outputs = save_program(spec, BATCH, path, precision)
    return TorchRunner(path, input_spec(spec, BATCH), outputs, 2, mode)


def test_pictures_have_the_outputs_of_the_wrapped_graph(tmp_path: Path) -> None:
    rows = image_rows(10, seed=1)
    factory = CandidateFactory(PICTURES, rows, "max", tmp_path, lambda _: None)
    candidate = factory.make("onnxruntime", "fp32", BATCH)
    session = onnxruntime.InferenceSession(candidate.graph)
    names = [output.name for output in candidate.outputs]
    with open_program(PICTURES, tmp_path / "p.pt2", EAGER) as runner:
        found = run_rows(runner, rows)
        first = session.run(names, {"rows": rows[:BATCH]})
        for name, expected in zip(names, first, strict=True):
            assert found[name].dtype == expected.dtype
            np.testing.assert_allclose(found[name][:BATCH], expected, rtol=1e-4, atol=1e-5)
    assert [found[name].shape for name in ("class_id", "probability", "logits")] == [
        (10, 2),
        (10, 2),
        (10, 5),
    ]


def test_a_model_of_one_score_a_row_gives_a_column(tmp_path: Path) -> None:
    rows = feature_rows(6, seed=1)
    with open_program(USERS, tmp_path / "p.pt2", EAGER) as runner, torch.no_grad():
        scores = run_rows(runner, rows)["score"]
        expected = users_model()(torch.from_numpy(rows)).numpy()
    assert runner.outputs == (TensorSpec(name="score", dtype="float32", shape=(BATCH, 1)),)
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-6)


class EndsInSoftmax(torch.nn.Module):
    """Gives labels first, as some do."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear = torch.nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        shares = self.linear(rows).softmax(dim=-1)
        return {"label": shares.argmax(dim=1), "shares": shares}


def sure_model() -> torch.nn.Module:
    return EndsInSoftmax().half()


def one_class_model() -> torch.nn.Module:
    return EndsInSoftmax(num_classes=1)


class GivesHiddenStates(torch.nn.Module):
    """A dict in which the logits are not the first, or a tuple of as many."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.hidden = torch.nn.Linear(NUM_FEATURES, 7)
        self.linear = torch.nn.Linear(7, 3)
        self.as_tuple = as_tuple

    def forward(self, rows: torch.Tensor) -> Any:
        hidden = self.hidden(rows).relu()
        found = {"hidden_states": hidden, "logits": self.linear(hidden)}
        return tuple(found.values()) if self.as_tuple else found


def hidden_first_model() -> torch.nn.Module:
    return GivesHiddenStates()


def hidden_tuple_model() -> torch.nn.Module:
    return GivesHiddenStates(as_tuple=True)


def classes_of(name: str) -> ModelSpec:
    source = FeatureInput(num_features=NUM_FEATURES)
    return ModelSpec(source=f"{HERE}:{name}", input=source, head="classes", top_k=1)


@pytest.mark.parametrize(("name", "width"), [("hidden_first_model", 3), ("hidden_tuple_model", 7)])
def test_of_a_dict_the_logits_are_taken_in_every_graph_and_of_a_tuple_the_first(
    tmp_path: Path, name: str, width: int
) -> None:
    spec = classes_of(name)
    widths = {output.name: output.shape[-1] for output in save_program(spec, 2, tmp_path / "x.pt2")}
    assert widths[LOGITS] == width
    (output,) = load_core(spec).graph.output
    assert output.type.tensor_type.shape.dim[1].dim_value == width


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_model_that_ends_in_softmax_keeps_its_probabilities_in_every_graph(
    tmp_path: Path, precision: TorchPrecision
) -> None:
    spec, rows = classes_of("sure_model"), feature_rows(BATCH, seed=1)
    with torch.no_grad():
        expected = sure_model().float()(torch.from_numpy(rows))["shares"].amax(dim=1, keepdim=True)
    with open_program(spec, tmp_path / "p.pt2", EAGER, precision) as runner:
        found = run_rows(runner, rows)
    np.testing.assert_allclose(found["probability"], expected, atol=2e-3)
    factory = CandidateFactory(spec, rows, "max", tmp_path, lambda _: None)
    candidate = factory.make("onnxruntime", "fp32", BATCH)
    session = onnxruntime.InferenceSession(candidate.graph)
    probability, logits = session.run(["probability", "logits"], {"rows": rows})
    np.testing.assert_allclose(probability, expected, atol=1e-5)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-2)


def test_one_logit_is_refused_for_classes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\(4, 1\); expected .*C >= 2.*`model\.head: scores`"):
        save_program(classes_of("one_class_model"), BATCH, tmp_path / "p.pt2")


def test_all_eager_modes_and_half_precision_agree_with_fp32(tmp_path: Path) -> None:
    rows = image_rows(8, seed=2)
    answers = []
    for precision in ("fp32", "fp16"):
        for last, serial in ((True, False), (False, True)):
            mode = TorchMode(is_compiled=False, is_channels_last=last, is_serial=serial)
            with open_program(PICTURES, tmp_path / "p.pt2", mode, precision) as runner:
                answers.append(run_rows(runner, rows))
    logits = [answer["logits"] for answer in answers]
    assert {array.dtype for array in logits} == {np.dtype(np.float32)}
    for found in logits[1:]:
        np.testing.assert_allclose(found, logits[0], atol=5e-3)
    assert not np.array_equal(logits[0], logits[2])  # it was computed in another precision


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_program_answers_as_the_eager_one(
    program: tuple[Path, tuple[TensorSpec, ...]],
) -> None:
    path, outputs = program
    rows = image_rows(12, seed=5)
    with TorchRunner(path, input_spec(PICTURES, BATCH), outputs, 2, EAGER) as runner:
        eager = run_rows(runner, rows)
    with make_runner("torch", path, input_spec(PICTURES, BATCH), outputs, this_cpu(2)) as runner:
        assert isinstance(runner, TorchRunner)
        assert runner.fallback is None
        compiled = run_rows(runner, rows)
    np.testing.assert_allclose(compiled["logits"], eager["logits"], atol=1e-5)


def test_without_a_compiler_the_program_is_run_eagerly_with_a_warning(
    program: tuple[Path, tuple[TensorSpec, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("g++ not found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    path, outputs = program
    with (
        caplog.at_level(logging.WARNING),
        TorchRunner(path, input_spec(PICTURES, BATCH), outputs, 2, TorchMode()) as runner,
    ):
        assert runner.fallback == "RuntimeError: g++ not found"
        assert len(run_rows(runner, image_rows(5, seed=1))["class_id"]) == 5
    assert "run eagerly" in caplog.text


def test_an_onnx_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    spec = ModelSpec(source="model.onnx", input=IMAGES, head="classes")
    with pytest.raises(ModelError, match=r"model\.onnx: an ONNX file; expected module:callable"):
        save_program(spec, BATCH, tmp_path / "p.pt2")


def test_a_head_that_does_not_fit_is_said(tmp_path: Path) -> None:
    spec = ModelSpec(source=PICTURES.source, input=IMAGES, head="classes", top_k=9)
    with pytest.raises(ModelError, match=r"shape \(4, 5\); expected float32 logits .* C >= 9"):
        save_program(spec, BATCH, tmp_path / "p.pt2")


def test_a_program_holds_no_pickle(program: tuple[Path, tuple[TensorSpec, ...]]) -> None:
    with zipfile.ZipFile(program[0]) as archive:
        for info in archive.infolist():
            assert not archive.read(info).startswith((b"PK", b"\x80\x02")), info.filename


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data/sample_inputs/model.pt", b"anything"),
        ("data/constants/opaque_obj_0", b"anything"),
        ("data/constants/custom_obj_0", b"anything"),
        ("data/weights/model.pt", b"anything"),
        (
            "data/weights/model_weights_config.json",
            b'{"config": {"w": {"path_name": "weight_0", "use_pickle": true}}}',
        ),
    ],
)
def test_a_program_with_something_to_unpickle_is_not_loaded(
    name: str, content: bytes, program: tuple[Path, tuple[TensorSpec, ...]], tmp_path: Path
) -> None:
    path, outputs = program
    evil = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for info in source.infolist():
            if info.filename != f"{root}/{name}":
                target.writestr(info, source.read(info))
        target.writestr(f"{root}/{name}", content)
    runner = TorchRunner(evil, input_spec(PICTURES, BATCH), outputs, 2, EAGER)
    with pytest.raises(EngineCorruptError, match=r"expected a graph and raw tensors"), runner:
        pytest.fail("it was loaded")


def test_a_file_that_is_no_archive_is_said(tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    path.write_bytes(b"not a zip file")
    runner = TorchRunner(path, input_spec(PICTURES, BATCH), (), 2, EAGER)
    with pytest.raises(EngineCorruptError, match=r"expected an archive of torch\.export"), runner:
        pytest.fail("it was loaded")


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allowed, for all of the process; at the end as before."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.usefixtures("tf32")
def test_an_engines_fp32_is_not_rounded_to_tf32(
    program: tuple[Path, tuple[TensorSpec, ...]],
) -> None:
    rows = input_spec(PICTURES, BATCH)
    with TorchRunner(program[0], rows, program[1], 1, EAGER):
        assert torch.backends.cudnn.allow_tf32
    with TorchRunner(program[0], rows, program[1], 1, replace(EAGER, allows_tf32=False)):
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    engine = make_runner("torch", program[0], rows, program[1], this_cpu(1))
    assert isinstance(engine, TorchRunner)
    assert not engine._mode.allows_tf32
