"""What an ONNX graph takes, and who reads its tensors, in branches and bodies of loops too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """What a caller gives: older files list their constants as inputs too."""
    constants = {tensor.name for tensor in graph.initializer}
    return [entry for entry in graph.input if entry.name not in constants]


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """A node's branches, or its body: they read tensors of the graph around them."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and all that are in its nodes."""
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from all_graphs(inner)


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors that a node reads, as often as it does."""
    yield from node.input
    for inner in inner_graphs(node):
        yield from uses(inner).elements()


def uses(graph: onnx.GraphProto) -> Counter[str]:
    """Tensor -> how many inputs of nodes it is, and outputs of the graph."""
    found = Counter(entry.name for entry in graph.output)
    for node in graph.node:
        found.update(read_by(node))
    return found


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove the nodes and constants that no output depends on."""
    read = Counter(entry.name for entry in graph.output)
    kept = []
    for node in reversed(graph.node):  # they are in topological order
        if not read.keys().isdisjoint(node.output):
            kept.append(node)
            read.update(read_by(node))
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)
