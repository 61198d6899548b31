"""Lanes on Ray as task runs of a Prefect flow, through `prefect-ray`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events.worker import EventsWorker
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

from flows.on_ray.cluster import connect, work
from flows.on_ray.lanes import RayLanes
from flows.on_ray.line import FarDesk
from flows.on_ray.node import LaneCall
from pipeline.config import Job

SEND_TIMEOUT_S = 5.0
"""For the last state of a task run to reach the server."""


@task(name="lane", task_run_name="{label}", cache_policy=NO_CACHE)
def _lane(label: str, lane: Callable[[], None]) -> None:
    del label  # it names the task run
    lane()


class _Runner(RayTaskRunner):  # type: ignore[misc]
    """Prefect's, whose task runs end in a state that the server hears of.

    A lane that gets room only when the night is over becomes no task run: Ray would end its process
    at any line, and the server show one that crashed, or runs for ever.
    """

    @staticmethod
    def _run_prefect_task(*refs: Any, parameters: dict[str, Any], **others: Any) -> Any:
        (call,) = parameters["lane"].args
        if not FarDesk(call.desk).arrive(call.lane):
            return None
        try:
            return RayTaskRunner._run_prefect_task(*refs, parameters=parameters, **others)
        finally:  # states are sent by a thread, and Ray ends this process when the night is over
            EventsWorker.drain_all(timeout=SEND_TIMEOUT_S)


@contextmanager
def ray_lanes(job: Job, title: str) -> Iterator[RayLanes]:
    """Lanes that a server can watch; those that never found room leave nothing behind there.

    Args:
        job: The job.
        title: Of the night, for the names of the task runs.

    Raises:
        ConfigError: The job's cluster cannot be reached.
    """
    connect(job)  # the runner takes the connection that there is
    with _Runner() as runner:

        def submit(call: LaneCall, options: Mapping[str, Any]) -> Any:
            with remote_options(**options):
                # A function: into anything else Prefect looks for its futures.
                lane = functools.partial(work, call)
                parameters = {"label": f"{title}: {call.lane}", "lane": lane}
                return runner.submit(_lane, parameters).wrapped_future

        yield RayLanes(job, submit)
