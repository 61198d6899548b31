"""Blocks through fixed batches and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from device_cases import HostRows, SlotRunner
from pipeline_cases import SumRunner

from pipeline.blocks import BadRow, DecodedBlock, pad
from pipeline.infer import infer_blocks


def block(num_rows: int, first: int = 0) -> DecodedBlock:
    values = np.arange(first, first + num_rows, dtype=np.float32)
    return DecodedBlock(
        shard=None,  # type: ignore[arg-type]
        first_row=first,
        passthrough=pa.RecordBatch.from_pydict({"id": pa.array(range(first, first + num_rows))}),
        inputs=np.stack([values, values], axis=1),
        bad_rows={},
    )


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_outputs_come_back_in_order_and_without_padding(batch_size: int) -> None:
    runner = SumRunner(batch_size)
    sizes = [4, 1, 9, 3, 8]
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    blocks = [block(size, first) for size, first in zip(sizes, firsts, strict=True)]
    scored = list(infer_blocks(blocks, runner))
    assert [result.num_rows for result in scored] == sizes
    for result in scored:
        (outputs,) = result.outputs
        assert outputs[:, 0].tolist() == [2 * row for row in result.passthrough["id"].to_pylist()]
    assert runner.num_batches == sum(-(-size // batch_size) for size in sizes)


def test_the_bad_rows_go_with_their_block() -> None:
    bad = {1: BadRow(stage="decode", reason="r", message="m", sha256="")}
    decoded = block(3)
    marked = DecodedBlock(
        shard=decoded.shard,
        first_row=7,
        passthrough=decoded.passthrough,
        inputs=decoded.inputs,
        bad_rows=bad,
    )
    (scored,) = infer_blocks([marked], SumRunner())
    assert (scored.first_row, scored.bad_rows, scored.num_rows) == (7, bad, 3)


def test_none_brings_out_what_is_in_flight_before_more_is_asked_for() -> None:
    seen: list[int] = []
    asked: list[str] = []

    def blocks() -> Iterator[DecodedBlock | None]:
        yield block(3)
        yield None
        asked.append(f"second after {seen}")
        yield block(4, 3)
        yield None
        asked.append(f"end after {seen}")

    for scored in infer_blocks(blocks(), SumRunner()):
        seen.append(scored.num_rows)
    assert asked == ["second after [3]", "end after [3, 4]"]


def test_no_blocks_give_no_outputs() -> None:
    assert list(infer_blocks([], SumRunner())) == []
    assert list(infer_blocks([None, None], SumRunner())) == []


def test_an_error_before_the_engine_comes_through() -> None:
    def blocks() -> Iterator[DecodedBlock]:
        yield block(2)
        raise OSError("torn")

    with pytest.raises(OSError, match="torn"):
        list(infer_blocks(blocks(), SumRunner()))


def test_several_outputs_are_kept_apart() -> None:
    class Two(SumRunner):
        def infer(self, batches: Iterable[Any]) -> Iterator[Any]:
            for (total,) in super().infer(batches):
                yield total, -total

    (scored,) = infer_blocks([block(6)], Two())
    assert scored.outputs[0].tolist() == (-scored.outputs[1]).tolist()


def test_padding_adds_zeros_and_copies_only_when_it_must() -> None:
    full = np.ones((4, 2), np.uint8)
    assert pad(full, 4) is full
    padded = pad(full[:1], 3)
    assert padded.dtype == np.uint8
    assert padded.tolist() == [[1, 1], [0, 0], [0, 0]]


def on_device(decoded: DecodedBlock) -> DecodedBlock:
    return dataclasses.replace(decoded, inputs=HostRows(decoded.inputs))  # type: ignore[arg-type]


def test_a_block_on_a_device_is_one_batch_and_its_outputs_are_cut() -> None:
    sizes = [4, 1, 3, 4, 2]
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    runner = SlotRunner((4, 2), "float32")
    blocks = (on_device(block(size, first)) for size, first in zip(sizes, firsts, strict=True))
    scored = list(infer_blocks(blocks, runner))
    assert runner.kinds == ["device"] * 5
    for result, size, first in zip(scored, sizes, firsts, strict=True):
        expected = [2.0 * row for row in range(first, first + size)]
        assert result.outputs[0][:, 0].tolist() == expected


def test_blocks_in_host_memory_may_come_between_those_on_a_device() -> None:
    runner = SlotRunner((4, 2), "float32")
    blocks = [on_device(block(4)), block(9, 4), None, on_device(block(2, 13))]
    scored = list(infer_blocks(blocks, runner))
    assert runner.kinds == ["device", "host", "host", "host", "device"]
    assert np.concatenate([result.outputs[0] for result in scored])[:, 0].tolist() == [
        2.0 * row for row in range(15)
    ]
