"""OpenVINO: runs a graph on the CPU, one inference request of one thread on each core."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import numpy as np

from engines.runner import Array, CoreRunner, Outputs


class OpenVinoRunner(CoreRunner):
    """Runs an ONNX graph with fixed shapes; one stream for each thread. See `CoreRunner`."""

    def _open(self) -> None:
        import openvino

        self._tensor = openvino.Tensor
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(self._graph),
            "CPU",
            {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "INFERENCE_NUM_THREADS": self._num_threads,
                "NUM_STREAMS": self._num_threads,
                # Two processes of one stream each would both be pinned to the first core.
                "ENABLE_CPU_PINNING": False,
                # Otherwise fp32 parts silently run in bf16 where the processor has it.
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self._num_threads):
            self._idle.put(compiled.create_infer_request())

    def _close(self) -> None:
        del self._idle

    def run(self, batch: Array) -> Outputs:
        """See `engines.runner.HostRunner.run`."""
        if not batch.flags.writeable:  # OpenVINO does not share those, such as Arrow's
            batch = batch.copy()
        request = self._idle.get()
        try:
            request.set_input_tensor(self._tensor(batch, shared_memory=True))
            request.infer()
            # Copied: the request's own memory is used again by its next batch.
            return tuple(np.array(request.get_tensor(spec.name).data) for spec in self.outputs)
        finally:
            self._idle.put(request)
