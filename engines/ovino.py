"""OpenVINO: runs a graph on the CPU, one inference request of one thread on each core."""

from __future__ import annotations

import sys
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np

from engines.errors import EngineCorruptError
from engines.runner import Array, CoreRunner, Outputs

BLOB = ".blob"
"""Suffix of graphs that are compiled: they open in a fifth of the time that an ONNX file takes."""
CONVERTER = "openvino.tools.ovc"
"""OpenVINO's converter of models, which goes with telemetry; nothing here converts any."""
WHERE = ("Exception from ", "Check '")
"""How the lines of a message of OpenVINO begin that name a place in its source."""


class OpenVinoRunner(CoreRunner):
    """Runs a compiled graph, or an ONNX graph with fixed shapes; one stream for each thread.

    See `CoreRunner`.
    """

    def _open(self) -> None:
        self._tensor = _openvino().Tensor
        core = the_core()
        opened = self._import(core) if self._graph.suffix == BLOB else self._compile(core)
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self._num_threads):
            self._idle.put(opened.create_infer_request())

    def _compile(self, core: Any) -> Any:
        return core.compile_model(core.read_model(self._graph), "CPU", settings(self._num_threads))

    def _import(self, core: Any) -> Any:
        blob = self._graph.read_bytes()
        try:
            return core.import_model(blob, "CPU", settings(self._num_threads))
        except RuntimeError as error:
            raise EngineCorruptError(
                f"engine {self._graph.name}: OpenVINO cannot read it ({_reason(error)}); expected "
                "a graph compiled by this version on such a processor. Build it again with "
                "`score engine build --force`."
            ) from None

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


@cache
def the_core() -> Any:
    """The only core of this process, for as long as it lives.

    A core gives the thread that makes it a new alternate signal stack, and when it goes it brings
    back the one before. Two that do not go in reverse order leave one that is unmapped: the next
    signal with a handler of Python is a segmentation fault (seen with OpenVINO 2026.4: its CPU
    plug-in's SigAltStackSetup).
    """
    return _openvino().Core()


def settings(num_threads: int) -> dict[str, Any]:
    """How graphs run, whoever compiles or opens them."""
    return {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": num_threads,
        # Two processes of one stream each would both be pinned to the first core.
        "ENABLE_CPU_PINNING": False,
        # Otherwise fp32 parts silently run in bf16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "f32",
    }


def _reason(error: RuntimeError) -> str:
    """OpenVINO's message on one line, without where in its source it comes from."""
    lines = map(str.strip, str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(WHERE))


def _openvino() -> Any:
    """The package without its converter: that takes half of its import, and loads telemetry.

    OpenVINO goes without where the converter cannot be imported, and None in `sys.modules` is
    Python's own way to say so. Source: openvino/__init__.py; the Python reference, 5.3.1.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault(CONVERTER, None)  # type: ignore[arg-type]
    import openvino

    if sys.modules.get(CONVERTER, openvino) is None:
        del sys.modules[CONVERTER]  # whoever wants to convert may
    return openvino
