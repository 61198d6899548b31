"""A Ray cluster as a run sees it: the only module that imports Ray.

Each lane is one Ray task. Lanes that wait for room are what tells Ray's autoscaler to add nodes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported: no telemetry

import ray
from ray.exceptions import RayError, RayTaskError

from flows.devices import num_cores
from flows.on_ray.desk import Desk
from flows.on_ray.line import FarDesk, Switchboard
from flows.on_ray.node import LaneCall, Need, Node, start_lane
from pipeline.config import Job
from pipeline.errors import ConfigError, one_line

log = logging.getLogger(__name__)

LOCAL = "local"
"""As an address: a cluster of this machine alone, for as long as this process lives."""
Submit = Callable[[LaneCall, Mapping[str, Any]], Any]
"""Hands a lane to Ray with these options of its task; returns what Ray knows it by."""


class Cluster:
    """A connection to a cluster, or a cluster of this machine alone.

    Args:
        job: Its `lanes` say where the cluster is and what a lane takes of it.
        submit: How lanes are handed to Ray; as plain tasks by default.

    Raises:
        ConfigError: It cannot be reached.
    """

    def __init__(self, job: Job, submit: Submit | None = None) -> None:
        connect(job)
        self._submit = submit or _as_task
        self._switchboard: Switchboard | None = None
        self._tasks: dict[str, Any] = {}
        self.need = need_of(job, list(self._nodes().values()))

    def open_desk(self) -> Desk:
        """The run's desk, which the lanes to come will call."""
        desk = Desk()
        self._switchboard = Switchboard(desk, _own_node()["NodeManagerAddress"])
        return desk

    def start_lane(self, lane: str, job: Job) -> None:
        """Ask for a lane; it begins where and when there is room, and calls the desk."""
        assert self._switchboard is not None, "the desk is opened first"
        call = LaneCall(
            desk=self._switchboard.line,
            lane=lane,
            job=job,
            folder=os.getcwd(),
            need=self.need,
        )
        # A lane that is lost is asked for anew. Without max_calls=0 its process ends with it.
        options = {"max_retries": 0, "max_calls": 0, "num_cpus": self.need.num_cpus}
        if self.need.num_gpus:
            options["num_gpus"] = self.need.num_gpus
        self._tasks[lane] = self._submit(call, options)

    @property
    def lanes(self) -> list[str]:
        """Those that were asked for and have not ended."""
        return list(self._tasks)

    def ended(self) -> dict[str, Exception | None]:
        """Lanes that have ended since the last call, and why, if not by themselves."""
        by_task = {task: lane for lane, task in self._tasks.items()}
        if not by_task:
            return {}
        done, _ = ray.wait(list(by_task), num_returns=len(by_task), timeout=0)
        return {by_task[task]: self._end_of(by_task[task]) for task in done}

    def _end_of(self, lane: str) -> Exception | None:
        try:
            ended = ray.get(self._tasks.pop(lane))
            if hasattr(ended, "result"):  # Prefect's state of a task
                ended.result()
        except RayTaskError as error:
            return error.cause or error
        except Exception as error:
            return error
        return None

    def room(self) -> int:
        """How many lanes all nodes hold that are there now."""
        return sum(self.need.fit(node) for node in self._nodes().values())

    def num_nodes(self) -> int:
        """How many nodes there are that hold a lane."""
        return sum(self.need.fit(node) > 0 for node in self._nodes().values())

    def leaving(self) -> set[str]:
        """Names of nodes that are about to be taken away, as Ray knows."""
        draining = ray._private.state.state.get_draining_nodes()
        return {_name(node) for node in _nodes() if node["NodeID"] in draining}

    def close(self) -> None:
        """Leave the cluster; what this process asked of it ends."""
        # Not in a thread, although it takes 0.3 s before the publication: a reference to a task
        # that is dropped meanwhile ends this very process.
        ray.shutdown()
        if self._switchboard is not None:  # last: a lane that just began would find nobody there
            self._switchboard.close()

    def _nodes(self) -> dict[str, Mapping[str, float]]:
        """Resources of the nodes that are alive."""
        return {node["NodeID"]: node["Resources"] for node in _nodes() if node["Alive"]}


def need_of(job: Job, nodes: list[Mapping[str, float]]) -> Need:
    """What each lane of a job takes of a node.

    Args:
        job: The job.
        nodes: Resources of the nodes that there are.

    Raises:
        ConfigError: Nobody says how many CPUs a lane shall have.
    """
    lanes = job.lanes
    has_gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    if lanes.device == "gpu" or (lanes.device == "auto" and has_gpus):
        return Need(num_cpus=lanes.threads or 1, num_gpus=1, num_threads=None)
    sizes = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if lanes.threads is None and not sizes:
        raise ConfigError(
            "lanes.threads: not given, and the Ray cluster has no node with CPUs yet; expected the "
            "number of CPUs of a lane. Set it."
        )
    num_cpus = lanes.threads or min(sizes)
    return Need(num_cpus=num_cpus, num_gpus=0, num_threads=num_cpus)


def work(call: LaneCall) -> None:
    """The Ray task: a lane on this node."""
    own = _own_node()
    resources = own["Resources"]
    node = Node(
        name=_name(own),
        num_cpus=int(resources.get("CPU", 1)),
        gpus=",".join(ray.get_runtime_context().get_accelerator_ids().get("GPU", ())),
        num_lanes=max(1, call.need.fit(resources)),
    )
    desk = FarDesk(call.desk)
    lane = start_lane(call, node)
    from flows.on_ray.lane import serve  # while the lane's process begins

    serve(call, node, desk, lane)


def _as_task(call: LaneCall, options: Mapping[str, Any]) -> Any:
    return ray.remote(**options)(work).options(name=call.lane).remote(call)


def _nodes() -> list[dict[str, Any]]:
    """All nodes that there ever were."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _own_node() -> dict[str, Any]:
    """The node that this process is on."""
    own_id = ray.get_runtime_context().get_node_id()
    (own,) = (node for node in _nodes() if node["NodeID"] == own_id)
    return own


def _name(node: Mapping[str, Any]) -> str:
    """Short, and another for each node: one machine may be several."""
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"


def connect(job: Job) -> None:
    """Make this process a driver of the job's cluster, unless it is one.

    Raises:
        ConfigError: It cannot be reached.
    """
    if ray.is_initialized():
        return
    # It prints what happens to nodes on standard output, whatever log_to_driver says.
    ray._private.worker.print_to_stdstream = _log_lines
    address = job.lanes.ray_address or os.environ.get("RAY_ADDRESS") or LOCAL
    alone: dict[str, Any] = {}
    if address == LOCAL:
        alone = {"num_cpus": num_cores(), "include_dashboard": False}
    try:
        with _own_signal_handlers():
            ray.init(
                address,
                log_to_driver=False,  # standard output is the report's
                logging_level=logging.ERROR,
                **alone,
            )
    except (RayError, ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"lanes.ray_address: {address}: {one_line(error)}; expected a Ray cluster that this "
            "machine is a node of. See docs/cluster.md."
        ) from None


def _log_lines(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    del ignore_prefix
    log.info("Ray: %s: %s", data.get("pid"), " ".join(data.get("lines", ())))


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray replaces that of SIGTERM, which is ours: it drains."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
