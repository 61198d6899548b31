"""CUDA's runtime, every call checked: memory, streams, events and graphs, all freed together.

Never executed with a driver. Names, argument counts and the kinds of handles were checked against
cuda-bindings 13.5 on a machine without one; semantics are those of NVIDIA's documentation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.errors import CudaError, EngineError, OutOfDeviceMemoryError
from engines.runner import Array

DEVICE = 0
"""A lane's process sees one device (CUDA_VISIBLE_DEVICES); any thread may use it unasked."""


def device_problem() -> str | None:
    """One sentence why CUDA cannot be used here, None where it can.

    Asks the runtime only, which is safe without a driver; libraries built on CUDA are not.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return (
            "CUDA: the package cuda-bindings is not installed; expected it beside an NVIDIA "
            "driver. Install nightscore[gpu]."
        )
    error, num_devices = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaSuccess and num_devices:
        return None
    return (
        f"CUDA: {_describe(runtime, error)}, {num_devices or 0} devices; expected an NVIDIA driver "
        "for CUDA 13 and a GPU that this process may see. See `score doctor`."
    )


class CudaStreams:
    """Streams, events, memory and graphs of the visible device; see `engines.slots.Streams`.

    A context manager that owns what it made and frees it in reverse order when left. Handles and
    device addresses are plain integers.
    """

    def __enter__(self) -> CudaStreams:
        from cuda.bindings import runtime

        self._runtime = runtime
        self._owned: list[tuple[Callable[..., Any], int]] = []
        self._call(runtime.cudaSetDevice, DEVICE)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        failures: list[EngineError] = []
        # Nothing that is freed may be in use; also brings out what failed while nobody looked.
        self._attempt(failures, self._runtime.cudaDeviceSynchronize)
        for free, handle in reversed(self._owned):
            self._attempt(failures, free, handle)
        self._owned.clear()
        if failures and error is None:  # otherwise that error is the one to be seen
            raise failures[0]

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Such as (9, 0)."""
        known = self._runtime.cudaDeviceAttr
        major = known.cudaDevAttrComputeCapabilityMajor
        minor = known.cudaDevAttrComputeCapabilityMinor
        ask = self._runtime.cudaDeviceGetAttribute
        return self._call(ask, major, DEVICE), self._call(ask, minor, DEVICE)

    def new_stream(self) -> int:
        runtime = self._runtime
        # Blocking streams would wait for the default stream, which other libraries use.
        made = self._call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        return self._own(runtime.cudaStreamDestroy, made)

    def new_event(self) -> int:
        runtime = self._runtime
        # The host sleeps while it waits: the processor is busy decoding.
        flags = runtime.cudaEventDisableTiming | runtime.cudaEventBlockingSync
        made = self._call(runtime.cudaEventCreateWithFlags, flags)
        return self._own(runtime.cudaEventDestroy, made)

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        runtime = self._runtime
        made = self._call(runtime.cudaHostAlloc, num_bytes, runtime.cudaHostAllocDefault)
        address = self._own(runtime.cudaFreeHost, made)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def device(self, num_bytes: int) -> int:
        made = self._call(self._runtime.cudaMalloc, num_bytes)
        return self._own(self._runtime.cudaFree, made)

    def copy_in(self, pointer: int, source: Array, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        copy = self._runtime.cudaMemcpyAsync
        self._call(copy, pointer, source.ctypes.data, source.nbytes, kind, stream)

    def copy_out(self, target: Array, pointer: int, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copy = self._runtime.cudaMemcpyAsync
        self._call(copy, target.ctypes.data, pointer, target.nbytes, kind, stream)

    def record(self, event: int, stream: int) -> None:
        self._call(self._runtime.cudaEventRecord, event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call(self._runtime.cudaStreamWaitEvent, stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        self._call(self._runtime.cudaEventSynchronize, event)

    def synchronize_stream(self, stream: int) -> None:
        self._call(self._runtime.cudaStreamSynchronize, stream)

    def capture(self, work: Callable[[int], None], stream: int) -> int:
        runtime = self._runtime
        # Not Global: calls that other threads make meanwhile, such as DALI's, would spoil it.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(runtime.cudaStreamBeginCapture, stream, mode)
        try:
            work(stream)
        except BaseException:
            self._abandon_capture(stream)
            raise
        graph = self._call(runtime.cudaStreamEndCapture, stream)
        try:
            made = self._call(runtime.cudaGraphInstantiate, graph, 0)
        finally:
            self._attempt([], runtime.cudaGraphDestroy, graph)
        return self._own(runtime.cudaGraphExecDestroy, made)

    def launch(self, graph: int, stream: int) -> None:
        self._call(self._runtime.cudaGraphLaunch, graph, stream)

    def _abandon_capture(self, stream: int) -> None:
        """End a capture that failed; the stream can be used as before."""
        _, graph = self._runtime.cudaStreamEndCapture(stream)
        if graph is not None and int(graph):
            self._attempt([], self._runtime.cudaGraphDestroy, graph)
        self._runtime.cudaGetLastError()

    def _own(self, free: Callable[..., Any], made: Any) -> int:
        self._owned.append((free, int(made)))
        return int(made)

    def _attempt(self, failures: list[EngineError], call: Callable[..., Any], *args: Any) -> None:
        try:
            self._call(call, *args)
        except (CudaError, OutOfDeviceMemoryError) as error:
            failures.append(error)

    def _call(self, call: Callable[..., Any], *args: Any) -> Any:
        error, *values = call(*args)
        runtime = self._runtime
        if error == runtime.cudaError_t.cudaSuccess:
            return values[0] if values else None
        runtime.cudaGetLastError()  # else whoever asks cuda-bindings' runtime next is told of it
        found = f"CUDA, {call.__name__}: {_describe(runtime, error)}; expected success. "
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfDeviceMemoryError(found + "Use a smaller batch, or fewer lanes per device.")
        raise CudaError(found + "The device may need a new process; see the driver's log.")


def _describe(runtime: Any, error: Any) -> str:
    """Such as `cudaErrorNoDevice (no CUDA-capable device is detected)`."""
    _, text = runtime.cudaGetErrorString(error)
    return f"{error.name} ({text.decode(errors='replace')})"
