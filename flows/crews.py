"""Lanes that score one date after the other, and stay warm in between."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flows.devices import lane_devices
from flows.lanes import drain
from pipeline.config import Job
from pipeline.errors import ConfigError, Interrupted
from pipeline.lane import Lane, LaneDevice, modules_ahead


class Crew:
    """The lanes of one of the dates that are scored at once.

    Args:
        job: The job.
        devices: What its lanes are bound to.
    """

    def __init__(self, job: Job, devices: Sequence[LaneDevice]) -> None:
        self._job = job
        self.devices = devices
        self._lanes: list[Lane] = []
        self._lock = threading.Lock()
        self._is_over = False

    def lanes(self) -> list[Lane]:
        """Lanes that are ready for a run; those of the last one, unless something went wrong.

        Raises:
            Interrupted: The crew was dismissed.
        """
        with self._lock:
            if self._is_over:
                raise Interrupted("the backfill was stopped; run the same command again to go on.")
            if not self._lanes or not all(lane.is_ready for lane in self._lanes):
                _end(self._lanes)
                self._lanes = [
                    Lane(device, modules_ahead(self._job, device), is_kept=True)
                    for device in self.devices
                ]
            return list(self._lanes)

    def dismiss(self, grace_s: float = 0.0) -> None:
        """End its lanes, after the shards in work if these take no longer than `grace_s`."""
        with self._lock:
            self._is_over = True
            lanes = list(self._lanes)
        if any(lane.num_pending for lane in lanes) and grace_s > 0:
            drain(lanes, grace_s)
        _end(lanes)


def _end(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.abort()


def make_crews(job: Job, count: int) -> list[Crew]:
    """Share the devices of this machine among `count` crews; on a CPU, its cores.

    Raises:
        ConfigError: There are fewer devices, or cores; or lanes are on a cluster.
    """
    if job.lanes.runner == "ray":
        raise ConfigError(
            "lanes.runner: ray; expected local lanes for a backfill. Set `lanes.runner=local`, or "
            "run its dates one after the other with `score run`."
        )
    if count == 1:
        return [Crew(job, lane_devices(job))]
    # A CPU gives as many lanes as it is asked for. All use the engine of the whole machine.
    lanes = job.lanes.model_copy(update={"count": max(count, job.lanes.count)})
    devices = lane_devices(job.model_copy(update={"lanes": lanes}))
    places = {device.gpu.uuid if device.gpu else device.cores for device in devices}
    if count > len(places):
        what = "GPUs" if devices[0].gpu else "cores"
        raise ConfigError(
            f"--concurrency {count}: this machine has {len(places)} {what}; expected at most as "
            "many dates at once. Start the command on several machines to score more."
        )
    return [Crew(job, devices[index::count]) for index in range(count)]
