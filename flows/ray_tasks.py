"""Lanes on Ray as task runs of a Prefect flow, through `prefect-ray`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.ray_lanes import RayLanes, missing
from flows.ray_node import LaneCall
from pipeline.config import Job


@task(name="lane", task_run_name="{label}", cache_policy=NO_CACHE)
def _lane(label: str, lane: Callable[[], None]) -> None:
    del label  # it names the task run
    lane()


@contextmanager
def ray_lanes(job: Job, title: str) -> Iterator[RayLanes]:
    """Lanes that a server can watch; those that never found room leave nothing behind there.

    Args:
        job: The job.
        title: Of the night, for the names of the task runs.

    Raises:
        ConfigError: Ray is not installed, or its cluster cannot be reached.
    """
    try:
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options

        from flows.ray_cluster import connect, work
    except ModuleNotFoundError as error:
        raise missing(error) from None
    connect(job)  # the runner takes the connection that there is
    with RayTaskRunner() as runner:

        def submit(call: LaneCall, options: Mapping[str, Any]) -> Any:
            with remote_options(**options):
                # A function: into anything else Prefect looks for its futures.
                lane = functools.partial(work, call)
                parameters = {"label": f"{title}: {call.lane}", "lane": lane}
                return runner.submit(_lane, parameters).wrapped_future

        yield RayLanes(job, submit)
