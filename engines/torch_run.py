"""torch: runs an exported program, on the CPU one single-threaded call on each core."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engines.model import shown
from engines.runner import Array, DeviceRows, Outputs, TensorSpec, run_ahead
from engines.slots import Slots
from engines.torch_cuda import Module, TorchGpu, open_slots
from engines.torch_program import load_program, quiet

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchMode:
    """How a program is run."""

    device: Literal["cpu", "cuda"] = "cpu"
    is_compiled: bool = True
    """By torch.compile; where there is no compiler it is run eagerly, with a warning."""
    is_channels_last: bool = True
    """Images and convolution weights in memory as NHWC, as the rows come; otherwise as NCHW."""
    is_serial: bool = False
    """On the CPU: one batch after the other, each on all threads, as torch does by itself."""
    allows_tf32: bool = True
    """On a GPU: float32 may be multiplied with 10 bits of mantissa, as torch does convolutions."""


class TorchRunner:
    """Runs a program of `engines.torch_program.save_program`.

    On the CPU whole batches run in parallel, each on one thread, as with ONNX Runtime: faster than
    parallel operators, above all when something else is at work on the machine. The process-wide
    number of torch's threads becomes 1, unless the mode is serial. On a GPU batches go through
    `engines.slots`, and may lie in the device's memory already.

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
        """Load, compile, and run once.

        Raises:
            EngineCorruptError: The file is no such program.
            EngineError: On a GPU: there is none, or one of the errors of `engines.torch_cuda`.
        """
        import torch

        if not self._mode.allows_tf32:  # for all of the process
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        gpu = TorchGpu() if self._mode.device == "cuda" else None
        module = gpu.load(self._program) if gpu else load_program(self._program)
        if self._mode.is_channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fallback = None
        if self._mode.is_compiled:
            try:
                with quiet():
                    # Freezing folds batch norms into convolutions and packs the weights.
                    compiled = torch.compile(module, dynamic=False, options={"freezing": True})
                    self._open(compiled, gpu)
                return self
            except Exception as error:  # a tool chain of C++ or Triton may fail in its own way
                self.fallback = shown(error)
                log.warning("torch.compile: %s; the program is run eagerly.", self.fallback)
        self._open(module, gpu)
        return self

    def _open(self, module: Module, gpu: TorchGpu | None) -> None:
        if len(self.input.shape) == 4 and not self._mode.is_channels_last:
            module = _in_planes(module)
        opened: AbstractContextManager[Slots | _Workers]
        if gpu:
            opened = open_slots(module, self.input, self.outputs, gpu)
        else:
            threads = (1, self._num_threads) if self._mode.is_serial else (self._num_threads, 1)
            opened = _Workers(module, self.input, self.outputs, *threads)
        self._place = opened.__enter__()
        self._opened = opened

    def __exit__(self, *error: Any) -> None:
        del self._place  # first: what it holds on a device is given back now
        self._opened.__exit__(*error)

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        """See `engines.runner.Runner.infer`."""
        return self._place.infer(batches)


def _in_planes(module: Module) -> Module:
    """The program's own permutation then gives planes that lie in memory one after the other."""

    def run(rows: torch.Tensor) -> Any:
        return module(rows.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))

    return run


class _Workers:
    """So many batches at once, each computed by so many threads."""

    def __init__(
        self,
        module: Module,
        input: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        num_batches: int,
        threads_each: int,
    ) -> None:
        self._module = module
        self._input = input
        self._names = tuple(output.name for output in outputs)
        self._num_batches = num_batches
        self._threads_each = threads_each

    def __enter__(self) -> _Workers:
        import torch

        self._pool = ThreadPoolExecutor(
            self._num_batches,
            "torch",
            initializer=torch.set_num_threads,
            initargs=(self._threads_each,),
        )
        try:
            list(self.infer([np.zeros(self._input.shape, self._input.dtype)]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        return run_ahead(self._pool, self._run, batches, self._input, self._num_batches)

    def _run(self, batch: Array) -> Outputs:
        import torch

        rows = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
        with torch.inference_mode():
            answers = self._module(rows)
        return tuple(answers[name].contiguous().numpy() for name in self._names)
