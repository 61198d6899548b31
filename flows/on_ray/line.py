"""The line by which lanes on other nodes call the desk, which lives in the driver.

An actor of Ray would do, but is a process more to start, on the cores that the first lanes begin
on, and takes ten times as long for a call. Nodes of a Ray cluster reach each other on all ports.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Protocol

from flows.on_ray.desk import News, Orders
from pipeline.errors import LaneError, one_line
from pipeline.lane import LaneDevice

CONNECT_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 600.0
"""The desk answers in milliseconds; a driver may be stopped for a while."""
KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Where the desk is."""

    host: str
    port: int
    key: bytes = field(repr=False)
    """Whoever knows it may call: what comes over the line is unpickled."""


class DeskCalls(Protocol):
    """What a lane asks the desk."""

    def arrive(self, lane: str) -> bool:
        """A lane's task begins; False: it came too late, and nobody will wait for it."""

    def join(self, lane: str, node: str, device: LaneDevice) -> None:
        """A lane is there."""

    def turn(self, lane: str, news: News) -> Orders:
        """A lane tells what it did, and hears what to do next."""


class Switchboard:
    """Answers the calls of all lanes, each in a thread of its own.

    Args:
        desk: What is called.
        host: Address of this machine, as other nodes know it.
    """

    def __init__(self, desk: DeskCalls, host: str) -> None:
        self._desk = desk
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
        port = self._server.getsockname()[1]
        self.line = Line(host=host, port=port, key=secrets.token_bytes(KEY_BYTES))
        threading.Thread(target=self._accept, name="desk", daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                caller, _ = self._server.accept()
                threading.Thread(
                    target=self._answer, args=(caller,), name="desk-line", daemon=True
                ).start()

    def _answer(self, caller: socket.socket) -> None:
        # The caller is gone, or is none of ours.
        with suppress(OSError, EOFError, AuthenticationError), _over(caller) as connection:
            deliver_challenge(connection, self.line.key)
            answer_challenge(connection, self.line.key)
            calls: dict[str, Callable[..., Orders | bool | None]] = {
                "arrive": self._desk.arrive,
                "join": self._desk.join,
                "turn": self._desk.turn,
            }
            while True:
                name, arguments = connection.recv()
                connection.send(calls[name](*arguments))

    def close(self) -> None:
        """Take no more callers."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends `accept`, which `close` does not
        self._server.close()


class FarDesk:
    """The desk, as if it were here.

    Raises:
        LaneError: It cannot be reached, now or later.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        try:
            caller = socket.create_connection((line.host, line.port), CONNECT_TIMEOUT_S)
            caller.settimeout(None)
            self._connection = _over(caller)
            answer_challenge(self._connection, line.key)
            deliver_challenge(self._connection, line.key)
        except (OSError, EOFError, AuthenticationError) as error:
            raise self._gone(error) from None

    def arrive(self, lane: str) -> bool:
        """See `Desk.arrive`."""
        in_time: bool = self._call("arrive", lane)
        return in_time

    def join(self, lane: str, node: str, device: LaneDevice) -> None:
        """See `Desk.join`."""
        self._call("join", lane, node, device)

    def turn(self, lane: str, news: News) -> Orders:
        """See `Desk.turn`."""
        orders: Orders = self._call("turn", lane, news)
        return orders

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            self._connection.send((name, arguments))
            if not self._connection.poll(CALL_TIMEOUT_S):
                raise TimeoutError(f"no answer for {CALL_TIMEOUT_S:.0f} s")
            return self._connection.recv()
        except (OSError, EOFError) as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> LaneError:
        return LaneError(
            f"the run's desk at {self._line.host}:{self._line.port}: "
            f"{one_line(error) or 'it is gone'}; expected it to answer: all nodes of a Ray cluster "
            "must reach each other. The same command goes on where this one stopped."
        )


def _over(caller: socket.socket) -> Connection:
    caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # calls wait for their answers
    return Connection(caller.detach())
