"""What travels between the stages of a lane: blocks of rows of one shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engines.runner import DeviceRows
from pipeline.plan import Shard

Array = npt.NDArray[Any]
Inputs = Array | DeviceRows
"""Rows of the engine's input, in host memory or on the lane's device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """Why a row could not be scored."""

    stage: str
    """Stage that found it: `read`, `screen` or `decode`; `score` if it ended the process."""
    reason: str
    """Short code, for counting."""
    message: str
    """What the decoder said, or what was found."""
    sha256: str
    """Of the row's encoded image or of its features' bytes; empty where there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some consecutive rows as they were read."""

    shard: Shard
    first_row: int
    """Index within the shard of the block's first row."""
    rows: pa.RecordBatch
    """Passthrough columns and what the decoder needs."""
    poison: Mapping[int, BadRow] = field(default_factory=dict)
    """Position in the block -> why it is not tried; its columns for the decoder are null."""

    @property
    def is_last(self) -> bool:
        """Whether no row comes after it that is not lost."""
        return self.first_row + int(self.rows.num_rows) >= self.shard.end_row


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedBlock:
    """The engine's input for a block; bad rows hold a placeholder whose score is never let out."""

    shard: Shard
    first_row: int
    passthrough: pa.RecordBatch
    inputs: Inputs
    """[rows, ...] in the engine's input dtype; on a device at most the rows of one batch."""
    bad_rows: Mapping[int, BadRow]
    """Position in the block -> why."""

    @property
    def num_rows(self) -> int:
        return int(self.passthrough.num_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBlock:
    """The engine's outputs for a block, still with the bad rows' slots."""

    shard: Shard
    first_row: int
    passthrough: pa.RecordBatch
    outputs: tuple[Array, ...]
    bad_rows: Mapping[int, BadRow]

    @property
    def num_rows(self) -> int:
        return int(self.passthrough.num_rows)

    @property
    def is_last(self) -> bool:
        """Whether no row comes after it that is not lost."""
        return self.first_row + self.num_rows >= self.shard.end_row


class Decoder(Protocol):
    """Turns a record batch into the engine's input; one bad row costs one row."""

    columns: tuple[str, ...]
    """Columns that must be read."""
    block_rows: int
    """Most rows that `decode` takes at once."""

    def __enter__(self) -> Self:
        """Load what is needed; nothing is touched before."""

    def __exit__(self, *_: object) -> None:
        """Free it."""

    def decode(self, rows: pa.RecordBatch) -> tuple[Array, dict[int, BadRow]]:
        """One block in host memory, whatever the device.

        Returns:
            The input [rows, ...] and, for each position that holds a placeholder, why.
        """

    def decode_blocks(
        self, blocks: Iterable[pa.RecordBatch | None]
    ) -> Iterator[tuple[Inputs, dict[int, BadRow]] | None]:
        """Decode blocks in order, each to where the engine takes it from.

        A decoder may draw blocks ahead. None says that there is none for now: what is in flight
        is yielded first, then None. By default blocks are decoded one by one.
        """
        for rows in blocks:
            yield None if rows is None else self.decode(rows)


def pad(inputs: Array, num_rows: int) -> Array:
    """`inputs` with zero rows added up to `num_rows`: engines take full batches only."""
    if len(inputs) == num_rows:
        return inputs
    padded = np.zeros((num_rows, *inputs.shape[1:]), inputs.dtype)
    padded[: len(inputs)] = inputs
    return padded
