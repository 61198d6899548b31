"""Wrap a float graph into an engine's graph: raw rows in, finished answers out, one batch size."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.model import INPUT, MIN_CLASSES, ImageInput, ModelSpec, head_error, input_spec
from engines.runner import LOGITS, Array, TensorSpec
from engines.tensor_uses import all_graphs, inputs_of

MIN_IR_VERSION = 8
"""Older files list their constants as inputs too, which a wrapped graph does not."""
PREFIX = "nightscore_"
"""Of every name that is added, so that none collides with the model's own."""


def wrap(core: onnx.ModelProto, spec: ModelSpec, batch_size: int) -> onnx.ModelProto:
    """Add normalisation before the model and its head after it, and fix the batch.

    Args:
        core: Float graph of one input and one output.
        spec: The model's description.
        batch_size: Rows of every batch.

    Returns:
        A graph with the input `rows` and the outputs of `spec.head`.

    Raises:
        ModelError: The head does not fit the model's output.
    """
    model = _renamed(core)
    model.ir_version = max(model.ir_version, MIN_IR_VERSION)
    graph = model.graph
    model_input = inputs_of(graph)[0].name
    before = _preprocessing(graph, spec, model_input)
    after = _head(graph, spec, graph.output[0].name)
    nodes = [*before, *graph.node, *after]
    answer = onnx.ValueInfoProto()
    answer.CopyFrom(graph.output[0])
    for batch in answer.type.tensor_type.shape.dim[:1]:
        batch.dim_value = batch_size
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    rows = input_spec(spec, batch_size)
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    graph.input.append(helper.make_tensor_value_info(rows.name, kinds[rows.dtype], rows.shape))
    for name, dtype in _output_types(spec):
        graph.output.append(helper.make_tensor_value_info(name, kinds[dtype], None))
    try:
        model = _inferred(model, answer)
        onnx.checker.check_model(model)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise head_error(spec, "does not fit") from error
    return model


def _renamed(core: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which no tensor of the model has a name that the wrapped graph gives away."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    for graph in all_graphs(model.graph):  # inner ones read tensors of the graph around them
        _rename(graph, {INPUT, "score", "class_id", "probability", LOGITS})
    return model


def _rename(graph: onnx.GraphProto, taken: set[str]) -> None:
    for tensor in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        if tensor.name in taken:
            tensor.name = f"{PREFIX}model_{tensor.name}"
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{PREFIX}model_{name}" if name in taken else name for name in names]


def _inferred(model: onnx.ModelProto, answer: onnx.ValueInfoProto) -> onnx.ModelProto:
    """With shapes; what the model says of its output, which may be wrong, where onnx knows none."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    if all(map(_width, inferred.graph.output)):
        return inferred
    model.graph.value_info.append(answer)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _width(output: onnx.ValueInfoProto) -> int:
    """Of [batch, n]; 0 for another or unknown shape."""
    dims = output.type.tensor_type.shape.dim
    return dims[1].dim_value if len(dims) == 2 else 0


def output_specs(model: onnx.ModelProto, spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """The outputs of a wrapped graph.

    Raises:
        ModelError: The head does not fit the model's output.
    """
    widths = {entry.name: _width(entry) for entry in model.graph.output}
    batch_size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    specs = []
    for name, dtype in _output_types(spec):
        width = widths[name]
        if not width:
            raise head_error(spec, _found(model.graph.output[-1]))
        if name == LOGITS and width < MIN_CLASSES:
            raise head_error(spec, f"has shape [batch, {width}]")
        specs.append(TensorSpec(name=name, dtype=dtype, shape=(batch_size, width)))
    return tuple(specs)


def _found(output: onnx.ValueInfoProto) -> str:
    dims = output.type.tensor_type.shape.dim
    if len(dims) in (0, 2):
        return "cannot be read as [batch, n]"
    sizes = ["batch", *(str(dim.dim_value or "?") for dim in dims[1:])]
    return f"has shape [{', '.join(sizes)}]"


def _output_types(spec: ModelSpec) -> list[tuple[str, str]]:
    if spec.head == "scores":
        return [("score", "float32")]
    return [("class_id", "int32"), ("probability", "float32"), (LOGITS, "float32")]


def _constant(graph: onnx.GraphProto, name: str, values: object, dtype: type) -> str:
    array: Array = np.asarray(values, dtype)
    graph.initializer.append(numpy_helper.from_array(array, f"{PREFIX}{name}"))
    return f"{PREFIX}{name}"


def _preprocessing(
    graph: onnx.GraphProto, spec: ModelSpec, model_input: str
) -> list[onnx.NodeProto]:
    if not isinstance(spec.input, ImageInput):
        return [helper.make_node("Identity", [INPUT], [model_input], name=f"{PREFIX}input")]
    mean = _constant(graph, "mean", np.reshape(spec.input.mean, (1, 3, 1, 1)), np.float32)
    scale = 1.0 / np.reshape(spec.input.std, (1, 3, 1, 1))
    factor = _constant(graph, "factor", scale, np.float32)
    pixels, planes, centred = (f"{PREFIX}{name}" for name in ("pixels", "planes", "centred"))
    return [
        helper.make_node("Cast", [INPUT], [pixels], name=pixels, to=TensorProto.FLOAT),
        helper.make_node("Transpose", [pixels], [planes], name=planes, perm=[0, 3, 1, 2]),
        helper.make_node("Sub", [planes, mean], [centred], name=centred),
        helper.make_node("Mul", [centred, factor], [model_input], name=f"{PREFIX}normalised"),
    ]


def _head(graph: onnx.GraphProto, spec: ModelSpec, model_output: str) -> list[onnx.NodeProto]:
    if spec.head == "scores":
        shape = _constant(graph, "score_shape", [0, -1], np.int64)
        return [
            helper.make_node("Reshape", [model_output, shape], ["score"], name=f"{PREFIX}score")
        ]
    k = _constant(graph, "k", [spec.top_k], np.int64)
    shares, indices = f"{PREFIX}softmax", f"{PREFIX}indices"
    return [
        helper.make_node("Softmax", [model_output], [shares], name=shares, axis=1),
        helper.make_node("TopK", [shares, k], ["probability", indices], name=f"{PREFIX}top_k"),
        helper.make_node(
            "Cast", [indices], ["class_id"], name=f"{PREFIX}class_id", to=TensorProto.INT32
        ),
        helper.make_node("Identity", [model_output], [LOGITS], name=f"{PREFIX}logits"),
    ]
