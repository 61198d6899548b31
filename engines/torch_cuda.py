"""torch on a GPU: a module that computes from and to the memory of slots.

Never executed on a GPU: there was none where it was written, and the torch there was built without
CUDA. What needs neither runs in tests, over streams of the host; `tests/gpu/test_torch.py` is for
a real device.

Streams and torch's memory: all that a module allocates while it computes is allocated with the
slots' one compute stream as the current stream. torch's allocator gives such memory to later work
of that very stream only, so that no kernel still reads what the next one writes. Nothing of it
leaves that stream: outputs are copied into the slot, and it is the slot that is copied out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.cuda import DEVICE, CudaStreams, device_problem
from engines.errors import (
    CudaError,
    EngineCorruptError,
    EngineError,
    OutOfDeviceMemoryError,
)
from engines.model import shown
from engines.runner import TensorSpec
from engines.slots import Addresses, Bind, Compute, Slots
from engines.torch_program import load_program

if TYPE_CHECKING:
    import torch

NO_ROOM_FOR_CUBLAS = "CUBLAS_STATUS_ALLOC_FAILED"
"""In what torch says when cuBLAS finds no memory for its handle: a RuntimeError without a class."""
Module = Callable[..., Any]
"""Takes rows on the device, gives a dict of tensors there."""


class TorchGpu:
    """The GPU that this process sees, as torch sees it; tests have one made of host memory."""

    def load(self, program: Path) -> torch.nn.Module:
        """A program's module with its weights on the device.

        Raises:
            EngineError: There is no GPU, or torch cannot use it.
            EngineCorruptError: See `engines.torch_program.load_program`.
            OutOfDeviceMemoryError: The weights do not fit.
        """
        import torch

        if problem := device_problem():
            raise EngineError(problem)
        if not torch.cuda.is_available():
            raise EngineError(
                f"torch {torch.__version__}: cannot use the GPU (built for CUDA "
                f"{torch.version.cuda}); expected a build for the driver's CUDA. Install one."
            )
        with _own_errors():
            return load_program(program, f"cuda:{DEVICE}")

    def tensor(self, address: int, spec: TensorSpec) -> torch.Tensor:
        """A view of device memory, which stays its owner's."""
        import torch

        return torch.as_tensor(_Memory(address, spec), device=f"cuda:{DEVICE}")

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        """Call `work` with `stream` as torch's current stream."""
        import torch

        cuda: Any = torch.cuda  # its classes have no types
        with _own_errors(), cuda.stream(cuda.ExternalStream(stream, device=DEVICE)):
            work()

    def synchronize(self) -> None:
        """Wait for all that torch has begun, on whatever stream."""
        import torch

        with _own_errors():
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory back to the device that torch keeps for tensors to come."""
        import torch

        gc.collect()  # modules hold themselves in circles
        torch.cuda.empty_cache()


@contextmanager
def open_slots(
    module: Module, input: TensorSpec, outputs: tuple[TensorSpec, ...], gpu: TorchGpu
) -> Iterator[Slots]:
    """Slots whose work is the module's; each ran once on zeros, which compiles what is lazy.

    Work is queued anew for each batch. (A CUDA graph of it would need a memory pool of its own.)

    Raises:
        EngineCorruptError: The module has other outputs.
        OutOfDeviceMemoryError: Slots, or what the module needs to compute, do not fit.
        CudaError: Any other call failed.
    """
    with CudaStreams() as streams, ExitStack() as at_last:
        at_last.callback(gpu.release)
        # Weights are laid out on torch's default stream, for which the slots' streams do not wait.
        gpu.synchronize()
        slots = Slots(
            streams, input, outputs, binding(module, input, outputs, gpu), use_graphs=False
        )
        try:
            yield slots
        finally:
            slots.close()
            del slots, module  # else what they hold on the device could not be given back


def binding(
    module: Module, input: TensorSpec, outputs: tuple[TensorSpec, ...], gpu: TorchGpu
) -> Bind:
    """Lets a module compute from and to a slot's memory; see `engines.slots.Bind`."""

    def bind(addresses: Addresses) -> Compute:
        import torch

        rows = gpu.tensor(addresses.input, input)
        targets = {
            spec.name: gpu.tensor(address, spec)
            for address, spec in zip(addresses.outputs, outputs, strict=True)
        }

        def work() -> None:
            with torch.inference_mode():
                answers = module(rows)
                for name, target in targets.items():
                    _put(name, answers[name], target)

        def compute(stream: int) -> None:
            gpu.queue(stream, work)

        return compute

    return bind


def _put(name: str, answer: torch.Tensor, target: torch.Tensor) -> None:
    found, expected = (answer.dtype, answer.shape), (target.dtype, target.shape)
    if found != expected:  # copying would convert and repeat without a word
        raise EngineCorruptError(
            f"torch program: its {name} is {found[0]} {tuple(found[1])}; expected {expected[0]} "
            f"{tuple(expected[1])}. Build it again with `score engine build --force`."
        )
    target.copy_(answer, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Device memory, described as NumPy, CuPy, Numba and torch have agreed to.

    Source: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """

    address: int
    spec: TensorSpec

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.spec.shape,
            "typestr": np.dtype(self.spec.dtype).str,
            "data": (self.address, False),  # may be written
            "strides": None,
            "version": 3,
        }


@contextmanager
def _own_errors() -> Iterator[None]:
    """Errors of the device as `engines.cuda` would raise them; all others come through."""
    import torch

    try:
        yield
    except RuntimeError as error:  # torch's own are such
        if isinstance(error, torch.OutOfMemoryError) or NO_ROOM_FOR_CUBLAS in str(error):
            raise OutOfDeviceMemoryError(
                f"torch: {shown(error)}; expected room on the device. Use a smaller batch, or "
                "fewer lanes per device."
            ) from error
        if isinstance(error, torch.AcceleratorError):
            raise CudaError(
                f"torch: {shown(error)}; expected success. The device may need a new process; see "
                "the driver's log."
            ) from error
        raise
