"""How many rows a lane takes at once, and how many it may have begun beyond its last commit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from engines.manifest import EngineManifest
from engines.slots import NUM_SLOTS
from pipeline.config import Job
from pipeline.plan import Shard

DecoderKind = Literal["features", "window", "dali", "gpu"]
BLOCK_ROWS: dict[DecoderKind, int] = {"features": 1 << 16, "window": 16, "dali": 64}
"""Rows of a block by default. Features: 8 MiB for 32 of them, a few of which are alive at a time.
Windows: few, so that all cores end the last blocks of a night together. DALI on a CPU: enough to
keep its threads busy, small enough that blocks move soon (16 to 256 measured alike). On a GPU a
block is a batch of the engine."""
QUEUE_DEPTH = 2
"""Blocks that may wait between two stages: enough that neither waits for a slow moment."""
COMMITS_AT_ONCE = 8
"""Of small shards, where each commit waits for a network."""
BLOCKS_AHEAD = 2
"""Blocks for each core that are read or done and wait for their turn."""
BLOCKS_IN_DALI = 2
"""On a GPU: one that is decoded, and one whose images wait for the decoder: it never runs dry."""


def decoder_kind(job: Job, *, on_gpu: bool) -> DecoderKind:
    """What decodes the job's rows in a lane whose engine computes there."""
    if job.input.images is None:
        return "features"
    if on_gpu:
        return "gpu" if job.lanes.gpu_decode.enabled else "dali"
    return job.lanes.cpu_decoder


def block_rows(job: Job, kind: DecoderKind, batch_size: int) -> int:
    """Rows of a block: whole batches, or each would end with a padded one.

    `lanes.block_rows` is taken as it is.
    """
    if kind == "gpu":
        return batch_size
    return job.lanes.block_rows or whole_batches(BLOCK_ROWS[kind], batch_size)


def whole_batches(num_rows: int, batch_size: int) -> int:
    """`num_rows`, rounded up to whole batches."""
    return -(-num_rows // batch_size) * batch_size


def rows_side_by_side(job: Job, shards: Iterable[Shard]) -> int:
    """Rows of small shards that a lane may be committing while it gathers another shard.

    As many as may be lost with that one: together no more than a shard is to have (`shard_rows`).
    """
    return max(0, job.shard_rows - max((shard.num_rows for shard in shards), default=0))


def rows_at_risk(
    job: Job,
    engine: EngineManifest,
    num_threads: int,
    shards: Sequence[Shard],
    *,
    is_far: bool = False,
) -> int:
    """Rows that a lane may have begun and not committed at any moment, at most.

    That is the shard whose parts are being uploaded, where the store is far away also small ones
    beside it, and the blocks behind it: those in work, and those that wait in the queues. What is
    only read is not begun.
    """
    on_gpu = engine.device.kind == "gpu"
    kind = decoder_kind(job, on_gpu=on_gpu)
    depth = job.lanes.queue_depth or QUEUE_DEPTH
    if on_gpu:  # in DALI, between the stages, in the runner's slots and on the way to one
        num_blocks = BLOCKS_IN_DALI + 2 * depth + NUM_SLOTS + 1
    elif kind == "dali":  # the same with the runner's threads
        num_blocks = 1 + 2 * depth + (job.lanes.engine_threads or num_threads) + 2
    else:
        num_blocks = (job.lanes.engine_threads or num_threads) * (1 + BLOCKS_AHEAD) + depth
    largest = max((shard.num_rows for shard in shards), default=0)
    beside = min(rows_side_by_side(job, shards), COMMITS_AT_ONCE * largest) if is_far else 0
    return largest + beside + num_blocks * min(block_rows(job, kind, engine.batch_size), largest)
