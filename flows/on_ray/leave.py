"""Let the lanes of this machine leave their Ray cluster, before its node is taken away.

    python -m flows.on_ray.leave [SECONDS] [--node ID]

On a signal Ray ends a node at once, with all that runs there; a pod's preStop hook runs this first.
What lanes are at is committed, and the night goes on elsewhere. Exit 1 when they are still at work
after `SECONDS`: what they hold will then be scored again.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: no telemetry

from pipeline.errors import ConfigError, LaneError, PipelineError, one_line

DEFAULT_S = 40.0
"""`lanes.grace_s` for the shards in work, twice."""
PERIOD_S = 0.5
RESOURCES = ("CPU", "GPU")
"""Of which a lane takes some."""


def main() -> None:
    """Parse the command line, and leave."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", type=float, nargs="?", default=DEFAULT_S)
    parser.add_argument("--node", help="Ray's id of it; needed where this machine has several")
    options = parser.parse_args()
    timeout_s = options.seconds
    try:
        have_left = leave(timeout_s, options.node)
    except PipelineError as error:
        sys.exit(f"error: {error}")
    if not have_left:
        sys.exit(f"lanes are still at work after {timeout_s:g} s; what they hold is scored again")


def leave(timeout_s: float, node_id: str | None = None) -> bool:
    """Ask the lanes of a node to leave it, and wait until they have, and it with them.

    Ray begins nothing else there from now on, and drivers are told at their next look.

    Args:
        timeout_s: Seconds to wait; when they are over, the node may be ended.
        node_id: Of the node, in hexadecimal; None: the one of this machine.

    Returns:
        Whether all have left in time.

    Raises:
        ConfigError: There is no Ray here, or no such node, or several of them.
        LaneError: Ray does not let it go.
    """
    try:
        ray = importlib.import_module("ray")  # much of what is used here has no types
        messages = importlib.import_module("ray.core.generated.autoscaler_pb2")
    except ModuleNotFoundError as error:
        from flows.on_ray.lanes import missing

        raise missing(error) from None
    try:
        ray.init(os.environ.get("RAY_ADDRESS") or "auto", logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"Ray: {one_line(error)}; expected a node of a cluster on this machine. Run it there."
        ) from None
    here, until = ray.get_runtime_context(), time.time() + timeout_s
    node = _node(ray.nodes(), here.get_node_id(), node_id)
    own = node["NodeID"]
    gcs = ray._raylet.GcsClient(address=here.gcs_address)
    preempted, why = messages.DRAIN_NODE_REASON_PREEMPTION, "its machine is taken away"
    may_go, problem = gcs.drain_node(own, preempted, why, int(until * 1000))
    if not may_go:
        raise LaneError(f"Ray: {problem}; expected it to let the node go. End the node itself.")
    while time.time() < until:
        # Ray itself ends a node that was asked to go when nothing runs on it any more.
        if own not in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
            return True
        time.sleep(PERIOD_S)
    return False


def _node(
    nodes: Sequence[Mapping[str, Any]], connected_to: str, node_id: str | None
) -> Mapping[str, Any]:
    """The node of that id, or else the only one at this machine's address; none without lanes."""
    (ours,) = (node for node in nodes if node["NodeID"] == connected_to)
    address = ours["NodeManagerAddress"]
    there = [node for node in nodes if node["Alive"] and {*RESOURCES} & {*node["Resources"]}]
    found = [
        node
        for node in there
        if node["NodeID"] == node_id or (node_id is None and node["NodeManagerAddress"] == address)
    ]
    if len(found) != 1:
        which = ", ".join(node["NodeID"] for node in found or there)
        raise ConfigError(
            f"--node: {node_id or f'not given, and {len(found)} nodes are at {address}'}; expected "
            f"one of {which or 'none'}."
        )
    return found[0]


if __name__ == "__main__":
    main()
