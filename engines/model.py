"""The model as a job describes it, and the fingerprint of all that decides what it answers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engines.content import Contents, own_attributes, without_addresses
from engines.errors import ModelError
from engines.keys import digest
from engines.runner import TensorSpec
from engines.tensor_uses import all_graphs

if TYPE_CHECKING:
    import onnx
    import torch

INPUT = "rows"
"""Name of every engine's input."""
Head = Literal["classes", "scores"]
MIN_CLASSES = 2
"""The softmax of one logit is 1, whatever the row."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LOCATION = "location"
"""Key under which a tensor of an ONNX file names the file that holds its data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInput:
    """uint8 RGB pixels, NHWC; the graph computes (x - mean) / std and goes on in NCHW."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of the engine's input."""
        return (self.height, self.width, 3)

    @property
    def model_row_shape(self) -> tuple[int, ...]:
        """Shape of one row of the model's own input."""
        return (3, self.height, self.width)

    @property
    def dtype(self) -> str:
        """Dtype of the engine's input."""
        return "uint8"


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureInput:
    """float32 features, [batch, num_features]."""

    num_features: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of the engine's input."""
        return (self.num_features,)

    @property
    def model_row_shape(self) -> tuple[int, ...]:
        """Shape of one row of the model's own input."""
        return (self.num_features,)

    @property
    def dtype(self) -> str:
        """Dtype of the engine's input."""
        return "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model, and what its graph does before and after it."""

    source: str
    """An ONNX file, or `module:callable` that returns a `torch.nn.Module`."""
    input: ImageInput | FeatureInput
    head: Head
    """`classes`: logits [b, C], or their softmax -> class_id int32 [b, k], probability float32
    [b, k]. `scores`: output [b] or [b, m] -> score float32 [b, m]."""
    top_k: int = 1

    @property
    def is_torch(self) -> bool:
        """Whether the source is `module:callable`."""
        return not self.source.endswith(".onnx") and ":" in self.source


def input_spec(spec: ModelSpec, batch_size: int) -> TensorSpec:
    """The input of an engine of the model."""
    shape = (batch_size, *spec.input.row_shape)
    return TensorSpec(name=INPUT, dtype=spec.input.dtype, shape=shape)


def head_error(spec: ModelSpec, found: str) -> ModelError:
    """What to raise when the head does not fit the model's output, of which something was found."""
    least = max(spec.top_k, MIN_CLASSES)
    wanted, hint = "scores [batch, m]", "Check `model.head`."
    if spec.head == "classes":
        wanted = f"logits [batch, C], C >= {least}"
        hint = "Check `model.top_k`, flatten the output, or set `model.head: scores`."
    return ModelError(f"model {spec.source}: its output {found}; expected float32 {wanted}. {hint}")


def fingerprint_model(spec: ModelSpec) -> str:
    """sha256 over weights, graph or code, input and head: another model has another.

    An ONNX file is hashed as it lies there (external data too). A torch model has to be made for
    it, which costs the import of torch: its weights may come from anywhere, so nothing less would
    notice a new version. Code that is neither the source's module nor that of a layer is not seen.

    Raises:
        ModelError: The model is not there or cannot be made.
    """
    content = _hash_torch(spec) if spec.is_torch else _hash_onnx(Path(spec.source))
    return digest(["model", content, spec.input, spec.head, spec.top_k])


def _hash_onnx(path: Path) -> str:
    try:
        data = path.read_bytes()
        hasher = hashlib.sha256(data)
        # A file beside it is named under this key, as it stands; most models have none, and then
        # nobody waits for the import of onnx.
        for name in _external_files(path) if LOCATION.encode() in data else ():
            hasher.update(f"\0{name}\0".encode())
            hasher.update((path.parent / name).read_bytes())
    except OSError as error:
        raise ModelError(
            f"model {error.filename}: {error.strerror}; expected an ONNX file or module:callable. "
            "Check `model.source`."
        ) from None
    return hasher.hexdigest()


def _external_files(path: Path) -> list[str]:
    """Names of the files beside an ONNX file that hold its weights: only the graph knows them."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:  # said where the model is loaded
        return []
    tensors = (tensor for graph in all_graphs(model.graph) for tensor in _tensors(graph))
    entries = (entry for tensor in tensors for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == LOCATION})


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constants, but for those in branches and loops."""
    yield from graph.initializer
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _hash_torch(spec: ModelSpec) -> str:
    model = load_torch_model(spec.source)
    hasher = hashlib.sha256(without_addresses(repr(model)).encode())
    contents = Contents()
    name = "its state"
    try:
        for name, value in _named_contents(model):
            hasher.update(f"{name}={contents.digest(value)}\n".encode())
    except Exception as error:  # torch and the user's code may raise anything
        raise ModelError(
            f"model {spec.source}: {name}: {shown(error)}; expected dense tensors that hold "
            "their values. Return a model whose weights are loaded."
        ) from error
    for source in _sources(model, spec.source.partition(":")[0]):
        hasher.update(source.encode())
    return hasher.hexdigest()


def _named_contents(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """All that decides what a model answers but its code: exporters bake plain attributes in."""
    yield from model.named_buffers(remove_duplicate=False)  # some are no part of the state
    yield from model.state_dict(keep_vars=True).items()
    for layer_name, layer in model.named_modules():
        for name, value in sorted(own_attributes(layer).items()):
            yield f"{layer_name}.{name}", value


def _sources(model: torch.nn.Module, module: str) -> list[str]:
    """Source of the module that makes the model, and of all that define one of its layers."""
    names = {module, *(type(layer).__module__ for layer in model.modules())}
    sources = []
    for name in sorted(names):
        try:
            sources.append(inspect.getsource(importlib.import_module(name)))
        except (ImportError, OSError, TypeError):  # compiled: its name has to do
            sources.append(name)
    return sources


def shown(error: BaseException) -> str:
    """An error of others on one line of bounded length, without the colours of a terminal."""
    return " ".join(COLOURS.sub("", f"{type(error).__name__}: {error}").split())[:300]


def load_torch_model(source: str) -> torch.nn.Module:
    """Call `module:callable` and return its model in evaluation mode.

    Raises:
        ModelError: There is no such callable, it fails, or returns something else.
    """
    import torch

    module, _, name = source.partition(":")
    try:
        # Whatever the user's code prints must not end up in our own (JSON) output.
        with contextlib.redirect_stdout(sys.stderr):
            model = getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(
            f"model {source}: {shown(error)}; expected module:callable that "
            "returns a torch.nn.Module. Check `model.source` and PYTHONPATH."
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"model {source}: returned {type(model).__name__}; expected a torch.nn.Module."
        )
    model = _uncompiled(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"model {source}: a TorchScript module; expected the torch.nn.Module that it was made "
            "of, or an ONNX file. torch cannot export TorchScript."
        )
    return in_eval_mode(model)


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The layers that `torch.compile` was given: what it makes of them is for one process."""
    for layer in list(model.modules()):
        for name, inner in layer.named_children():
            if hasattr(inner, "_orig_mod"):
                setattr(layer, name, inner._orig_mod)
    plain: torch.nn.Module = getattr(model, "_orig_mod", model)
    return plain


def in_eval_mode(model: torch.nn.Module) -> torch.nn.Module:
    """The model, which is left in its mode where that is part of its code."""
    # Programs of torch.export refuse to change it.
    with contextlib.suppress(NotImplementedError):
        model.eval()
    return model
