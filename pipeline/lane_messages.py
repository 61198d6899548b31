"""What a lane and its process tell each other; light, so that a lane starts before all imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.manifest import StoredEngine
    from pipeline.config import Job
    from pipeline.ledger import CommitRecord
    from pipeline.part import OutputLayout
    from pipeline.plan import Shard
    from pipeline.report import Ceilings, StageTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """What a process is bound to; the first that it is told."""

    gpu_uuid: str | None
    """The one GPU or slice that it may see; None: it computes on the CPU."""
    cores: frozenset[int]
    """CPU cores that it runs on; empty: any."""
    ahead: tuple[str, ...]
    """Modules to import that it will need, and functions to call, as `module:function`; that takes
    about as long as the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """Consecutive rows that a process was at when it died."""

    shard: Shard
    first_row: int
    """Within the shard."""
    num_rows: int
    is_read: bool = False
    """Whether it was reading the shard that they are of: then each row group is tried alone."""

    def halves(self) -> tuple[Suspect, Suspect]:
        """The first half and the rest."""
        half = self.num_rows // 2
        rest = self.first_row + half
        return (
            Suspect(shard=self.shard, first_row=self.first_row, num_rows=half),
            Suspect(shard=self.shard, first_row=rest, num_rows=self.num_rows - half),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoisonRow:
    """A row that takes its process with it; it goes to quarantine without being tried again."""

    shard: int
    row: int
    """Within the shard."""
    reason: str
    """`crashed`, `hung` or `out_of_memory`."""
    message: str
    """What was seen of it."""
    group_rows: int | None = None
    """Rows of the row group that begins there, if to read it does the harm; None: to score it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchLimits:
    """Beyond these a lane's process is ended."""

    hang_s: float
    """Seconds for some rows, besides `SLOWNESS` times what they should take."""
    rows_per_s: float
    """Of one of the lane's threads, or of its device: by what the engine did when it was built, or
    by what the decoder does, if that is slower and known."""
    max_rss_bytes: int
    patience: float = 1.0
    """Times `hang_s` for rows that are not tried alone; see `pipeline.suspects`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSetup:
    """Everything that a lane's process must know of a run; sent before its shards."""

    job: Job
    engine: StoredEngine
    feature_columns: tuple[str, ...]
    num_features: int
    layout: OutputLayout
    run_id: str
    attempt: str
    num_threads: int
    limits: WatchLimits
    poison: tuple[PoisonRow, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    """To be tried alone, in this order, before anything else."""
    rows_side_by_side: int = 0
    """Rows of shards that may be committed side by side; see `block_size.rows_side_by_side`."""

    @property
    def core_threads(self) -> int | None:
        """Threads that each decode and infer; None where DALI or a GPU has stages of its own."""
        lanes = self.job.lanes
        by_dali = self.job.input.images is not None and lanes.cpu_decoder == "dali"
        if self.engine.manifest.device.kind == "gpu" or by_dali:
            return None
        return lanes.engine_threads or self.num_threads


@dataclass(frozen=True, slots=True)
class Drain:
    """To the process: finish what is in work, begin no other shard, and end."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The lane has measured its limits, before the first row: stages are side by side."""

    ceilings: Ceilings


@dataclass(frozen=True, slots=True)
class Cleared:
    """The next suspect was scored alone."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Stage times of this process until now."""

    times: dict[str, StageTimes]


@dataclass(frozen=True, slots=True)
class Committed:
    """A shard's record is in the ledger."""

    record: CommitRecord


@dataclass(frozen=True, slots=True)
class Finished:
    """All shards of the run that came are done; another run may follow."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The lane cannot go on; its process ends."""

    error: Exception


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """The device serves this process no more, which ends; another one may be served."""

    why: str


Message = Measured | Cleared | Progress | Committed | Finished | Failed | DeviceLost
