"""The desk: who gets which shards, and what happens when lanes vanish."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flows.on_ray.desk import Desk, News, Orders
from pipeline.lane import LaneDevice
from pipeline.ledger import CommitRecord, PartFile
from pipeline.plan import Shard

CPU = LaneDevice(name="cpu", num_threads=1)
SETUP: Any = object()
ROWS = 100


def shards(count: int) -> list[Shard]:
    file: Any = None
    return [
        Shard(index=i, file=file, row_groups=(i,), first_row=i * ROWS, num_rows=ROWS)
        for i in range(count)
    ]


def record(shard: Shard) -> CommitRecord:
    part = PartFile(name="part", num_bytes=1, sha256="", num_rows=shard.num_rows)
    return CommitRecord(
        shard=shard.index,
        file="",
        row_groups=shard.row_groups,
        first_row=shard.first_row,
        num_rows=shard.num_rows,
        num_scored=shard.num_rows,
        num_quarantined=0,
        reasons={},
        part=part,
        quarantine=None,
        owner="",
        committed_at="",
    )


class AtDesk:
    """A lane that does what it is told."""

    def __init__(self, desk: Desk, name: str, rows_per_s: float = 1_000.0) -> None:
        self.desk, self.name = desk, name
        self.held: list[Shard] = []
        self.groups: list[int] = []
        self.num_done = 0
        desk.join(name, f"node of {name}", CPU)
        desk.tell(name, SETUP, rows_per_s)

    def turn(self, **news: Any) -> Orders:
        orders = self.desk.turn(self.name, News(**news))
        self.held += orders.shards
        self.groups += [len(orders.shards)] if orders.shards else []
        return orders

    def commit(self, count: int) -> Orders:
        """Commit what it took first, and come for more."""
        done, self.held = self.held[:count], self.held[count:]
        self.num_done += len(done)
        return self.turn(records=tuple(map(record, done)))


@pytest.fixture
def desk() -> Desk:
    made = Desk()
    made.put(shards(64))
    return made


def committed(desk: Desk) -> list[int]:
    return sorted(record.shard for record in desk.look().records)


def test_a_lane_gets_no_shard_before_it_knows_what_to_score_with(desk: Desk) -> None:
    desk.join("a", "node", CPU)
    assert desk.turn("a", News()) == Orders()
    desk.tell("a", SETUP, 1.0)
    first = desk.turn("a", News())
    assert first.setup is SETUP
    assert first.shards
    assert desk.turn("a", News()).setup is None, "it is told once"


def test_a_task_that_begins_when_the_night_is_over_is_sent_away(desk: Desk) -> None:
    assert desk.arrive("a")
    desk.join("b", "node", CPU)
    desk.end()
    assert not desk.arrive("late")
    assert desk.arrived == {"a", "b"}


def test_a_lane_never_runs_dry_and_holds_two_groups_at_most(desk: Desk) -> None:
    lane = AtDesk(desk, "a")
    lane.turn()
    lane.turn()
    assert lane.groups == [16, 12], "a fourth of what is left"
    assert lane.turn().shards == ()
    assert lane.commit(15).shards == (), "more than its last group is left"
    assert len(lane.commit(1).shards) == 9


def test_groups_shrink_so_that_all_end_together(desk: Desk) -> None:
    lanes = [AtDesk(desk, "a"), AtDesk(desk, "b")]
    while any(lane.held for lane in lanes) or lanes[0].num_done == 0:
        for lane in lanes:
            lane.commit(1)
    assert committed(desk) == list(range(64))
    assert all(lane.groups[-1] == 1 for lane in lanes)
    assert abs(lanes[0].num_done - lanes[1].num_done) <= 2


def test_a_lane_that_is_faster_gets_more(desk: Desk) -> None:
    fast, slow = AtDesk(desk, "fast"), AtDesk(desk, "slow")
    num_turns = 0
    while fast.num_done + slow.num_done < 64:
        fast.commit(3)
        slow.commit(1)
        num_turns += 1
    assert num_turns <= 18, "16 if all rows were divided 3 to 1"


def test_a_lane_begins_with_what_its_engine_can_do(desk: Desk) -> None:
    lanes = [AtDesk(desk, "fast", 9_000.0), AtDesk(desk, "slow", 1_000.0)]
    for lane in lanes:
        lane.turn()
    assert [lane.groups for lane in lanes] == [[15], [2]]


def test_a_lane_that_comes_late_is_held_against_what_others_did(desk: Desk) -> None:
    alike, late = AtDesk(desk, "alike", 2_000.0), AtDesk(desk, "late", 6_000.0)
    desk.release("late")
    late.turn(leaves=True)
    alike.turn()
    alike.commit(16)  # half of what engines promise, as decoding takes its time, too
    again = AtDesk(desk, "again", 6_000.0)
    again.turn()
    assert again.groups == [math.ceil(36 * 0.75 / 4)]


@pytest.mark.parametrize("ratio", [3, 5, 10, 20, 40])
def test_a_slow_lane_begins_nothing_that_the_others_would_have_done_before(
    desk: Desk, ratio: int
) -> None:
    fast, slow = AtDesk(desk, "fast", ratio * 1_000.0), AtDesk(desk, "slow", 1_000.0)
    fast.turn()
    slow.turn()
    num_ticks = busy = 0
    while fast.num_done + slow.num_done < 64:
        num_ticks += 1
        fast.commit(1)
        busy = busy + 1 if slow.held else 0
        slow.commit(1) if busy and busy % ratio == 0 else slow.turn()
    assert committed(desk) == list(range(64))
    assert num_ticks == math.ceil(64 * ratio / (ratio + 1)), "as if rows could be divided"


def test_a_slow_lane_that_is_alone_does_it_all(desk: Desk) -> None:
    fast, slow = AtDesk(desk, "fast", 10_000.0), AtDesk(desk, "slow", 1_000.0)
    fast.turn()
    desk.lost("fast")
    slow.turn()
    while slow.held:
        slow.commit(1)
    assert committed(desk) == list(range(64))


def test_what_a_lost_lane_held_goes_to_others_and_what_it_committed_stays(desk: Desk) -> None:
    lost, other = AtDesk(desk, "lost"), AtDesk(desk, "other")
    lost.turn()
    lost.commit(3)
    held = {shard.index for shard in lost.held}
    desk.lost("lost")
    desk.lost("lost")
    while other.turn().shards or other.held:
        other.commit(1)
    assert committed(desk) == list(range(64))
    assert other.num_done == 61
    assert held
    seats = {seat.lane: seat for seat in desk.look().seats}
    assert seats["lost"].has_left
    assert not seats["other"].has_left


def test_a_lane_without_work_takes_what_another_has_not_come_to(desk: Desk) -> None:
    slow, free = AtDesk(desk, "slow"), AtDesk(desk, "free")
    slow.turn()
    while free.turn().shards or len(free.held) > 1:
        free.commit(1)
    last = slow.held[-1]
    (spare,) = (free.commit(1) if free.held else free.turn()).shards
    assert spare == last
    free.commit(1)
    found = [record.shard for record in desk.look().records]
    assert found.count(last.index) == 1
    slow.commit(len(slow.held))
    assert last.index not in committed(desk), "a second record of it is not news"


def test_all_lanes_drain_or_end_when_they_are_told(desk: Desk) -> None:
    lanes = [AtDesk(desk, "a"), AtDesk(desk, "b")]
    desk.release("a")
    assert lanes[0].turn().drain
    assert lanes[1].turn().shards
    desk.drain()
    assert lanes[1].turn() == Orders(drain=True)
    assert lanes[1].turn(leaves=True) == Orders(), "a lane that left waits for the end"
    desk.end()
    assert [lane.turn().end for lane in lanes] == [True, True]


def test_a_lane_whose_node_leaves_does_not_keep_its_place(desk: Desk) -> None:
    stays, goes = AtDesk(desk, "stays"), AtDesk(desk, "goes")
    desk.release("stays")
    desk.release("goes", for_good=True)
    assert stays.turn(leaves=True) == Orders(), "a lane in its place would be sent away again"
    assert goes.turn().drain, "what is in work comes first"
    assert goes.turn(leaves=True).end


def test_the_last_figures_of_a_lane_stay(desk: Desk) -> None:
    lane = AtDesk(desk, "a")
    lane.turn(rows_begun=700, leaves=True)
    lane.turn(leaves=True)
    (seat,) = desk.look().seats
    assert (seat.rows_begun, seat.has_left) == (700, True)


def test_the_driver_is_told_everything_once(desk: Desk) -> None:
    lane = AtDesk(desk, "a")
    lane.turn(said=("building",), error=ValueError("no"), leaves=True)
    seen = desk.look()
    assert seen.said == ("node of a: building",)
    ((name, error),) = seen.errors
    assert (name, str(error)) == ("a", "no")
    again = desk.look()
    assert (again.said, again.errors, again.records) == ((), (), ())
