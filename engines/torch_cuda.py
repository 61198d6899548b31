"""torch on a GPU: three batches in flight, copied in and out on streams of their own.

Never executed so far: there was no GPU where it was written. `tests/gpu` runs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from engines.runner import Array, Outputs, TensorSpec

NUM_SLOTS = 3
"""One batch is copied in, one is computed, one is copied out."""


class CudaSlots:
    """Runs a module on the GPU that torch sees first.

    Args:
        module: Takes rows in device memory, gives a dict of tensors there.
        input: The module's input.
        names: Outputs that are wanted.
    """

    def __init__(self, module: Callable[..., Any], input: TensorSpec, names: tuple[str, ...]):
        import torch

        self.depth = NUM_SLOTS
        self.module = module
        self.names = names
        cuda: Any = torch.cuda  # its classes have no types
        self.copy_in, self.compute, self.copy_out = (cuda.Stream() for _ in range(3))
        self._slots = deque(_Slot(self, input) for _ in range(NUM_SLOTS))

    def start(self, batch: Array) -> _Slot:
        """Begin with a batch; at most `depth` may be unfinished."""
        slot = self._slots[0]
        self._slots.rotate(-1)
        slot.start(batch)
        return slot

    def close(self) -> None:
        """Wait for the device and let its memory go."""
        import torch

        torch.cuda.synchronize()
        self._slots.clear()
        torch.cuda.empty_cache()


class _Slot:
    """Fixed memory for one batch at a time: pinned rows, rows on the device, pinned answers."""

    def __init__(self, place: CudaSlots, input: TensorSpec) -> None:
        import torch

        self._place = place
        dtype = getattr(torch, input.dtype)
        self._pinned = torch.empty(input.shape, dtype=dtype, pin_memory=True)
        self._rows = torch.empty(input.shape, dtype=dtype, device="cuda")
        self._answers: tuple[Any, ...] = ()
        cuda: Any = torch.cuda
        self._copied_in, self._computed, self._done = (cuda.Event() for _ in range(3))

    def start(self, batch: Array) -> None:
        """Queue copy in, compute and copy out; each stream waits for the one before."""
        import torch

        place = self._place
        self._done.synchronize()  # whoever used the slot before was left without asking
        self._pinned.numpy()[...] = batch
        with torch.inference_mode():
            with torch.cuda.stream(place.copy_in):
                self._rows.copy_(self._pinned, non_blocking=True)
                self._copied_in.record()
            with torch.cuda.stream(place.compute):
                place.compute.wait_event(self._copied_in)
                answers = place.module(self._rows)
                found = [answers[name].contiguous() for name in place.names]
                self._computed.record()
            with torch.cuda.stream(place.copy_out):
                place.copy_out.wait_event(self._computed)
                if not self._answers:
                    self._answers = tuple(
                        torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in found
                    )
                for pinned, tensor in zip(self._answers, found, strict=True):
                    pinned.copy_(tensor, non_blocking=True)
                    # Its memory must not go to the next batch's kernels before it is copied.
                    tensor.record_stream(place.copy_out)
                self._done.record()

    def result(self) -> Outputs:
        """Wait for the batch; its outputs, copied out of the slot."""
        self._done.synchronize()
        return tuple(pinned.numpy().copy() for pinned in self._answers)

    def settle(self) -> None:
        """The rows were copied into the slot already: nothing of the caller's is read."""
