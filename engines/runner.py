"""What the pipeline sees of an engine: fixed batches in, outputs out, in order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from engines.errors import EngineError, ModelError
from engines.in_order import map_in_order

Array = npt.NDArray[Any]
Outputs = tuple[Array, ...]


LOGITS = "logits"
"""Output that only the gate asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of an engine."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """With the batch first."""

    @property
    def num_bytes(self) -> int:
        """Of a whole batch."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Runner(Protocol):
    """Executes one engine; a context manager that touches the device only once entered."""

    batch_size: int
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]

    def __enter__(self) -> Runner:
        """Load and compile."""

    def __exit__(self, *_: object) -> None:
        """Free the device."""

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        """Run every batch; yield outputs in order, as arrays that the caller may keep.

        Batches are drawn ahead, a few at a time, so that copying and computing overlap. An input
        array must not change until its outputs have come out.

        Args:
            batches: C-contiguous arrays of exactly the input's dtype and shape, or, for a runner on
                a GPU, rows in its memory. None says that no batch is at hand for now: whatever is
                in flight is finished and yielded before the next one is asked for.
        """


class HostRunner(Runner, Protocol):
    """A runner that computes batches in host memory, on the cores of the threads that ask."""

    def run(self, batch: Array) -> Outputs:
        """Compute one batch; as many threads may do so at once as the runner was made for.

        Args:
            batch: As `Runner.infer` takes it; read in place, and not kept.

        Returns:
            Arrays that the caller may keep.
        """


class DeviceRows(Protocol):
    """One batch, or the first rows of one, that lies in the device's memory already."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def copy_to(self, pointer: int, stream: int) -> None:
        """Copy all rows to device address `pointer`, for what follows on the CUDA stream `stream`.

        The copy is queued, or done when this returns.
        """


def check_batch(batch: Array | DeviceRows, spec: TensorSpec) -> Array:
    """`batch`, if it is what the engine takes; EngineError otherwise: that is our own defect."""
    if not isinstance(batch, np.ndarray):
        raise EngineError(
            f"engine input {spec.name}: {batch.shape} in device memory; expected host memory. "
            "Decode on the CPU for an engine of the CPU."
        )
    if batch.shape != spec.shape or batch.dtype != np.dtype(spec.dtype):
        raise EngineError(
            f"engine input {spec.name}: {batch.dtype} {batch.shape}; expected {spec.dtype} "
            f"{spec.shape}. Pad the last batch."
        )
    return np.ascontiguousarray(batch)


def check_answers(outputs: Outputs, specs: Sequence[TensorSpec]) -> None:
    """Look at the shapes of what a batch was answered: some graphs repeat rows, or add them up.

    Raises:
        ModelError: One is not as declared.
    """
    for array, spec in zip(outputs, specs, strict=True):
        if array.shape != spec.shape:
            found, wanted = (" x ".join(f"{n:,}" for n in s) for s in (array.shape, spec.shape))
            raise ModelError(
                f"model output {spec.name}: {found} to a batch of {spec.shape[0]:,} rows; expected "
                f"{wanted}, one answer a row. Export the model with the batch as its first axis, "
                "from the input to the output."
            )


class CoreRunner(ABC):
    """A `HostRunner`, whose batches are each computed by one thread, on one core.

    Batches side by side beat operators side by side: nothing waits for the slowest part of a layer.

    Args:
        graph: What the runtime loads.
        input: The graph's input.
        outputs: The graph's outputs, in order.
        num_threads: Batches that may be computed at once.
    """

    def __init__(
        self, graph: Path, input: TensorSpec, outputs: tuple[TensorSpec, ...], num_threads: int
    ) -> None:
        self.batch_size = input.shape[0]
        self.input = input
        self.outputs = outputs
        self._graph = graph
        self._num_threads = num_threads

    def __enter__(self) -> Self:
        self._open()
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="runner")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._close()

    @abstractmethod
    def _open(self) -> None:
        """Load and compile."""

    @abstractmethod
    def _close(self) -> None:
        """Free what `_open` took."""

    @abstractmethod
    def run(self, batch: Array) -> Outputs:
        """See `HostRunner.run`."""

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        """See `Runner.infer`."""
        return run_ahead(self._pool, self.run, batches, self.input, self._num_threads)


def run_ahead(
    pool: ThreadPoolExecutor,
    run: Callable[[Array], Outputs],
    batches: Iterable[Array | DeviceRows | None],
    spec: TensorSpec,
    num_workers: int,
) -> Iterator[Outputs]:
    """`Runner.infer` for a runtime whose batches are computed by the threads of a pool.

    Args:
        pool: The threads.
        run: Computes one batch.
        batches: See `Runner.infer`.
        spec: The input.
        num_workers: The pool's size; one batch more is drawn, so that a free thread finds work.
    """

    def run_checked(batch: Array | DeviceRows) -> Outputs:
        return run(check_batch(batch, spec))

    source: Iterable[Any] = batches  # a type checker cannot take None out of the union
    with closing(map_in_order(pool, run_checked, source, num_workers + 1)) as in_order:
        for outputs in in_order:
            if outputs is not None:
                yield outputs
