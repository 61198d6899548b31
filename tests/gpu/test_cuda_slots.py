"""Slots on a real GPU, without TensorRT: what is computed is a copy from input to output."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from engines.cuda import CudaStreams, device_problem
from engines.errors import CudaError, OutOfDeviceMemoryError
from engines.runner import Array, DeviceRows, TensorSpec
from engines.slots import Addresses, Bind, Compute, Slots
from tests.gpu.device_rows import CudaRows

PROBLEM = device_problem()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or ""),
    pytest.mark.timeout(120),
]

INPUT = TensorSpec(name="x", dtype="uint8", shape=(64, 96, 96, 3))
OUTPUT = TensorSpec(name="y", dtype="uint8", shape=(64, 96, 96, 3))


@pytest.fixture
def streams() -> Iterator[CudaStreams]:
    with CudaStreams() as opened:
        yield opened


def copying(*, stubborn: bool = False) -> Bind:
    """Computes the identity; if stubborn, with a call that no capture allows."""
    from cuda.bindings import runtime

    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def bind(addresses: Addresses) -> Compute:
        def compute(stream: int) -> None:
            target, size = addresses.outputs[0], INPUT.num_bytes
            (error,) = runtime.cudaMemcpyAsync(target, addresses.input, size, kind, stream)
            if stubborn:
                (error,) = runtime.cudaStreamSynchronize(stream)
            if error != runtime.cudaError_t.cudaSuccess:
                raise CudaError(error.name)

        return compute

    return bind


def batches(num_batches: int) -> list[Array]:
    rng = np.random.default_rng(2)
    some = rng.integers(0, 256, (4, *INPUT.shape), dtype=np.uint8)
    return [np.roll(some[number % 4], number) for number in range(num_batches)]


@pytest.mark.parametrize("use_graphs", [True, False], ids=["graphs", "plain"])
def test_host_and_device_batches_come_out_in_order(streams: CudaStreams, use_graphs: bool) -> None:
    slots = Slots(streams, INPUT, (OUTPUT,), copying(), use_graphs=use_graphs)
    assert (slots.graph_refusal is None) == use_graphs
    rows = [
        batch[: 1 + number % 64] if number % 2 else batch
        for number, batch in enumerate(batches(60))
    ]

    def source() -> Iterator[Array | DeviceRows | None]:
        for number, batch in enumerate(rows):
            yield CudaRows(batch) if number % 2 else batch
            if number % 17 == 0:
                yield None

    for (found,), wanted in zip(slots.infer(source()), rows, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_work_that_cannot_be_captured_is_queued_plainly(streams: CudaStreams) -> None:
    slots = Slots(streams, INPUT, (OUTPUT,), copying(stubborn=True))
    assert slots.graph_refusal == "cudaErrorStreamCaptureUnsupported"
    for (found,), wanted in zip(slots.infer(batches(9)), batches(9), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_memory_that_is_not_there_has_its_own_error_and_the_device_works_on(
    streams: CudaStreams,
) -> None:
    with pytest.raises(OutOfDeviceMemoryError, match="cudaMalloc"):
        streams.device(1 << 50)
    slots = Slots(streams, INPUT, (OUTPUT,), copying())
    assert len(list(slots.infer(batches(4)))) == 4


def test_a_call_that_fails_is_named_and_the_device_works_on(streams: CudaStreams) -> None:
    with pytest.raises(CudaError, match=r"cudaMemcpyAsync: cudaErrorInvalidValue"):
        streams.copy_in(8, np.zeros(16, np.uint8), streams.new_stream())
    assert streams.device(16)
