"""The engines of a run on a cluster: one for each kind of device that its lanes turn up with.

What is not in the store is built by a lane of its kind, while lanes of other kinds score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.build import EngineRequest, ResolvedEngine
from engines.devices import Device
from engines.errors import EngineError
from flows.on_ray.desk import Build, Desk, Seat
from pipeline.config import Job
from pipeline.engine import request_for, stored_engine
from pipeline.errors import one_line
from pipeline.plan import Plan
from pipeline.tuning import tuned


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What all engines of a run are made from."""

    plan: Plan
    fingerprint: str
    """Of the model."""
    request: EngineRequest
    """For the device that the run began with."""
    force: bool
    """Whether engines of the store are passed over."""


@dataclass(slots=True, eq=False)
class Kind:
    """A kind of device, and its engine once there is one."""

    name: str
    job: Job
    """With the settings that were tuned for it."""
    builder: str = ""
    """The lane that was asked for the engine."""
    resolved: ResolvedEngine | None = None
    why_not: str = ""
    """Why lanes of this kind have no part in the run; empty: they have."""


class Engines:
    """What each kind of device scores with.

    Args:
        job: As its file says.
        desk: Hands what is asked for to lanes.
    """

    def __init__(self, job: Job, desk: Desk) -> None:
        self._job, self._desk = job, desk
        self._wanted: Wanted | None = None
        self._kinds: dict[str, Kind] = {}
        self._seats: Sequence[Seat] = ()

    def want(self, wanted: Wanted) -> None:
        """From now on the kinds that are there, and those to come, get an engine."""
        self._wanted = wanted

    def kind_of(self, seat: Seat) -> Kind:
        """That of a lane; new kinds are noted as they turn up."""
        device = seat.device.engine_device
        key = str(device.identity)
        if key not in self._kinds:
            self._kinds[key] = Kind(device.name, tuned(self._job, device))
            self._kinds[key].why_not = self._why_not(device)
        return self._kinds[key]

    def _why_not(self, device: Device) -> str:
        first = self._wanted and self._wanted.request.device
        if not first or self._job.lanes.mix_devices or device.identity == first.identity:
            return ""
        return (
            f"the run's engine is for {first.name}, and scores of two engines never meet in it "
            "(lanes.mix_devices)"
        )

    def look(self, seats: Sequence[Seat], built: Sequence[ResolvedEngine]) -> None:
        """Take the engines that came, and ask for those that are missing.

        Args:
            seats: Of all lanes.
            built: Engines that lanes have found or made since the last look.
        """
        self._seats = seats
        if self._wanted is None:
            return
        for resolved in built:
            self._kinds[str(resolved.engine.manifest.device.identity)].resolved = resolved
        able = self._able()
        for lane, seat in able.items():
            kind = self.kind_of(seat)
            if not (kind.resolved or kind.why_not or kind.builder in able):
                build = self._build(self._wanted, kind, seat)
                if not build.force:
                    kind.resolved = stored_engine(build.job, build.request, build.fingerprint)
                if kind.resolved is None:
                    kind.builder = lane  # the first one, or one in the place of one that is gone
                    self._desk.ask(lane, build)

    def _able(self) -> dict[str, Seat]:
        return {seat.lane: seat for seat in self._seats if not (seat.has_left or seat.is_draining)}

    def _build(self, wanted: Wanted, kind: Kind, seat: Seat) -> Build:
        # The builder's own device: a GPU of the same kind has another address.
        request = request_for(kind.job, wanted.plan.num_features, seat.device.engine_device)
        return Build(
            job=kind.job,
            plan=wanted.plan,
            request=request,
            fingerprint=wanted.fingerprint,
            force=wanted.force,
        )

    def first(self) -> ResolvedEngine | None:
        """That of any kind, the earliest that turned up; None: there is none yet."""
        return next((kind.resolved for kind in self._kinds.values() if kind.resolved), None)

    def leave_out(self, seat: Seat, error: Exception) -> bool:
        """Whether the night goes on without the kind of a lane that left with an error.

        That is so if the lane could not get its engine, and lanes of other kinds may.
        """
        if self._wanted is None or not isinstance(error, EngineError):
            return False
        kind = self.kind_of(seat)
        if kind.builder != seat.lane or kind.resolved:
            return False
        there = {self.kind_of(other) for other in self._able().values()}
        others = {other for other in self._kinds.values() if other.resolved or other in there}
        if any(not other.why_not for other in others - {kind}):
            kind.why_not = f"there is no engine for it ({one_line(error)})"
        return bool(kind.why_not)
