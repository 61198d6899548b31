"""Slots in every order that a device may work in, and with every call failing in turn."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import cast

import numpy as np
import pytest

from engines.errors import CudaError, EngineError, OutOfDeviceMemoryError
from engines.runner import Array, DeviceRows, Outputs, TensorSpec
from engines.slots import Addresses, Bind, Compute, Slots
from tests.engines.host_streams import Faults, HostDeviceRows, HostStreams

BATCH = 4
INPUT = TensorSpec(name="x", dtype="uint8", shape=(BATCH, 3))
OUTPUTS = (
    TensorSpec(name="sums", dtype="float32", shape=(BATCH, 2)),
    TensorSpec(name="best", dtype="int64", shape=(BATCH,)),
)
SEEDS = range(40)
CALLS = "copy_in wait record launch copy_out synchronize_event".split()
ALLOCATIONS = "new_stream new_event pinned device".split()


def model(rows: Array) -> Outputs:
    sums = rows.astype(np.float32).sum(1)
    return np.stack([sums, -2 * sums], 1).astype(np.float32), rows.argmax(1).astype(np.int64)


def binding(streams: HostStreams) -> Bind:
    """Computes in two steps through scratch memory that all slots share, as TensorRT does."""
    scratch = streams.device(BATCH * 3)

    def bind(addresses: Addresses) -> Compute:
        source = streams.view(addresses.input, np.dtype(np.uint8), INPUT.shape)
        middle = streams.view(scratch, np.dtype(np.uint8), INPUT.shape)
        targets = [
            streams.view(pointer, np.dtype(spec.dtype), spec.shape)
            for pointer, spec in zip(addresses.outputs, OUTPUTS, strict=True)
        ]

        def second() -> None:
            for target, array in zip(targets, model(middle), strict=True):
                np.copyto(target, array)

        def compute(stream: int) -> None:
            streams.enqueue("compute", stream, lambda: np.copyto(middle, source))
            streams.enqueue("compute", stream, second)

        return compute

    return bind


def make(streams: HostStreams, *, use_graphs: bool = True) -> Slots:
    return Slots(streams, INPUT, OUTPUTS, binding(streams), use_graphs=use_graphs)


def batches(num_batches: int, seed: int = 1) -> list[Array]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (num_batches, *INPUT.shape), dtype=np.uint8))


def stream(slots: Slots, source: Iterable[Array | DeviceRows | None]) -> Generator[Outputs]:
    return cast("Generator[Outputs]", slots.infer(source))


def check(found: Iterable[Outputs], expected: Iterable[Array]) -> None:
    for outputs, rows in zip(found, expected, strict=True):
        for array, wanted in zip(outputs, model(rows), strict=True):
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array, wanted)


@pytest.fixture(params=[True, False], ids=["graphs", "plain"])
def use_graphs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_every_order_of_work_gives_the_same_answers(use_graphs: bool) -> None:
    for seed in SEEDS:
        with HostStreams(seed) as streams:
            slots = make(streams, use_graphs=use_graphs)
            check(slots.infer(batches(17)), batches(17))
            assert (streams.num_calls["launch"] == 17) == use_graphs
            assert (slots.graph_refusal is None) == use_graphs


def test_without_the_waits_between_streams_answers_are_wrong() -> None:
    """The suite's own proof: these streams do show races."""
    wrong = 0
    for seed in SEEDS:
        streams = HostStreams(seed, heed_waits=False)
        slots = make(streams)
        try:
            check(slots.infer(batches(17)), batches(17))
        except AssertionError:
            wrong += 1
    assert wrong > len(SEEDS) / 2


def test_a_slot_refilled_before_its_outputs_are_out_gives_wrong_answers() -> None:
    """And that the host's one wait is needed: here it is left out."""

    class Impatient(HostStreams):
        def synchronize_event(self, event: int) -> None:
            del event

    wrong = 0
    for seed in SEEDS:
        slots = make(Impatient(seed))
        try:
            check(slots.infer(batches(17)), batches(17))
        except AssertionError:
            wrong += 1
    assert wrong > len(SEEDS) / 2


def test_more_than_one_batch_is_in_flight() -> None:
    most = 0
    with HostStreams(3) as streams:
        slots = make(streams)

        def source() -> Iterator[Array]:
            nonlocal most
            for number, batch in enumerate(batches(9)):
                most = max(most, number + 1 - num_out)
                yield batch

        num_out = 0
        for _ in slots.infer(source()):
            num_out += 1
    assert most == 4  # three in slots, one drawn


def test_rows_in_device_memory_go_into_the_slot_without_the_host(use_graphs: bool) -> None:
    for seed in SEEDS:
        with HostStreams(seed) as streams:
            slots = make(streams, use_graphs=use_graphs)
            copied_before = streams.num_calls["copy_in"]
            rows = [batch[: 1 + number % BATCH] for number, batch in enumerate(batches(11))]
            source = (HostDeviceRows(streams, batch.copy()) for batch in rows)
            check(slots.infer(source), rows)
            assert streams.num_calls["copy_in"] == copied_before


