"""OpenVINO: runs a graph on the CPU with several inference requests in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engines.runner import Array, DeviceRows, Outputs, TensorSpec, check_batch


class OpenVinoRunner:
    """Runs an ONNX graph with fixed shapes; one stream per thread, so that cores do not wait.

    Args:
        graph: ONNX file.
        input: The graph's input.
        outputs: The graph's outputs, in order.
        num_threads: Threads, and streams, that may be used.
    """

    def __init__(
        self, graph: Path, input: TensorSpec, outputs: tuple[TensorSpec, ...], num_threads: int
    ) -> None:
        self.batch_size = input.shape[0]
        self.input = input
        self.outputs = outputs
        self._graph = graph
        self._num_threads = num_threads

    def __enter__(self) -> OpenVinoRunner:
        import openvino

        self._openvino = openvino
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
        # One more than streams: a request is filled and emptied while all streams compute.
        self._requests = [compiled.create_infer_request() for _ in range(self._num_threads + 1)]
        return self

    def __exit__(self, *_: object) -> None:
        del self._requests

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        """See `engines.runner.Runner.infer`; inputs are read in place."""
        idle = deque(self._requests)
        running: deque[tuple[Any, Array]] = deque()  # the array must outlive its request
        try:
            for batch in batches:
                if batch is None:
                    while running:
                        yield self._finish(running, idle)
                    continue
                if not idle:
                    yield self._finish(running, idle)
                array = check_batch(batch, self.input)
                if not array.flags.writeable:  # OpenVINO does not share those, such as Arrow's
                    array = array.copy()
                request = idle.popleft()
                request.set_input_tensor(self._openvino.Tensor(array, shared_memory=True))
                request.start_async()
                running.append((request, array))
            while running:
                yield self._finish(running, idle)
        finally:
            for request, _ in running:
                request.wait()

    def _finish(self, running: deque[tuple[Any, Array]], idle: deque[Any]) -> Outputs:
        request, _ = running[0]
        request.wait()
        running.popleft()
        # Copied: the request's own memory is used again by its next batch.
        outputs = tuple(np.array(request.get_tensor(output.name).data) for output in self.outputs)
        idle.append(request)
        return outputs
