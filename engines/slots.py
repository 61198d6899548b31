"""Slots: a few batches on a device at once, copied in, computed and copied out side by side.

Batch k uses slot k modulo the number of slots. Each slot has pinned host memory and device memory
of its own; three streams, joined by events, keep the copy engines and the processors busy together:

    copy in   | k+1   | k+2   |
    compute   | k     | k+1   |
    copy out  | k-1   | k     |

The host waits for a slot's last event before it fills the slot again: that one wait protects all
of its memory. Source of the pattern: NVIDIA's LWIS harness in MLPerf inference, which also has
buffers for each copy; trtexec's double events over one buffer are right for benchmarks only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engines.errors import EngineError
from engines.runner import Array, DeviceRows, Outputs, TensorSpec, check_batch

NUM_SLOTS = 3
"""One is copied in, one computes, one is copied out."""


class Streams(Protocol):
    """Memory, streams, events and graphs of one device; their owner frees them.

    Handles and device addresses are integers. Every call may raise CudaError, also for work that
    was queued before it; allocations may raise OutOfDeviceMemoryError.
    """

    def new_stream(self) -> int:
        """A queue of work, in order; streams run side by side."""

    def new_event(self) -> int:
        """A mark that can be set in one stream and waited for in another, or by the host."""

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Host memory that the device copies from and to by itself; not initialised."""

    def device(self, num_bytes: int) -> int:
        """Address of device memory, aligned to 256 bytes; not initialised."""

    def copy_in(self, pointer: int, source: Array, stream: int) -> None:
        """Queue a copy of pinned memory to the device."""

    def copy_out(self, target: Array, pointer: int, stream: int) -> None:
        """Queue a copy of device memory to pinned memory."""

    def record(self, event: int, stream: int) -> None:
        """Queue setting the mark; it replaces what the event marked before."""

    def wait(self, stream: int, event: int) -> None:
        """Queue a wait for what the event marks now."""

    def synchronize_event(self, event: int) -> None:
        """Let the host wait for what the event marks now."""

    def synchronize_stream(self, stream: int) -> None:
        """Let the host wait for all that was queued."""

    def capture(self, work: Callable[[int], None], stream: int) -> int:
        """A graph of what `work` queues on `stream`, which does not run yet.

        On any error the stream is as before, and the error comes through.
        """

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Device memory of one slot; it stays where it is."""

    input: int
    outputs: tuple[int, ...]
    """In the order of the runner's outputs."""


Compute = Callable[[int], None]
"""Queues one batch's work on the stream with this handle; raises EngineError if it cannot."""
Bind = Callable[[Addresses], Compute]
"""Makes what computes from and to a slot's memory; called once for each slot."""


@dataclass(kw_only=True, slots=True)
class _Slot:
    host_input: Array
    host_outputs: tuple[Array, ...]
    addresses: Addresses
    compute: Compute
    copied_in: int
    computed: int
    copied_out: int
    graph: int | None = None
    num_rows: int = 0
    batch: Array | DeviceRows | None = None
    """Kept until its outputs have come out: a device may still be reading it."""


