"""How often the tensors of a graph are read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def uses(graph: onnx.GraphProto) -> Counter[str]:
    """Tensor -> how many inputs of nodes it is, and outputs of the graph.

    The branches of an If and the bodies of loops count as well: they read tensors around them.
    """
    found = Counter(entry.name for entry in graph.output)
    for node in graph.node:
        found.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found.update(uses(inner))
    return found
