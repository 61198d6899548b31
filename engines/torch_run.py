"""torch: runs an exported program, on the CPU one single-threaded call on each core."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from engines.model import shown
from engines.runner import Array, Outputs, TensorSpec, check_batch
from engines.torch_program import load_program, quiet

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchMode:
    """How a program is run."""

    device: Literal["cpu", "cuda"] = "cpu"
    is_compiled: bool = True
    """By torch.compile; where there is no compiler it is run eagerly, with a warning."""
    is_channels_last: bool = True
    """Images and convolution weights in memory as NHWC, as the rows come; otherwise as NCHW."""


class TorchRunner:
    """Runs a program of `engines.torch_program.save_program`.

    On the CPU whole batches run in parallel, each on one thread, as with ONNX Runtime: faster than
    parallel operators, above all when something else is at work on the machine. The process-wide
    number of torch's threads becomes 1.

    Args:
        program: The archive (`.pt2`).
        input: The program's input.
        outputs: Outputs that are wanted, by the program's names.
        num_threads: Batches that may be computed at once on the CPU.
        mode: How it is run.
    """

    def __init__(
        self,
        program: Path,
        input: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        num_threads: int,
        mode: TorchMode,
    ) -> None:
        self.batch_size = input.shape[0]
        self.input = input
        self.outputs = outputs
        self.fallback: str | None = None
        """Why the program is run eagerly although it should be compiled; known once entered."""
        self._program = program
        self._num_threads = num_threads
        self._mode = mode

    def __enter__(self) -> TorchRunner:
        import torch

        module = load_program(self._program).to(self._mode.device)
        if self._mode.is_channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fallback = None
        if self._mode.is_compiled:
            try:
                with quiet():
                    # Freezing folds batch norms into convolutions and packs the weights.
                    compiled = torch.compile(module, dynamic=False, options={"freezing": True})
                    self._place = self._warmed_up(compiled)
                return self
            except Exception as error:  # a tool chain of C++ or Triton may fail in its own way
                self.fallback = shown(error)
                log.warning("torch.compile: %s; the program is run eagerly.", self.fallback)
        self._place = self._warmed_up(module)
        return self

    def _warmed_up(self, module: Callable[..., Any]) -> _Place:
        names = tuple(output.name for output in self.outputs)
        place: _Place
        if self._mode.device == "cuda":
            from engines.torch_cuda import CudaSlots

            place = CudaSlots(module, self.input, names)
        else:
            is_nchw = len(self.input.shape) == 4 and not self._mode.is_channels_last
            place = _Workers(module, names, self._num_threads, is_nchw=is_nchw)
        try:
            place.start(np.zeros(self.input.shape, self.input.dtype)).result()
        except BaseException:
            place.close()
            raise
        return place

    def __exit__(self, *_: object) -> None:
        self._place.close()
        del self._place

    def infer(self, batches: Iterable[Array | None]) -> Iterator[Outputs]:
        """See `engines.runner.Runner.infer`."""
        running: deque[InFlight] = deque()
        try:
            for batch in batches:
                if batch is None:
                    while running:
                        yield running.popleft().result()
                    continue
                if len(running) >= self._place.depth:
                    yield running.popleft().result()
                running.append(self._place.start(check_batch(batch, self.input)))
            while running:
                yield running.popleft().result()
        finally:
            # Those that compute already still read their batch, which the caller may use again.
            for batch_in_flight in running:
                batch_in_flight.settle()


class InFlight(Protocol):
    """A batch that was started."""

    def result(self) -> Outputs:
        """Wait for it; its outputs, which the caller may keep."""

    def settle(self) -> None:
        """Wait until it reads its input no more; whatever it answers."""


class _Place(Protocol):
    """Where batches are computed."""

    depth: int
    """Batches that may be in flight."""

    def start(self, batch: Array) -> InFlight:
        """Begin with a batch."""

    def close(self) -> None:
        """Free what was taken."""


class _Workers:
    """CPU threads, each computing a batch by itself."""

    def __init__(
        self, module: Callable[..., Any], names: tuple[str, ...], num_threads: int, *, is_nchw: bool
    ) -> None:
        import torch

        self.depth = num_threads + 1  # one more: a worker that is done finds its next batch
        self._module = module
        self._names = names
        self._is_nchw = is_nchw
        self._pool = ThreadPoolExecutor(
            num_threads, "torch", initializer=torch.set_num_threads, initargs=(1,)
        )

    def start(self, batch: Array) -> InFlight:
        return _Future(self._pool.submit(self._run, batch))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, batch: Array) -> Outputs:
        import torch

        rows = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
        if self._is_nchw:  # the program's own permutation then gives planes that lie in memory so
            rows = rows.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        with torch.inference_mode():
            answers = self._module(rows)
        return tuple(answers[name].contiguous().numpy() for name in self._names)


@dataclass(frozen=True, slots=True)
class _Future:
    """A batch of `_Workers`."""

    future: Future[Outputs]

    def result(self) -> Outputs:
        return self.future.result()

    def settle(self) -> None:
        if not self.future.cancel():
            wait([self.future])
