"""ONNX Runtime: runs a graph on the CPU, one single-threaded call on each core."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.runner import Array, CoreRunner, Outputs, TensorSpec


def import_onnxruntime() -> None:
    """Import it ahead of time: `engines.reference` computes with it."""
    import onnxruntime  # noqa: F401


class OnnxrtRunner(CoreRunner):
    """Runs an ONNX graph with fixed shapes; see `CoreRunner`.

    Args:
        graph: ONNX file.
        input: The graph's input.
        outputs: The graph's outputs, in order.
        num_threads: Batches that may be computed at once.
        is_literal: Compute what the graph says, node by node: a Q/DQ graph is then exactly fake
            quantisation, which fused integer kernels round apart from.
    """

    def __init__(
        self,
        graph: Path,
        input: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        num_threads: int,
        *,
        is_literal: bool = False,
    ) -> None:
        super().__init__(graph, input, outputs, num_threads)
        self._is_literal = is_literal

    def _open(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # Spinning threads would steal the cores of the other stages.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what fails is raised, too
        if self._is_literal:
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        self._session = onnxruntime.InferenceSession(
            self._graph,
            options,
            providers=["CPUExecutionProvider"],
            # It rounds the weights of layers that were kept in float, and with one scale for all
            # channels (cosine 0.952 instead of 0.998 for EfficientNet-Lite0 with its first
            # depthwise layer in float).
            disabled_optimizers=["WeightBiasQuantization"],
        )
        self._names = [output.name for output in self.outputs]

    def _close(self) -> None:
        del self._session

    def run(self, batch: Array) -> Outputs:
        """See `engines.runner.HostRunner.run`."""
        return tuple(map(np.asarray, self._session.run(self._names, {self.input.name: batch})))