class Slots:
    """Preallocated slots of one engine; what computes is given.

    Made by allocating everything and running each slot once on zeros, so that engines load lazily
    loaded kernels before a graph is captured, and later batches allocate nothing.

    Args:
        streams: Open; frees all when left.
        input: One input, batch first.
        outputs: What is copied out, batch first.
        bind: See `Bind`.
        use_graphs: Capture each slot's work as a graph; without, it is queued anew each time.
    """

    def __init__(
        self,
        streams: Streams,
        input: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        bind: Bind,
        *,
        use_graphs: bool = True,
    ) -> None:
        self._streams = streams
        self._input = input
        self._outputs = outputs
        self._copy_in = streams.new_stream()
        self._compute = streams.new_stream()
        self._copy_out = streams.new_stream()
        self._slots = [self._new_slot(bind) for _ in range(NUM_SLOTS)]
        self._busy = False
        self._closed = False
        self.graph_refusal: str | None = "graphs were not asked for"
        """Why work is queued anew for each batch; None where graphs are launched."""
        for slot in self._slots:
            self._warm_up(slot)
        if use_graphs:
            self.graph_refusal = self._capture()

    def close(self) -> None:
        """To be called before memory is freed: a stream that is still open then leaves it alone."""
        self._closed = True

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        """See `engines.runner.Runner.infer`.

        A batch in device memory may have fewer rows than the engine; so have its outputs then.
        Whatever ends the stream, nothing is left running on the device.

        Raises:
            EngineError: A batch is not what the engine takes, or another stream is open.
            CudaError: Now or in work queued before.
        """
        if self._busy:
            raise EngineError("engine: a stream is open; expected one at a time. Close the first.")
        self._busy = True
        try:
            yield from self._flow(batches)
        except GeneratorExit:
            self._settle()
            raise
        except BaseException as error:
            try:
                self._settle()
            except EngineError as second:
                error.add_note(f"and then: {second}")
            raise
        finally:
            self._busy = False

    def _flow(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        idle = deque(self._slots)
        running: deque[_Slot] = deque()
        for batch in batches:
            if batch is None:
                while running:
                    yield self._finish(running, idle)
                continue
            if not idle:
                yield self._finish(running, idle)
            self._start(idle[0], batch)
            running.append(idle.popleft())
        while running:
            yield self._finish(running, idle)

    def _start(self, slot: _Slot, batch: Array | DeviceRows) -> None:
        self._check_open()
        streams = self._streams
        slot.batch = batch
        slot.num_rows = batch.shape[0] if batch.shape else 0
        if isinstance(batch, np.ndarray):
            np.copyto(slot.host_input, check_batch(batch, self._input))
            streams.copy_in(slot.addresses.input, slot.host_input, self._copy_in)
        else:
            check_device_rows(batch, self._input)
            batch.copy_to(slot.addresses.input, self._copy_in)
        streams.record(slot.copied_in, self._copy_in)
        streams.wait(self._compute, slot.copied_in)
        if slot.graph is None:
            slot.compute(self._compute)
        else:
            streams.launch(slot.graph, self._compute)
        streams.record(slot.computed, self._compute)
        streams.wait(self._copy_out, slot.computed)
        for host, address in zip(slot.host_outputs, slot.addresses.outputs, strict=True):
            streams.copy_out(host, address, self._copy_out)
        streams.record(slot.copied_out, self._copy_out)

    def _finish(self, running: deque[_Slot], idle: deque[_Slot]) -> Outputs:
        self._check_open()
        slot = running[0]
        self._streams.synchronize_event(slot.copied_out)
        # Copied: the slot's own memory is used again by its next batch.
        outputs = tuple(host[: slot.num_rows].copy() for host in slot.host_outputs)
        slot.batch = None
        idle.append(running.popleft())
        return outputs

    def _settle(self) -> None:
        """Wait for all that is in flight; the first error is raised once every stream was asked."""
        failures: list[EngineError] = []
        streams = () if self._closed else (self._copy_in, self._compute, self._copy_out)
        for stream in streams:
            try:
                self._streams.synchronize_stream(stream)
            except EngineError as error:
                failures.append(error)
        for slot in self._slots:
            slot.batch = None
        if failures:
            raise failures[0]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("engine: closed; expected open. Read streams to their end before.")

    def _new_slot(self, bind: Bind) -> _Slot:
        streams = self._streams
        addresses = Addresses(
            input=streams.device(self._input.num_bytes),
            outputs=tuple(streams.device(spec.num_bytes) for spec in self._outputs),
        )
        return _Slot(
            host_input=self._pinned(self._input),
            host_outputs=tuple(self._pinned(spec) for spec in self._outputs),
            addresses=addresses,
            compute=bind(addresses),
            copied_in=streams.new_event(),
            computed=streams.new_event(),
            copied_out=streams.new_event(),
        )

    def _pinned(self, spec: TensorSpec) -> Array:
        memory: npt.NDArray[Any] = self._streams.pinned(spec.num_bytes)
        return memory.view(spec.dtype).reshape(spec.shape)

    def _warm_up(self, slot: _Slot) -> None:
        slot.host_input[...] = 0
        self._streams.copy_in(slot.addresses.input, slot.host_input, self._compute)
        slot.compute(self._compute)
        self._streams.synchronize_stream(self._compute)

    def _capture(self) -> str | None:
        """Capture all slots; or none of them, and say why."""
        try:
            for slot in self._slots:
                slot.graph = self._streams.capture(slot.compute, self._compute)
        except EngineError as error:
            for slot in self._slots:
                slot.graph = None
            self._warm_up(self._slots[0])  # if that fails too, it was not the capture
            return str(error)
        return None


def check_device_rows(rows: DeviceRows, spec: TensorSpec) -> None:
    """EngineError unless these are 1 to all rows of what the engine takes: our own defect."""
    most = spec.shape[0]
    fits = len(rows.shape) == len(spec.shape) and 1 <= rows.shape[0] <= most
    if not fits or rows.shape[1:] != spec.shape[1:] or rows.dtype != np.dtype(spec.dtype):
        raise EngineError(
            f"engine input {spec.name}: {rows.dtype} {rows.shape} in device memory; expected "
            f"{spec.dtype} {spec.shape} with 1 to {most} rows. Cut larger batches."
        )
