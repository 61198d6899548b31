"""Streams, events and graphs of a device that is not there: for every order the work may run in.

A device may run queued work at once, late, or anything between, and streams overtake each other.
Here each stream is a queue, and a seeded scheduler decides after every call how many pieces of
work run, and of which streams. So each order comes up sooner or later, a race is a wrong answer
that comes back with the same seed, and a wait that can never end is an error, not a hang. (Threads
with delays, the other way to do this, show few orders, and other ones in each run.)

Device memory is real memory, filled with noise; addresses that were freed or never given fail.
Faults can be asked for: see `Faults`.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engines.errors import CudaError, EngineError
from engines.runner import Array, DeviceRows

Work = Callable[[], None]


@dataclass(kw_only=True)
class Faults:
    """What goes wrong, by name of the call and how often it was called (from 0)."""

    calls: dict[tuple[str, int], EngineError] = field(default_factory=dict)
    """Raised by that call itself."""
    works: set[tuple[str, int]] = field(default_factory=set)
    """Fails when it runs, later: from then on every call raises, as on a device."""


class Mark:
    """What an event stands for at one moment."""

    def __init__(self, *, reached: bool) -> None:
        self.reached = reached


class HostStreams:
    """Implements `engines.slots.Streams` on the CPU; see the module.

    Args:
        seed: Decides the order in which work runs.
        faults: What goes wrong.
        heed_waits: False drops all waits of streams for events: proves that races show.
    """

    compute_capability = (9, 0)

    def __init__(
        self, seed: int = 0, faults: Faults | None = None, *, heed_waits: bool = True
    ) -> None:
        self._random = random.Random(seed)
        self._eagerness = self._random.choice((0.0, 0.3, 0.7, 1.0))
        self._faults = faults or Faults()
        self._heed_waits = heed_waits
        self._queues: dict[int, deque[tuple[str, Work | Mark]]] = {}
        self._marks: dict[int, Mark] = {}
        self._graphs: dict[int, list[tuple[str, Work]]] = {}
        self._capturing: tuple[int, list[tuple[str, Work]]] | None = None
        self._memory: dict[int, npt.NDArray[np.uint8]] = {}
        self._pinned: list[npt.NDArray[np.uint8]] = []
        self._broken: CudaError | None = None
        self._num_handles = 0
        self._num_works: Counter[str] = Counter()
        self.num_calls: Counter[str] = Counter()

    def __enter__(self) -> HostStreams:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.num_pending == 0, "memory is freed that work in flight uses"
        self._memory.clear()
        for array in self._pinned:
            array[:] = 0xEE  # who still looks at it sees that it is gone

    @property
    def num_pending(self) -> int:
        """Pieces of work that were queued and did not run."""
        return sum(map(len, self._queues.values()))

    @property
    def num_owned(self) -> int:
        """Blocks of device memory that are allocated."""
        return len(self._memory)

    def new_stream(self) -> int:
        with self._call("new_stream"):
            self._queues[self._handle()] = deque()
        return self._num_handles

    def new_event(self) -> int:
        with self._call("new_event"):
            self._marks[self._handle()] = Mark(reached=True)
        return self._num_handles

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        with self._call("pinned"):
            self._pinned.append(self._noise(num_bytes))
        return self._pinned[-1]

    def device(self, num_bytes: int) -> int:
        with self._call("device"):
            array = self._noise(num_bytes)
            self._memory[array.ctypes.data] = array
        return int(array.ctypes.data)

    def copy_in(self, pointer: int, source: Array, stream: int) -> None:
        target = self.view(pointer, np.dtype(np.uint8), (source.nbytes,))
        given = source.reshape(-1).view(np.uint8)
        with self._call("copy_in"):
            self.enqueue("copy_in", stream, lambda: np.copyto(target, given))

    def copy_out(self, target: Array, pointer: int, stream: int) -> None:
        source = self.view(pointer, np.dtype(np.uint8), (target.nbytes,))
        taken = target.reshape(-1).view(np.uint8)
        with self._call("copy_out"):
            self.enqueue("copy_out", stream, lambda: np.copyto(taken, source))

    def record(self, event: int, stream: int) -> None:
        with self._call("record"):
            mark = self._marks[event] = Mark(reached=False)
            self.enqueue("record", stream, lambda: setattr(mark, "reached", True))

    def wait(self, stream: int, event: int) -> None:
        with self._call("wait"):
            if self._heed_waits:
                self._queues[stream].append(("wait", self._marks[event]))

    def synchronize_event(self, event: int) -> None:
        with self._call("synchronize_event"):
            mark = self._marks[event]
            self._run_until(lambda: mark.reached)

    def synchronize_stream(self, stream: int) -> None:
        with self._call("synchronize_stream"):
            self._run_until(lambda: not self._queues[stream])

    def capture(self, work: Callable[[int], None], stream: int) -> int:
        with self._call("begin_capture"):
            captured: list[tuple[str, Work]] = []
            self._capturing = (stream, captured)
        try:
            work(stream)
        finally:
            self._capturing = None
        with self._call("end_capture"):
            self._graphs[self._handle()] = captured
        return self._num_handles

    def launch(self, graph: int, stream: int) -> None:
        with self._call("launch"):
            for name, work in self._graphs[graph]:
                self.enqueue(name, stream, work)

    def enqueue(self, name: str, stream: int, work: Work) -> None:
        """Queue any work, such as a computation; on a stream that is captured it is recorded."""
        if self._capturing is not None and self._capturing[0] == stream:
            self._capturing[1].append((name, work))
        else:
            self._queues[stream].append((name, work))

    def view(self, pointer: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        """The first bytes of a block of device memory as an array."""
        block = self._memory[pointer]
        return block[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        """What surrounds every call: the fault asked for, and some work that runs meanwhile."""
        if self._capturing is not None:
            raise CudaError(f"{name} while a stream is captured; expected none.")
        count = self.num_calls[name]
        self.num_calls[name] += 1
        self._raise_if_broken()
        if (fault := self._faults.calls.get((name, count))) is not None:
            raise fault
        yield
        if self._random.random() < self._eagerness:
            for _ in range(self._random.randrange(1, 9)):
                self._run_one()
        self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _run_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            self._raise_if_broken()
            if not self._run_one():
                raise AssertionError("the host waits for work that waits for itself")

    def _run_one(self) -> bool:
        """Run one piece of work of some stream that is not waiting; False where all are."""
        ready = [queue for queue in self._queues.values() if queue and is_ready(queue[0][1])]
        if not ready:
            return False
        name, work = self._random.choice(ready).popleft()
        if isinstance(work, Mark):
            return True
        count = self._num_works[name]
        self._num_works[name] += 1
        if (name, count) in self._faults.works:
            self._broken = CudaError(f"{name} failed on the device")
            for queue in self._queues.values():
                queue.clear()
            return True
        work()
        return True

    def _handle(self) -> int:
        self._num_handles += 1
        return self._num_handles

    def _noise(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(bytearray(self._random.randbytes(num_bytes)), np.uint8)


def is_ready(work: Work | Mark) -> bool:
    return not isinstance(work, Mark) or work.reached


class HostDeviceRows(DeviceRows):
    """Rows in device memory, of which the decoder may take the memory back after the batch."""

    def __init__(self, streams: HostStreams, rows: Array) -> None:
        self.shape = rows.shape
        self.dtype = rows.dtype
        self._streams = streams
        self._rows = rows

    def copy_to(self, pointer: int, stream: int) -> None:
        target = self._streams.view(pointer, self.dtype, self.shape)
        rows = self._rows
        self._streams.enqueue("copy_to", stream, lambda: np.copyto(target, rows))

    def __del__(self) -> None:
        self._rows[...] = 77
