"""torch programs: a model with its preprocessing and head in one archive of fixed shapes.

An archive of `torch.export` is a graph as JSON and tensors as raw bytes. The format can carry
pickles too, and `torch.export.load` of torch 2.13 would unpickle them without asking: an archive
that holds any is refused before it is loaded.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engines.answer import ANSWERS
from engines.errors import EngineCorruptError, ModelError
from engines.model import (
    MIN_CLASSES,
    ImageInput,
    ModelSpec,
    head_error,
    in_eval_mode,
    input_spec,
    load_torch_model,
    shown,
)
from engines.runner import LOGITS, TensorSpec

if TYPE_CHECKING:
    import torch

TorchPrecision = Literal["fp32", "fp16"]
_HARMLESS = re.compile(
    r"(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|archive_format|archive_version"
    r"|\.data/(version|serialization_id)|byteorder)"
)
"""Members of an archive that hold JSON, raw tensor bytes or a few characters."""
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
"""A pickle, unless it is empty: `save_program` leaves it so."""
_OUTPUTS = {"classes": ("class_id", "probability", LOGITS), "scores": ("score",)}


def save_program(
    spec: ModelSpec, batch_size: int, path: Path, precision: TorchPrecision = "fp32"
) -> tuple[TensorSpec, ...]:
    """Write the model with its preprocessing and head, as `engines.graph.wrap` does for ONNX.

    Normalisation and head are computed in float32, the model in `precision`.

    Args:
        spec: The model's description; its source is `module:callable`.
        batch_size: Rows of every batch.
        path: Gets the archive; its suffix is `.pt2`.
        precision: Of the model's weights and activations.

    Returns:
        The program's outputs: class_id int32 [b, k], probability float32 [b, k] and logits
        float32 [b, C], or score float32 [b, m].

    Raises:
        ModelError: The source is no torch model, it cannot be exported in this precision, or the
            head does not fit its output.
    """
    import torch

    if not spec.is_torch:
        raise ModelError(
            f"model {spec.source}: an ONNX file; expected module:callable for a torch engine. Use "
            "another runtime, or name the callable that makes the torch model."
        )
    wrapped = _wrapped(load_torch_model(spec.source), spec, precision)
    rows = input_spec(spec, batch_size)
    example = torch.zeros(rows.shape, dtype=getattr(torch, rows.dtype))
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(wrapped, (example,), strict=False)
            if spec.head == "classes":
                _take_logits(program)
            program.example_inputs = None  # they would be pickled
            outputs = _outputs(program, spec)
            torch.export.save(program, path)
    except ModelError:
        raise
    except Exception as error:  # export runs the user's code, which may raise anything
        raise ModelError(
            f"model {spec.source}: torch.export in {precision}: {shown(error)}; expected a model "
            "that can be exported. Use another runtime."
        ) from error
    return outputs


def _wrapped(model: torch.nn.Module, spec: ModelSpec, precision: str) -> torch.nn.Module:
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.float32
    is_image = isinstance(spec.input, ImageInput)

    class Wrapped(torch.nn.Module):
        mean: torch.Tensor
        factor: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.model = model.to(dtype)
            if isinstance(spec.input, ImageInput):
                std = torch.tensor(spec.input.std).reshape(1, 3, 1, 1)
                self.register_buffer("mean", torch.tensor(spec.input.mean).reshape(1, 3, 1, 1))
                self.register_buffer("factor", 1.0 / std)

        def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            if is_image:
                rows = (rows.permute(0, 3, 1, 2).to(torch.float32) - self.mean) * self.factor
            answer = answer_of(self.model(rows.to(dtype)))
            if answer is None:
                raise head_error(spec, "is no float tensor")
            _check_head(spec, tuple(answer.shape))
            answer = answer.to(torch.float32)
            if spec.head == "scores":
                return {"score": answer.reshape(answer.shape[0], -1)}
            probability, index = torch.softmax(answer, dim=1).topk(spec.top_k, dim=1)
            class_id = index.to(torch.int32)
            return {"class_id": class_id, "probability": probability, LOGITS: answer}

    return in_eval_mode(Wrapped())


def answer_of(outputs: Any) -> torch.Tensor | None:
    """The output that the head reads, as `engines.answer` chooses it; None: none is a float.

    Of a dict, as transformers' models give, it is the entry whose key says so, if one does, and
    else the first, as of a tuple.
    """
    if isinstance(outputs, dict):
        named = [part for key, part in outputs.items() if str(key).lower() in ANSWERS]
        outputs = named if len(named) == 1 else outputs
    return next(_floats(outputs), None)


def _floats(answer: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(answer, torch.Tensor):
        yield from [answer] if answer.is_floating_point() else []
    elif isinstance(answer, (dict, list, tuple)):
        for part in answer.values() if isinstance(answer, dict) else answer:
            yield from _floats(part)


def _check_head(spec: ModelSpec, shape: tuple[int, ...]) -> None:
    classes = spec.head == "classes"
    least = max(spec.top_k, MIN_CLASSES)
    if (len(shape) != 2 or shape[1] < least) if classes else not shape:
        raise head_error(spec, f"has shape {shape}")


def _take_logits(program: torch.export.ExportedProgram) -> None:
    """Of a model that ends in Softmax take what that reads, as `engines.answer` does for ONNX."""
    import torch

    (answers,) = program.graph.output_node().args
    node = answers[_OUTPUTS["classes"].index(LOGITS)]
    while node.target == torch.ops.aten.to.dtype:
        node = node.args[0]
    if node.target == torch.ops.aten.softmax.int and node.args[1] in (-1, 1):
        # In place, as the node's name may be that of an output.
        node.target = torch.ops.aten.to.dtype
        node.args = (node.args[0], node.meta["val"].dtype)
        node.kwargs = {}
        program.graph_module.recompile()


def _outputs(program: torch.export.ExportedProgram, spec: ModelSpec) -> tuple[TensorSpec, ...]:
    specs = []
    (answers,) = program.graph.output_node().args
    for name, node in zip(_OUTPUTS[spec.head], answers, strict=True):
        value = node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(map(int, value.shape))))
    return tuple(specs)


def load_program(path: Path, device: str = "cpu") -> torch.nn.Module:
    """The program's module: takes rows on `device`, gives a dict of its outputs there.

    Args:
        path: The archive.
        device: As torch names it, with its number where it has one: `cuda:0`.

    Raises:
        EngineCorruptError: The file is no such archive, or holds pickled objects.
    """
    import torch
    from torch.export.passes import move_to_device_pass

    _refuse_pickles(path)
    with quiet():
        program = torch.export.load(path)
        # Moving the module would leave "cpu" in the graph: in its checks of tensors, which then
        # fail, and where it makes tensors itself.
        moved = program if device == "cpu" else move_to_device_pass(program, device)
        module: torch.nn.Module = moved.module(check_guards=False)
    return module


def _refuse_pickles(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            unknown = [
                name
                for name, info in members.items()
                if not _HARMLESS.fullmatch(name)
                and not (name == _SAMPLE_INPUTS and info.file_size == 0)
            ]
            # Two readers may take different ones of members with the same name.
            if len(members) != len(archive.infolist()):
                unknown.append("a name twice")
            for name, info in members.items():
                if name.endswith("_config.json") and not unknown:
                    entries = json.loads(archive.read(info))["config"].values()
                    unknown += [entry["path_name"] for entry in entries if entry["use_pickle"]]
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise EngineCorruptError(
            f"torch program {path}: {shown(error)}; expected an archive of torch.export. "
            "Build the engine again with `score engine build --force`."
        ) from None
    if unknown:
        raise EngineCorruptError(
            f"torch program {path}: holds {unknown[0]}; expected a graph and raw tensors alone, "
            "because anything else would be unpickled. Build the engine again with "
            "`score engine build --force`."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Torch warns of its own internals, which no user can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
