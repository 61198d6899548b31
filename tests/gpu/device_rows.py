"""Rows in the memory of a real GPU, as a decoder there would hand them over."""

from __future__ import annotations

from cuda.bindings import runtime

from engines.runner import Array, DeviceRows


class CudaRows(DeviceRows):
    """A copy of `rows` on the device, freed when nobody holds it: a reader must, for that long."""

    def __init__(self, rows: Array) -> None:
        self.shape = rows.shape
        self.dtype = rows.dtype
        self._num_bytes = rows.nbytes
        error, self._pointer = runtime.cudaMalloc(rows.nbytes)
        assert error == runtime.cudaError_t.cudaSuccess
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        (error,) = runtime.cudaMemcpy(self._pointer, rows.ctypes.data, rows.nbytes, kind)
        assert error == runtime.cudaError_t.cudaSuccess

    def copy_to(self, pointer: int, stream: int) -> None:
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        (error,) = runtime.cudaMemcpyAsync(pointer, self._pointer, self._num_bytes, kind, stream)
        assert error == runtime.cudaError_t.cudaSuccess

    def __del__(self) -> None:
        runtime.cudaFree(self._pointer)