def test_rows_in_device_memory_live_until_they_are_read_and_no_longer() -> None:
    """HostDeviceRows overwrites its memory when nobody holds it: a kept reference matters."""
    given: list[weakref.ref[HostDeviceRows]] = []

    def source(streams: HostStreams) -> Iterator[DeviceRows]:
        for batch in batches(8):
            rows = HostDeviceRows(streams, batch.copy())
            given.append(weakref.ref(rows))
            yield rows
            del rows

    for seed in SEEDS:
        with HostStreams(seed) as streams:
            slots = make(streams)
            check(slots.infer(source(streams)), batches(8))
            assert all(reference() is None for reference in given)


def test_host_and_device_batches_may_alternate() -> None:
    for seed in SEEDS:
        with HostStreams(seed) as streams:
            slots = make(streams)
            rows = batches(10)
            source: list[Array | DeviceRows] = [
                HostDeviceRows(streams, batch.copy()) if number % 2 else batch
                for number, batch in enumerate(rows)
            ]
            check(slots.infer(source), rows)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, 3), "uint8"), ((BATCH + 1, 3), "uint8"), ((2, 4), "uint8"), ((2, 3), "int8"), ((), "u1")],
)
def test_device_rows_of_another_kind_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with HostStreams() as streams:
        slots = make(streams)
        wrong = HostDeviceRows(streams, np.zeros(shape, dtype))
        with pytest.raises(EngineError, match=r"in device memory; expected uint8 \(4, 3\)"):
            list(slots.infer([*batches(2), wrong]))
        assert streams.num_pending == 0
        check(slots.infer(batches(4)), batches(4))


@pytest.mark.parametrize(
    "wrong", [np.zeros((3, 3), np.uint8), np.zeros((BATCH, 3), np.int8)], ids=["rows", "dtype"]
)
def test_host_batches_must_be_full_and_of_the_inputs_type(wrong: Array) -> None:
    with HostStreams() as streams:
        slots = make(streams)
        with pytest.raises(EngineError, match=r"expected uint8 \(4, 3\). Pad"):
            list(slots.infer([*batches(2), wrong]))
        check(slots.infer(batches(4)), batches(4))


def test_none_brings_out_all_in_flight_before_the_next_batch_is_asked_for() -> None:
    events: list[str] = []

    def source() -> Iterator[Array | None]:
        for number, batch in enumerate(batches(5)):
            events.append(f"in {number}")
            yield batch
            if number in (1, 2):
                yield None

    with HostStreams() as streams:
        slots = make(streams)
        for number, _ in enumerate(slots.infer(source())):
            events.append(f"out {number}")
        assert list(slots.infer([None, None])) == []
        assert list(slots.infer([])) == []
    assert events.index("out 1") < events.index("in 2")
    assert events.index("out 2") < events.index("in 3")


def test_outputs_stay_as_they_were_when_later_batches_run() -> None:
    with HostStreams() as streams:
        slots = make(streams)
        first, *_ = slots.infer(batches(9))
        list(slots.infer(batches(9, seed=2)))
    check([first], batches(1))


def test_a_batch_may_change_as_soon_as_the_next_is_drawn() -> None:
    """More than the contract asks for: slots take a host batch over at once."""
    buffer = np.zeros(INPUT.shape, np.uint8)

    def source() -> Iterator[Array]:
        for batch in batches(9):
            buffer[:] = batch
            yield buffer

    for seed in SEEDS:
        with HostStreams(seed) as streams:
            check(make(streams).infer(source()), batches(9))


def test_an_early_close_leaves_nothing_running_and_slots_work_on(use_graphs: bool) -> None:
    for seed in SEEDS:
        with HostStreams(seed) as streams:
            slots = make(streams, use_graphs=use_graphs)
            for num_taken in range(4):
                with closing(stream(slots, batches(9))) as outputs:
                    for _ in range(num_taken):
                        next(outputs)
                assert streams.num_pending == 0
                check(slots.infer(batches(5)), batches(5))


def test_an_error_of_the_source_comes_through_unchanged() -> None:
    def source() -> Iterator[Array]:
        yield from batches(2)
        raise LookupError("the decoder lost its way")

    for seed in SEEDS:
        with HostStreams(seed) as streams:
            slots = make(streams)
            with pytest.raises(LookupError, match="lost its way"):
                list(slots.infer(source()))
            assert streams.num_pending == 0
            check(slots.infer(batches(3)), batches(3))


def test_a_second_stream_while_one_is_open_is_refused() -> None:
    with HostStreams() as streams:
        slots = make(streams)
        with closing(stream(slots, batches(5))) as outputs:
            check([next(outputs)], batches(1))
            with pytest.raises(EngineError, match="a stream is open"):
                next(slots.infer(batches(1)))
            check(outputs, batches(5)[1:])
        check(slots.infer(batches(3)), batches(3))


