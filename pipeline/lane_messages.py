"""What a lane and its process tell each other; light, so that a lane starts before all imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.manifest import StoredEngine
    from pipeline.config import Job
    from pipeline.ledger import CommitRecord
    from pipeline.part import OutputLayout
    from pipeline.report import Ceilings, StageTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSetup:
    """Everything that a lane's process must know; sent once to each process."""

    job: Job
    engine: StoredEngine
    feature_columns: tuple[str, ...]
    num_features: int
    layout: OutputLayout
    run_id: str
    attempt: str
    num_threads: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The lane has measured its limits."""

    ceilings: Ceilings


@dataclass(frozen=True, slots=True)
class Progress:
    """Stage times of this process until now."""

    times: dict[str, StageTimes]


@dataclass(frozen=True, slots=True)
class Committed:
    """A shard's record is in the ledger."""

    record: CommitRecord


@dataclass(frozen=True, slots=True)
class Failed:
    """The lane cannot go on; its process ends."""

    error: Exception


Message = Measured | Progress | Committed | Failed
