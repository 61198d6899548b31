"""Look into a graph while it runs: reductions of its tensors, or the tensors themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnxruntime

PREFIX = "nightscore_probe_"


def with_reductions(
    model: onnx.ModelProto, wanted: Sequence[tuple[str, str]]
) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a float graph with a reduction of each wanted tensor as a further output.

    Args:
        model: The graph.
        wanted: Operator (`ReduceMin`, `ReduceMax`) and tensor, which is reduced over all axes.

    Returns:
        The copy, and the names of its new outputs in the order of `wanted`.
    """
    import onnx
    from onnx import TensorProto, helper

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    names = [f"{PREFIX}{position}" for position in range(len(wanted))]
    for name, (operator, source) in zip(names, wanted, strict=True):
        probed.graph.node.append(helper.make_node(operator, [source], [name], keepdims=0))
        probed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return probed, names


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of a float graph with some of its tensors as further outputs."""
    import onnx
    from onnx import TensorProto, helper

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {entry.name for entry in probed.graph.output}
    for name in tensors:
        if name not in known:
            entry = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            probed.graph.output.append(entry)
    return probed


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """ONNX Runtime on all cores; threads that wait do not spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
