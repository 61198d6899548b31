"""The line between lanes and the desk."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Listener

import pytest

from flows.on_ray.desk import Desk, News, Orders
from flows.on_ray.line import FarDesk, Line, Switchboard
from pipeline.errors import LaneError
from pipeline.lane import LaneDevice

CPU = LaneDevice(name="cpu", num_threads=1)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def board(desk: Desk) -> Iterator[Switchboard]:
    opened = Switchboard(desk, "127.0.0.1")
    yield opened
    opened.close()


def test_a_lane_reaches_the_desk_as_if_it_were_here(desk: Desk, board: Switchboard) -> None:
    lanes = [FarDesk(board.line), FarDesk(board.line)]
    for number, lane in enumerate(lanes):
        assert lane.arrive(f"lane{number}")
        lane.join(f"lane{number}", "node", CPU)
    desk.drain()
    assert [lane.turn(f"lane{number}", News()) for number, lane in enumerate(lanes)] == [
        Orders(drain=True),
        Orders(drain=True),
    ]
    assert [(seat.lane, seat.device) for seat in desk.look().seats] == [
        ("lane0", CPU),
        ("lane1", CPU),
    ]
    desk.end()
    assert not lanes[0].arrive("late")


def test_nobody_is_heard_who_does_not_know_the_key(desk: Desk, board: Switchboard) -> None:
    with socket.create_connection((board.line.host, board.line.port)):  # says nothing, and waits
        stranger = dataclasses.replace(board.line, key=b"another")
        with pytest.raises(LaneError, match="digest sent was rejected"):
            FarDesk(stranger)
        FarDesk(board.line).join("lane", "node", CPU)
    assert [seat.lane for seat in desk.look().seats] == ["lane"]
    assert "key" not in repr(board.line)


def test_a_desk_that_is_gone_is_said_in_one_sentence(board: Switchboard) -> None:
    line = board.line
    board.close()
    with pytest.raises(LaneError, match=rf"desk at 127\.0\.0\.1:{line.port}: .*expected it to"):
        FarDesk(line)


def test_a_lane_is_told_when_the_driver_is_gone() -> None:
    with Listener(("127.0.0.1", 0), authkey=b"key") as driver:
        host, port = driver.address
        answered = threading.Thread(target=lambda: driver.accept().close())
        answered.start()
        desk = FarDesk(Line(host=host, port=port, key=b"key"))
        answered.join()
    with pytest.raises(LaneError, match=r"The same command goes on where this one stopped\."):
        desk.turn("lane", News())
