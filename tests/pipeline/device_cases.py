"""Stand-ins for a GPU: rows "on a device", and a runner that takes them."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from engines.runner import DeviceRows, Outputs, TensorSpec
from pipeline.blocks import Array

STREAM = 77


class HostRows:
    """Rows that only `copy_to` can reach, as those on a device."""

    def __init__(self, rows: Array) -> None:
        self._rows = np.ascontiguousarray(rows)
        self.shape = rows.shape
        self.dtype = rows.dtype

    def copy_to(self, pointer: int, stream: int) -> None:
        assert stream == STREAM
        ctypes.memmove(pointer, self._rows.ctypes.data, self._rows.nbytes)


class SlotRunner:
    """Sums each row in slots of fixed memory, three batches in flight, as runners on a GPU do.

    The copy out of a device block is made as late as can be: rows that nobody keeps are gone then.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str = "uint8") -> None:
        self.batch_size = shape[0]
        self.input = TensorSpec(name="x", dtype=dtype, shape=shape)
        self.outputs = (TensorSpec(name="score", dtype="float32", shape=(shape[0], 1)),)
        self.kinds: list[str] = []
        self._slot = np.full(shape, 99, dtype)

    def __enter__(self) -> SlotRunner:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def infer(self, batches: Iterable[Array | DeviceRows | None]) -> Iterator[Outputs]:
        in_flight: deque[Any] = deque()
        for batch in batches:
            if batch is not None:
                on_device = not isinstance(batch, np.ndarray)
                self.kinds.append("device" if on_device else "host")
                assert on_device or batch.shape == self.input.shape
                assert batch.shape[1:] == self.input.shape[1:]
                assert batch.dtype == self.input.dtype
                in_flight.append(batch)
            while len(in_flight) > (0 if batch is None else 3):
                yield self._score(in_flight.popleft())
        while in_flight:
            yield self._score(in_flight.popleft())

    def _score(self, batch: Any) -> Outputs:
        if isinstance(batch, np.ndarray):
            self._slot[...] = batch
        else:
            batch.copy_to(self._slot.ctypes.data, STREAM)
        rows = self._slot.reshape(self.batch_size, -1)
        return (rows.sum(axis=1, dtype=np.float32, keepdims=True),)
