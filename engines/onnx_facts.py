"""What an ONNX file says of itself: enough to write a job file for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.answer import float_outputs, probabilities_from, ranks_from
from engines.errors import ModelError
from engines.model import shown
from engines.tensor_uses import inputs_of

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxFacts:
    """Input and output of a model, read from its graph alone."""

    row_shape: tuple[int | None, ...]
    """Of one row of the input, without the batch; None: the graph takes any."""
    output_name: str
    """The float32 output that is the model's answer."""
    other_outputs: tuple[str, ...]
    """Further float32 outputs, which nothing reads."""
    output_shape: tuple[int | None, ...]
    """Of one row of that output; empty: one number a row, or it is not said."""
    last_operator: str
    """That makes this output, such as `Gemm` or `Softmax`."""
    probabilities_from: str
    """That makes this output probabilities, which no head takes for logits; empty: none is seen."""
    ranks_from: str
    """That ranks the classes, of which this output keeps no logits; empty: none is seen."""


def read_onnx_facts(path: str) -> OnnxFacts:
    """Read a graph without its weights' files.

    Raises:
        ModelError: There is no such file, or it is no ONNX model with exactly one input.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(Path(path), load_external_data=False)
    except OSError as error:
        raise ModelError(f"model {path}: {error.strerror}; expected an ONNX file.") from None
    except (DecodeError, ValueError) as error:
        raise ModelError(f"model {path}: {shown(error)}; expected an ONNX file.") from None
    graph = model.graph
    inputs = inputs_of(graph)
    if len(inputs) != 1 or not graph.output:
        names = ", ".join(entry.name for entry in inputs) or "none"
        raise ModelError(f"model {path}: inputs {names}; expected exactly one, and an output.")
    output, *others = float_outputs(graph) or graph.output[:1]
    makers = [node.op_type for node in graph.node if output.name in node.output]
    return OnnxFacts(
        row_shape=_dims(inputs[0])[1:],
        output_name=output.name,
        other_outputs=tuple(entry.name for entry in others),
        output_shape=_dims(output)[1:],
        last_operator=makers[0] if makers else "",
        probabilities_from=probabilities_from(graph, output.name),
        ranks_from=ranks_from(graph, output.name),
    )


def _dims(entry: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(dim.dim_value or None for dim in entry.type.tensor_type.shape.dim)
