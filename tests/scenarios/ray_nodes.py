"""A Ray cluster on this machine: each node is processes of its own, on ports of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.ports import free_port
from tests.processes import SESSION, alive_with, command_of

RAY = str(Path(sys.executable).with_name("ray"))
START_TIMEOUT_S = 120.0
STORE_BYTES = 80_000_000


class RayNodes:
    """A head without CPUs, and nodes that come and go.

    Attributes:
        environment: What a driver needs to be let in.
        started: Nodes that run, and their logs.
    """

    def __init__(self) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        # Not /tmp/ray: whoever asks there for the cluster of this machine would get this one.
        self._folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: it holds sockets
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_TMPDIR": str(self._folder),
        }
        self.started: dict[subprocess.Popen[bytes], Path] = {}
        self._num_started = 0
        head = ("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
        self._wait_for(self._start(*head))

    def add(self, num_cpus: int = 1, **environment: str) -> subprocess.Popen[bytes]:
        """Start a node; two at once would choose the same ports."""
        how = (f"--address={self.address}", f"--num-cpus={num_cpus}")
        node = self._start(*how, **environment)
        self._wait_for(node)
        return node

    def _start(self, *how: str, **environment: str) -> subprocess.Popen[bytes]:
        self._num_started += 1
        log = self._folder / f"node{self._num_started}.log"
        with log.open("wb") as output:
            node = subprocess.Popen(
                [RAY, "start", "--block", f"--object-store-memory={STORE_BYTES}", *how],
                env={
                    **os.environ,
                    **self.environment,
                    "RAY_USAGE_STATS_ENABLED": "0",
                    **environment,
                },
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started[node] = log
        return node

    def _wait_for(self, node: subprocess.Popen[bytes]) -> None:
        log = self.started[node]
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"Ray runtime started" not in log.read_bytes():
            assert node.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)

    def end(self, node: subprocess.Popen[bytes]) -> None:
        """As if its machine lost power: everything that runs on it is gone at once."""
        for pid in _processes_of(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()
        del self.started[node]

    def close(self) -> None:
        """End all nodes, the head last."""
        for node in reversed(list(self.started)):
            self.end(node)
        shutil.rmtree(self._folder, ignore_errors=True)

    def lanes_on(self, node: subprocess.Popen[bytes]) -> list[int]:
        """Processes that score on a node."""
        return [pid for pid in _processes_of(node) if "spawn_main" in command_of(pid)]

    def at_work(self) -> list[list[int]]:
        """Those processes, of each node that has some."""
        return [found for node in self.started if (found := self.lanes_on(node))]

    def called(self, node_id: str) -> subprocess.Popen[bytes]:
        """The node of that id."""
        return next(
            node
            for node in self.started
            if any(f"--node_id={node_id}" in command_of(pid) for pid in _processes_of(node))
        )


def _processes_of(node: subprocess.Popen[bytes]) -> list[int]:
    return alive_with(SESSION, node.pid)


@contextmanager
def standing_still(pids: list[int]) -> Iterator[None]:
    """Meanwhile these processes do nothing."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def on_ray(nodes: RayNodes) -> tuple[str, ...]:
    """Settings of a night over a cluster."""
    sets = ("lanes.runner=ray", f"lanes.ray_address={nodes.address}")
    return tuple(word for setting in sets for word in ("--set", setting))
