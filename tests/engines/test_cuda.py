"""The checked CUDA runtime, over a runtime that answers as told: there is no driver here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

from engines.cuda import CudaStreams, device_problem
from engines.errors import CudaError, OutOfDeviceMemoryError

SUCCESS = real.cudaError_t.cudaSuccess
MAKES = {
    "cudaStreamCreateWithFlags": real.cudaStream_t,
    "cudaEventCreateWithFlags": real.cudaEvent_t,
    "cudaStreamEndCapture": real.cudaGraph_t,
    "cudaGraphInstantiate": real.cudaGraphExec_t,
    "cudaMalloc": int,
}
FREES = {
    "cudaStreamCreateWithFlags": "cudaStreamDestroy",
    "cudaEventCreateWithFlags": "cudaEventDestroy",
    "cudaHostAlloc": "cudaFreeHost",
    "cudaMalloc": "cudaFree",
    "cudaGraphInstantiate": "cudaGraphExecDestroy",
    "cudaStreamEndCapture": "cudaGraphDestroy",
}
NO_DRIVER = device_problem() is not None


class FakeRuntime:
    """Real names, constants and numbers of arguments; what the calls answer is made up."""

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}
        """Call -> the error it answers with."""
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._num_made = 100
        self._memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        known = getattr(real, name)
        if isinstance(known, type) or not callable(known) or name == "cudaGetErrorString":
            return known
        signature = known.__doc__.partition("\n")[0]
        num_args = signature.count(",") + (not signature.endswith("()"))

        def call(*args: Any) -> tuple[Any, ...]:
            assert len(args) == num_args, signature
            self.calls.append((name, args))
            error = getattr(real.cudaError_t, self.failing.get(name, "cudaSuccess"))
            return (error, *self._values(name, args, error == SUCCESS))

        call.__name__ = name
        return call

    def _values(self, name: str, args: tuple[Any, ...], done: bool) -> tuple[Any, ...]:
        if name == "cudaDeviceGetAttribute":
            return (9 if args[0].name.endswith("Major") else 0,)
        if name == "cudaHostAlloc":
            self._memory.append(ctypes.create_string_buffer(args[0]))
            return (ctypes.addressof(self._memory[-1]) if done else None,)
        if name not in MAKES:
            return ()
        self._num_made += 1
        return (MAKES[name](self._num_made) if done else None,)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr("cuda.bindings.runtime", fake)
    return fake


def use_everything(streams: CudaStreams) -> None:
    stream, event = streams.new_stream(), streams.new_event()
    pinned, pointer = streams.pinned(64), streams.device(64)
    streams.copy_in(pointer, pinned, stream)
    streams.record(event, stream)
    streams.wait(stream, event)
    streams.launch(streams.capture(lambda _: None, stream), stream)
    streams.copy_out(pinned, pointer, stream)
    streams.synchronize_event(event)
    streams.synchronize_stream(stream)
    assert streams.compute_capability == (9, 0)


@pytest.mark.skipif(not NO_DRIVER, reason="has a driver")
def test_without_a_driver_the_problem_is_one_sentence_and_entering_fails() -> None:
    problem = device_problem()
    assert problem is not None
    assert problem.startswith("CUDA: cudaErrorInsufficientDriver (")
    assert "expected an NVIDIA driver" in problem
    with (
        pytest.raises(CudaError, match="cudaSetDevice: cudaErrorInsufficientDriver"),
        CudaStreams(),
    ):
        pytest.fail("a device was opened that is not there")


def test_no_device_although_a_driver_is_there_is_a_problem(runtime: FakeRuntime) -> None:
    counts: list[int] = [0]
    runtime.cudaGetDeviceCount = lambda: (SUCCESS, counts[0])
    assert "0 devices" in (device_problem() or "")
    counts[0] = 1
    assert device_problem() is None


def test_all_that_was_made_is_freed_once_in_reverse_after_the_device_is_idle(
    runtime: FakeRuntime,
) -> None:
    with CudaStreams() as streams:
        use_everything(streams)
        made = [name for name in runtime.names() if name in FREES]
        num_calls = len(runtime.calls)
    last = runtime.names()[num_calls:]
    assert last[0] == "cudaDeviceSynchronize"
    owned = [FREES[name] for name in made if name != "cudaStreamEndCapture"]
    assert last[1:] == owned[::-1]
    assert runtime.names().count("cudaGraphDestroy") == 1


def test_a_stream_is_made_that_does_not_wait_for_the_default_stream(runtime: FakeRuntime) -> None:
    with CudaStreams() as streams:
        use_everything(streams)
    called = dict(runtime.calls)
    assert called["cudaStreamCreateWithFlags"] == (real.cudaStreamNonBlocking,)
    assert called["cudaEventCreateWithFlags"] == (
        real.cudaEventDisableTiming | real.cudaEventBlockingSync,
    )
    assert called["cudaStreamBeginCapture"][1].name == "cudaStreamCaptureModeThreadLocal"


def test_copies_go_the_right_way_with_all_bytes(runtime: FakeRuntime) -> None:
    with CudaStreams() as streams:
        host = streams.pinned(24).view(np.float32).reshape(2, 3)
        streams.copy_in(7, host, 5)
        streams.copy_out(host, 8, 6)
    (_, copy_in), (_, copy_out) = (c for c in runtime.calls if c[0] == "cudaMemcpyAsync")
    kind = real.cudaMemcpyKind
    assert copy_in == (7, host.ctypes.data, 24, kind.cudaMemcpyHostToDevice, 5)
    assert copy_out == (host.ctypes.data, 8, 24, kind.cudaMemcpyDeviceToHost, 6)


def test_pinned_memory_is_an_array_over_what_was_allocated(runtime: FakeRuntime) -> None:
    with CudaStreams() as streams:
        first = streams.pinned(16)
        first[:] = 9
        assert (first.dtype, first.shape) == (np.uint8, (16,))
        assert bytes(runtime._memory[0].raw[:16]) == bytes([9] * 16)


@pytest.mark.parametrize(
    "call",
    [
        *("cudaSetDevice", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaMalloc"),
        *("cudaHostAlloc", "cudaMemcpyAsync", "cudaEventRecord", "cudaStreamWaitEvent"),
        *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"),
        *("cudaGraphLaunch", "cudaEventSynchronize", "cudaStreamSynchronize"),
        "cudaDeviceGetAttribute",
    ],
)
def test_every_call_that_fails_is_named_and_clears_the_last_error(
    runtime: FakeRuntime, call: str
) -> None:
    runtime.failing[call] = "cudaErrorIllegalAddress"
    expected = rf"CUDA, {call}: cudaErrorIllegalAddress \(an illegal memory access"
    with pytest.raises(CudaError, match=expected), CudaStreams() as streams:
        use_everything(streams)
    names = runtime.names()
    assert names[names.index(call) + 1] == "cudaGetLastError"
    freed = [names.count(FREES[made]) for made in FREES if made in names and made != call]
    if call != "cudaStreamEndCapture":
        assert freed == [1] * len(freed)


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaHostAlloc", "cudaGraphInstantiate"])
def test_memory_that_runs_out_has_an_error_of_its_own(runtime: FakeRuntime, call: str) -> None:
    runtime.failing[call] = "cudaErrorMemoryAllocation"
    with (
        pytest.raises(OutOfDeviceMemoryError, match=f"{call}.*out of memory.*Use a smaller batch"),
        CudaStreams() as streams,
    ):
        use_everything(streams)


def test_what_cannot_be_freed_keeps_nothing_else_from_being_freed(runtime: FakeRuntime) -> None:
    runtime.failing |= {"cudaFreeHost": "cudaErrorUnknown", "cudaEventDestroy": "cudaErrorUnknown"}
    with pytest.raises(CudaError, match="cudaFreeHost"), CudaStreams() as streams:
        use_everything(streams)
    assert {"cudaFree", "cudaStreamDestroy", "cudaGraphExecDestroy"} <= set(runtime.names())


def raise_in_body(streams: CudaStreams) -> None:
    with streams:
        streams.device(8)
        raise LookupError


def test_an_error_of_the_body_is_not_hidden_by_one_of_freeing(runtime: FakeRuntime) -> None:
    runtime.failing["cudaFree"] = "cudaErrorUnknown"
    with pytest.raises(LookupError):
        raise_in_body(CudaStreams())
    assert "cudaFree" in runtime.names()


def failing_work(error: BaseException) -> Callable[[int], None]:
    def work(_: int) -> None:
        raise error

    return work


@pytest.mark.parametrize("end", ["cudaSuccess", "cudaErrorStreamCaptureInvalidated"])
def test_work_that_fails_in_a_capture_ends_it_and_comes_through(
    runtime: FakeRuntime, end: str
) -> None:
    runtime.failing["cudaStreamEndCapture"] = end
    with CudaStreams() as streams:
        stream = streams.new_stream()
        with pytest.raises(KeyboardInterrupt):
            streams.capture(failing_work(KeyboardInterrupt()), stream)
        names = runtime.names()
        assert names[-1] == "cudaGetLastError"
        assert names.count("cudaStreamEndCapture") == 1
        assert names.count("cudaGraphDestroy") == (end == "cudaSuccess")
    assert "cudaGraphExecDestroy" not in runtime.names()
