"""The model as a float ONNX graph with a dynamic batch, wherever it comes from."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engines.answer import keep_answer
from engines.errors import ModelError
from engines.float32 import in_float32
from engines.gemms import make_gemms_plain
from engines.model import ModelSpec, in_eval_mode, load_torch_model, shown
from engines.probing import open_session
from engines.tensor_uses import inputs_of
from engines.torch_program import answer_of

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 20
"""Known by ONNX Runtime, OpenVINO and TensorRT 11."""
MIN_OPSET = 13
"""Softmax and Q/DQ per channel mean what we mean from here on."""


def load_core(spec: ModelSpec) -> onnx.ModelProto:
    """The model as ONNX, one float32 input and output, checked against its description.

    Raises:
        ModelError: It cannot be loaded or exported, or has another input or output than described.
    """
    if spec.is_torch:
        try:
            core = export_torch(load_torch_model(spec.source), spec.input.model_row_shape)
        except ModelError:
            raise
        except Exception as error:  # the exporter may raise anything
            reason = shown(error.__cause__ or error)  # the exporter's own begins with advice
            raise ModelError(
                f"model {spec.source}: torch.onnx.export: {reason}; expected a model that "
                "can be exported with any batch. Export it yourself and name the ONNX file."
            ) from error
    else:
        core = _load_onnx(Path(spec.source))
    core = in_float32(core, spec)
    _check_input(core, spec)
    keep_answer(core, spec)
    try:
        open_session(core)  # what simplifies swallows what it fails with
        return _simplify(core)
    except Exception as error:  # ONNX Runtime may raise anything
        raise ModelError(
            f"model {spec.source}: {shown(error)}; expected a graph that ONNX Runtime can load."
        ) from error


def export_torch(model: torch.nn.Module, row_shape: tuple[int, ...]) -> onnx.ModelProto:
    """Export with torch's dynamo exporter and a dynamic batch.

    Args:
        model: Takes float32 [batch, *row_shape] once its weights are float32, which they become.
        row_shape: Shape of one row.
    """
    import torch

    example, model = torch.zeros((2, *row_shape)), in_eval_mode(model.float())
    with _quiet():
        with torch.no_grad():
            outputs = model(example)
        several = not isinstance(outputs, torch.Tensor) and answer_of(outputs) is not None
        program = torch.onnx.export(
            _answer_alone(model) if several else model,
            (example,),
            input_names=["input"],
            output_names=["output"],
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    if program is None:
        raise ModelError("torch.onnx.export: no program; expected one from the dynamo exporter.")
    return program.model_proto


def _answer_alone(model: torch.nn.Module) -> torch.nn.Module:
    """The exporter gives outputs names of its own: which one is meant would be lost."""
    import torch

    class Answer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows: torch.Tensor) -> torch.Tensor | None:
            return answer_of(self.model(rows))

    return in_eval_mode(Answer())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals, which no user can change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _load_onnx(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise ModelError(f"model {path}: {error.strerror}; expected an ONNX file.") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or "not an ONNX file"
        raise ModelError(f"model {path}: {reason}; expected a valid ONNX file.") from None
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:  # only operators of other domains, as some converters of trees write
        model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    opset = max(versions, default=OPSET)
    if opset < MIN_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except Exception as error:  # it raises whatever its C++ does
            raise ModelError(
                f"model {path}: opset {opset}: {shown(error)}; expected opset {MIN_OPSET} or "
                "later. Export it again."
            ) from None
    return model


def _check_input(model: onnx.ModelProto, spec: ModelSpec) -> None:
    import onnx

    inputs = inputs_of(model.graph)
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs)
        raise ModelError(f"model {spec.source}: inputs {names}; expected exactly one.")
    kind = inputs[0].type.tensor_type
    dims = tuple(dim.dim_value or None for dim in kind.shape.dim)
    wanted = spec.input.model_row_shape
    found = "float32"
    if kind.elem_type != onnx.TensorProto.FLOAT:
        found = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        what_to_do = "Export the model with a float32 input, and cast it in the graph."
    elif len(dims) == len(wanted) + 1 and all(
        dim in (None, size) for dim, size in zip(dims[1:], wanted, strict=True)
    ):
        return
    elif len(wanted) == 3 and len(dims) == 4 and dims[3] == wanted[0] != dims[1]:
        what_to_do = "Export the model with channels first, and transpose them in the graph."
    elif len(wanted) == 3 and len(dims) == 4 and dims[1] == 1:
        what_to_do = "Pictures are RGB: make one channel of the three in the graph."
    elif len(wanted) == 1 and len(dims) > 2:
        rows = f"batchx{wanted[0]}"
        what_to_do = f"Export the model so that it takes {rows}, and reshape them in the graph."
    else:
        what_to_do = "Check the job's `model.size` or feature columns."
    shape = "x".join("?" if dim is None else str(dim) for dim in dims)
    raise ModelError(
        f"model {spec.source}: input {inputs[0].name} is {found} {shape}; expected float32 "
        f"batchx{'x'.join(map(str, wanted))}. {what_to_do}"
    )


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The batch that the graph is bound to, or None when it takes any."""
    return inputs_of(model.graph)[0].type.tensor_type.shape.dim[0].dim_value or None


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own: layers are told apart by it."""
    taken: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{position}_{node.output[0]}"
        taken.add(node.name)


def _simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, infer shapes and make Gemms plain, as the quantiser needs it."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quiet():
        raw, simple = Path(folder, "raw.onnx"), Path(folder, "simple.onnx")
        onnx.save(model, raw)
        quant_pre_process(raw, simple, skip_symbolic_shape=True)
        core = onnx.load(simple)
    make_gemms_plain(core.graph)
    return core