@pytest.mark.parametrize("call", ["begin_capture", "end_capture"])
@pytest.mark.parametrize("slot", [0, 2])
def test_a_capture_that_fails_is_told_and_work_is_queued_plainly(call: str, slot: int) -> None:
    faults = Faults(calls={(call, slot): CudaError("capture invalidated")})
    for seed in SEEDS:
        with HostStreams(seed, faults) as streams:
            slots = make(streams)
            assert slots.graph_refusal == "capture invalidated"
            check(slots.infer(batches(9)), batches(9))
            assert streams.num_calls["launch"] == 0


def test_work_that_cannot_be_captured_runs_plainly() -> None:
    with HostStreams() as streams:
        inner = binding(streams)

        def bind(addresses: Addresses) -> Compute:
            compute = inner(addresses)

            def stubborn(number: int) -> None:
                if streams._capturing is not None:
                    raise EngineError("this model synchronises")
                compute(number)

            return stubborn

        slots = Slots(streams, INPUT, OUTPUTS, bind)
        assert slots.graph_refusal == "this model synchronises"
        check(slots.infer(batches(5)), batches(5))


def test_a_first_run_that_fails_is_an_error_not_a_missing_graph() -> None:
    faults = Faults(works={("compute", 1)})
    with HostStreams(5, faults) as streams, pytest.raises(CudaError, match="failed on the device"):
        make(streams)


@pytest.mark.parametrize("call", ALLOCATIONS)
def test_every_allocation_that_fails_comes_out_as_itself(call: str) -> None:
    with HostStreams() as streams:
        make(streams)
    for number in range(streams.num_calls[call]):
        error = OutOfDeviceMemoryError("no memory is left")
        with HostStreams(number, Faults(calls={(call, number): error})) as failing:
            with pytest.raises(OutOfDeviceMemoryError) as caught:
                make(failing)
            assert caught.value is error


def calls_of_a_run(**options: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Calls after the slots are made, and after a run of 7 batches."""
    with HostStreams() as streams:
        slots = make(streams, **options)
        before = dict(streams.num_calls)
        list(slots.infer(batches(7)))
        return before, dict(streams.num_calls)


@pytest.mark.parametrize("call", CALLS)
def test_every_call_that_fails_surfaces_and_leaves_nothing_running(call: str) -> None:
    before, after = calls_of_a_run()
    numbers = range(before.get(call, 0), after[call])
    assert len(numbers) >= 7
    for number in numbers:
        for seed in (number, number + 100):
            error = CudaError(f"{call} number {number}")
            with HostStreams(seed, Faults(calls={(call, number): error})) as streams:
                slots = make(streams)
                with pytest.raises(CudaError) as caught:
                    list(slots.infer(batches(7)))
                assert caught.value is error
                assert streams.num_pending == 0
                check(slots.infer(batches(4)), batches(4))


@pytest.mark.parametrize("work", ["copy_in", "compute", "copy_out"])
def test_work_that_fails_on_the_device_surfaces_and_no_wrong_answer_comes_out(work: str) -> None:
    for seed in SEEDS:
        streams = HostStreams(seed, Faults(works={(work, 9)}))
        slots = make(streams)
        found: list[Outputs] = []
        with streams, pytest.raises(CudaError, match="failed on the device"):
            found.extend(slots.infer(batches(12)))
        assert len(found) < 12
        check(found, batches(12)[: len(found)])


def test_an_error_while_closing_early_is_raised() -> None:
    _, after = calls_of_a_run()
    settling = ("synchronize_stream", after["synchronize_stream"])
    with HostStreams(0, Faults(calls={settling: CudaError("device lost")})) as streams:
        outputs = stream(make(streams), batches(7))
        next(outputs)
        with pytest.raises(CudaError, match="device lost"):
            outputs.close()
        for known in (1, 2, 3):
            streams.synchronize_stream(known)


def test_an_error_while_settling_does_not_hide_the_first() -> None:
    def source() -> Iterator[Array]:
        yield from batches(2)
        raise LookupError("the decoder lost its way")

    _, after = calls_of_a_run()
    settling = ("synchronize_stream", after["synchronize_stream"])
    with HostStreams(0, Faults(calls={settling: CudaError("device lost")})) as streams:
        with pytest.raises(LookupError, match="lost its way") as caught:
            list(make(streams).infer(source()))
        assert caught.value.__notes__ == ["and then: device lost"]
        for known in (1, 2, 3):
            streams.synchronize_stream(known)


@pytest.mark.parametrize(
    "read", [lambda s: s.copy_in(7, np.zeros(3, np.uint8), 1), lambda s: s.view(7, np.uint8, (1,))]
)
def test_addresses_that_were_never_given_fail(read: Callable[[HostStreams], object]) -> None:
    with pytest.raises(KeyError):
        read(HostStreams())
