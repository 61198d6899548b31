"""Lanes on a cluster: what they take of a node, what a node must see, and what a driver does."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.devices import this_cpu
from engines.errors import AccuracyError
from flows.crews import make_crews
from flows.devices import start_lanes
from flows.night import times
from flows.on_ray import lanes as ray_lanes
from flows.on_ray.desk import Desk, News
from flows.on_ray.engines import Wanted
from flows.on_ray.lane import serve
from flows.on_ray.lanes import RayLanes
from flows.on_ray.node import LaneCall, Need, Node, device_of
from pipeline.config import Job
from pipeline.cost import own_price
from pipeline.engine import request_for
from pipeline.errors import ConfigError, Interrupted, LaneError
from pipeline.job_file import load_job
from pipeline.lane import Lane, LaneDevice

CPU = LaneDevice(name="node cpu", num_threads=1)
NODE = Node(name="here", num_cpus=4, gpus="", num_lanes=2)


@pytest.fixture
def job(features_job: Path) -> Job:
    return load_job(str(features_job), ["lanes.runner=ray", "lanes.device=cpu", "lanes.threads=1"])


def call_of(job: Job, num_threads: int | None = 1) -> LaneCall:
    folder = os.getcwd()
    need = Need(num_cpus=1, num_gpus=0, num_threads=num_threads)
    return LaneCall(desk="", lane="a", job=job, folder=folder, need=need)


def test_without_ray_the_error_names_the_extra(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flows.on_ray.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray is not installed.*pip install 'nightscore\[ray\]'"):
        start_lanes(job)


def test_a_backfill_asks_for_local_lanes(job: Job) -> None:
    with pytest.raises(ConfigError, match="expected local lanes for a backfill"):
        make_crews(job, 1)


@pytest.mark.parametrize(
    ("sets", "nodes", "cpus", "gpus"),
    [
        (["lanes.device=cpu"], [{"CPU": 8.0}, {"CPU": 4.0}, {}], 4, 0),
        (["lanes.device=cpu", "lanes.threads=2"], [{"CPU": 8.0, "GPU": 1.0}], 2, 0),
        (["lanes.device=auto"], [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}], 1, 1),
        (["lanes.device=auto"], [{"CPU": 8.0}], 8, 0),
        (["lanes.device=gpu", "lanes.threads=3"], [], 3, 1),
    ],
)
def test_a_lane_takes_a_gpu_or_the_cpus_of_a_node(
    features_job: Path, sets: list[str], nodes: list[dict[str, float]], cpus: int, gpus: int
) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    from flows.on_ray.cluster import need_of

    need = need_of(load_job(str(features_job), ["lanes.runner=ray", *sets]), nodes)
    assert (need.num_cpus, need.num_gpus) == (cpus, gpus)


def test_nobody_guesses_the_cpus_of_nodes_that_are_not_there_yet(job: Job) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    from flows.on_ray.cluster import need_of

    with pytest.raises(ConfigError, match=r"lanes\.threads: not given"):
        need_of(
            job.model_copy(update={"lanes": job.lanes.model_copy(update={"threads": None})}), []
        )
    need = Need(num_cpus=3, num_gpus=1, num_threads=None)
    assert [need.fit(node) for node in ({"CPU": 12, "GPU": 2}, {"CPU": 5, "GPU": 8}, {})] == [
        2,
        1,
        0,
    ]
    assert str(need) == "a GPU and 3 CPUs"


def test_a_lane_has_the_threads_that_the_cluster_gave_it(job: Job) -> None:
    device = device_of(call_of(job, 3), NODE)
    assert device == LaneDevice(name="here-cpu", num_threads=3, cpu=this_cpu(3))


def test_a_driver_takes_a_nodes_word_for_its_processor() -> None:
    there = dataclasses.replace(this_cpu(2), name="another one")
    assert LaneDevice(name="x", num_threads=2, cpu=there).engine_device is there


def test_a_node_that_does_not_see_the_run_says_what_to_share(job: Job) -> None:
    desk = Desk()
    setup: Any = SimpleNamespace(job=job, run_id="2026-11-20-0123")
    lane = threading.Thread(target=serve, args=(call_of(job), NODE, desk, Lane(CPU)), daemon=True)
    lane.start()
    while not (seats := desk.look().seats):
        time.sleep(0.01)
    desk.tell(seats[0].lane, setup, 1.0)
    errors: list[tuple[str, Exception]] = []
    while not errors:
        errors += desk.look().errors
        time.sleep(0.01)
    desk.end()
    lane.join(30)
    assert not lane.is_alive()
    ((name, error),) = errors
    assert name == "a"
    assert isinstance(error, ConfigError)
    assert str(error) == (
        f"output.uri: {job.output.uri}: here does not see the run that was begun there; expected "
        "storage that all nodes share. Use s3://, or a disk that every node has mounted."
    )


class FakeCluster:
    """A cluster whose lanes are what the test says."""

    def __init__(self, *_: Any) -> None:
        self.need, self.desk = "1 CPU", Desk()
        self.asked: list[str] = []
        self.gone: dict[str, Exception | None] = {}
        self.num_rooms = 2
        self.closed = False

    def open_desk(self) -> Desk:
        return self.desk

    def start_lane(self, lane: str, _: Job) -> None:
        self.asked.append(lane)

    @property
    def lanes(self) -> list[str]:
        return self.asked

    def ended(self) -> dict[str, Exception | None]:
        gone, self.gone = self.gone, {}
        for lane in gone:
            self.asked.remove(lane)
        return gone

    def room(self) -> int:
        return self.num_rooms

    def num_nodes(self) -> int:
        return self.num_rooms

    def leaving(self) -> set[str]:
        return set()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def lanes(job: Job, monkeypatch: pytest.MonkeyPatch) -> RayLanes:
    module = SimpleNamespace(Cluster=FakeCluster)
    monkeypatch.setitem(sys.modules, "flows.on_ray.cluster", module)
    made = start_lanes(job)
    assert isinstance(made, RayLanes)
    return made


def cluster_of(lanes: RayLanes) -> FakeCluster:
    cluster: Any = lanes._cluster
    assert isinstance(cluster, FakeCluster)
    return cluster


def test_one_lane_more_than_there_is_room_for_waits_for_a_node(lanes: RayLanes) -> None:
    lanes.connect()
    assert cluster_of(lanes).asked == ["lane1", "lane2", "lane3"]
    assert lanes.num_machines == 2


def test_a_lost_lane_is_said_and_replaced(lanes: RayLanes) -> None:
    said: list[str] = []
    cluster = FakeCluster()
    lanes._new_cluster = lambda: cluster
    cluster.desk.join("lane1", "node1", CPU)
    assert lanes.begin(said.append)[0] == CPU
    cluster.gone = {"lane1": RuntimeError("power. More of it")}
    lanes._look()
    assert said == ["node1: its lane is lost, and what it held goes to others (power)"]
    assert cluster.asked == ["lane2", "lane3", "lane4"]


def test_lanes_that_are_lost_again_and_again_stop_the_run(lanes: RayLanes) -> None:
    lanes.connect()
    cluster = cluster_of(lanes)

    def lose() -> None:
        cluster.gone = {cluster.asked[0]: ImportError("no library")}
        lanes._look()

    for _ in range(ray_lanes.MAX_LOSSES):
        lose()
    with pytest.raises(LaneError, match=r"9 lanes were lost one after the other.*no library"):
        lose()


def test_what_is_wrong_with_the_job_is_raised_as_it_is(lanes: RayLanes) -> None:
    cluster = FakeCluster()
    lanes._new_cluster = lambda: cluster
    desk = cluster.desk
    desk.join("lane1", "node1", CPU)
    desk.turn("lane1", News(error=ConfigError("output.uri: wrong."), leaves=True))
    with pytest.raises(ConfigError, match=r"output\.uri: wrong\."):
        lanes.begin(lambda _: None)


def test_a_kind_of_device_without_an_engine_is_left_out_and_the_others_go_on(
    lanes: RayLanes,
) -> None:
    cluster, said = FakeCluster(), list[str]()
    lanes._new_cluster = lambda: cluster
    for lane in ("lane1", "lane2", "lane3"):
        old = dataclasses.replace(this_cpu(1), name="an old one")
        cpu = this_cpu(1) if lane == "lane1" else old
        device = LaneDevice(name=lane, num_threads=1, cpu=cpu)
        cluster.desk.join(lane, f"node of {lane}", device)
    lanes.begin(said.append)
    plan: Any = SimpleNamespace(num_features=32)
    request = request_for(lanes._job, 32, this_cpu(1))
    lanes._engines.want(Wanted(plan=plan, fingerprint="", request=request, force=False))
    lanes._look()
    cluster.desk.turn("lane2", News(error=AccuracyError("none passes. Look"), leaves=True))
    lanes._look()
    nothing: Any = None
    lanes._welcome(nothing, lanes._seats)
    why = "its an old one is left out, as there is no engine for it (none passes. Look)"
    assert said == [f"node of lane2: {why}", f"node of lane3: {why}"]
    assert cluster.desk.turn("lane3", News()).drain
    assert not cluster.desk.turn("lane1", News()).drain
    cluster.desk.turn("lane1", News(error=AccuracyError("none passes"), leaves=True))
    with pytest.raises(AccuracyError):
        lanes._look()


def test_a_cluster_without_room_is_waited_for_and_then_left_to_the_next_attempt(
    lanes: RayLanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_lanes, "PATIENCE_S", 0.0)
    monkeypatch.setattr(ray_lanes, "WAIT_S", 0.3)
    said: list[str] = []
    with pytest.raises(Interrupted, match=r"no node with 1 CPU .* run the same command again"):
        lanes.begin(said.append)
    assert said[0] == "waiting for a node of the Ray cluster with 1 CPU"


def test_a_night_pays_all_machines() -> None:
    price = own_price("m", 2.0, as_of="2026-11-20")
    assert times(price, 1) is price
    several = times(price, 2.5)
    assert several.usd_per_hour == 5.0
    assert several.source.endswith("; 2.5 machines on average")
