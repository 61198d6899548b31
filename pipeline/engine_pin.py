"""Which engines may score a run: one, or one for each kind of device that ask the same question."""

from __future__ import annotations

from dataclasses import dataclass

from engines.build import common_key
from pipeline.config import Job
from pipeline.engine import request_for
from pipeline.lane import LaneDevice


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePin:
    """What binds a run to its engines, from attempt to attempt and from version to version."""

    engine: str
    """Key of the engine that this attempt began with."""
    common: str
    """What it has in common with engines for other devices; see `engines.build.common_key`."""
    has_several: bool
    """Whether such engines score the run, too."""

    @property
    def key(self) -> str:
        """What the run's id covers.

        With several engines it is none of theirs: an attempt that begins on another kind of device
        goes on with the same ledger.
        """
        return self.common if self.has_several else self.engine

    def allows(self, engine: str, common: str) -> bool:
        """Whether rows may stay as another run's engine has scored them.

        Args:
            engine: Key of that engine.
            common: What it has in common with others; empty: unknown.
        """
        return engine == self.engine or (self.has_several and common == self.common)


def common_of(job: Job, num_features: int, device: LaneDevice, fingerprint: str) -> str:
    """`EnginePin.common` for a job; any device will do.

    Args:
        job: As its file says: what a tuning fills in is different from device to device.
        num_features: Of the plan.
        device: Of a lane.
        fingerprint: Of the job's model.
    """
    request = request_for(job, num_features, device.engine_device)
    return common_key(request, fingerprint)
