"""What the pipeline sees of an engine: fixed batches in, outputs out, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engines.errors import EngineError

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


class DeviceRows(Protocol):
    """One batch, or the first rows of one, that lies in the device's memory already."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def copy_to(self, pointer: int, stream: int) -> None:
        """Queue a copy of all rows to device address `pointer` on the CUDA stream `stream`."""


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
    running: deque[Future[Outputs]] = deque()
    try:
        for batch in batches:
            if batch is None:
                while running:
                    yield running.popleft().result()
                continue
            if len(running) > num_workers:
                yield running.popleft().result()
            running.append(pool.submit(run, check_batch(batch, spec)))
        while running:
            yield running.popleft().result()
    finally:
        # Those that compute already still read their batch, which the caller may use again.
        wait([future for future in running if not future.cancel()])
