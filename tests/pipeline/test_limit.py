"""The limit of a run: what its stages allow together, and what the gap to it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pipeline import report_words as words
from pipeline.lane import LaneDevice, LaneFigures
from pipeline.limit import (
    add_times,
    bottleneck_of,
    ceilings_of_cores,
    limit_of,
    sum_of_ceilings,
)
from pipeline.report import (
    NO_TIME,
    Ceilings,
    Limit,
    Price,
    RunReport,
    StageTimes,
    report_from_dict,
)

CEILINGS = Ceilings(decode_per_sec=1_000, engine_per_sec=600, engine_with_copies_per_sec=500)
DEVICE = LaneDevice(name="cpu", num_threads=2)


@dataclass(frozen=True)
class DoneLane:
    """1,000 rows in `write_s` seconds; reading and writing take `cpu_s` CPU seconds each.

    Decoding and inference are busy for three quarters of the time.
    """

    write_s: float = 4.0
    cpu_s: float = 0.0
    read_busy_s: float = 1.0
    inferred: int = 1_000
    ceilings: Ceilings | None = CEILINGS
    rows_begun: int = 1_000
    device: LaneDevice = DEVICE

    def times(self) -> dict[str, StageTimes]:
        read_wait_s = self.write_s - self.read_busy_s
        core = StageTimes(
            busy_s=0.75 * self.write_s, wait_s=0.25 * self.write_s, items=self.inferred
        )
        return {
            "read": StageTimes(
                busy_s=self.read_busy_s, wait_s=read_wait_s, items=1_000, cpu_s=self.cpu_s
            ),
            "decode": core,
            "infer": core,
            "write": StageTimes(busy_s=1, wait_s=self.write_s - 1, items=1_000, cpu_s=self.cpu_s),
        }


@dataclass(frozen=True)
class IdleLane:
    """A lane that got no shard."""

    device: LaneDevice = DEVICE
    ceilings: Ceilings | None = None
    rows_begun: int = 0

    def times(self) -> dict[str, StageTimes]:
        return {}


def find(
    *lanes: LaneFigures, num_threads: int | None = 2, rows: int = 1_000, usd_per_hour: float = 3_600
) -> Limit | None:
    price = Price(
        instance="x", market="own", usd_per_hour=usd_per_hour, source="-", as_of="2026-11-21"
    )
    stages = add_times(lane.times() for lane in lanes)
    return limit_of(lanes, stages, price, rows=rows, num_threads=num_threads)


def limit(*lanes: LaneFigures, num_threads: int | None = 2, rows: int = 1_000) -> Limit:
    found = find(*lanes, num_threads=num_threads, rows=rows)
    assert found is not None
    return found


def test_on_a_device_the_slowest_stage_is_the_limit() -> None:
    found = limit(DoneLane(4.0), num_threads=None)
    assert (found.per_sec, found.bound_by) == (500, "infer")
    assert (found.rate_per_sec, found.reached) == (250, 0.5)


def test_on_a_cpu_a_row_costs_the_sum_of_its_stages() -> None:
    found = limit(DoneLane(4.0))
    assert found.per_sec == pytest.approx(1 / (1 / 1_000 + 1 / 500))
    assert found.reached == pytest.approx(250 * (1 / 1_000 + 1 / 500))


def test_reading_and_writing_take_their_share_of_the_cores() -> None:
    # 1 ms a row each, on two cores: as much as decoding.
    found = limit(DoneLane(4.0, cpu_s=1.0))
    assert found.per_sec == pytest.approx(1 / (1 / 1_000 + 1 / 500 + 2 * 0.0005))
    assert limit(DoneLane(4.0, cpu_s=5.0)).bound_by == "read"


def test_ceilings_of_cores_are_what_they_would_do_that_did_only_that() -> None:
    decode = StageTimes(busy_s=9.0, wait_s=1.0, items=1_000, cpu_s=4.0)
    infer = StageTimes(busy_s=9.0, wait_s=1.0, items=900, cpu_s=6.0)
    found = ceilings_of_cores({"decode": decode, "infer": infer}, num_threads=2)
    assert found == Ceilings(decode_per_sec=500, engine_per_sec=300, engine_with_copies_per_sec=300)
    assert ceilings_of_cores({}, num_threads=2) is None
    assert ceilings_of_cores({"decode": NO_TIME, "infer": NO_TIME}, num_threads=2) is None


def test_lanes_side_by_side_add_up() -> None:
    both = sum_of_ceilings([DoneLane(), DoneLane()])
    assert both == Ceilings(
        decode_per_sec=2_000, engine_per_sec=1_200, engine_with_copies_per_sec=1_000
    )
    assert limit(DoneLane(4.0), DoneLane(2.0)).rate_per_sec == 500, "until the last is done"


def test_a_lane_without_a_shard_scores_nothing_and_could_have_done_as_much() -> None:
    found = limit(DoneLane(4.0), IdleLane(), IdleLane(), IdleLane(), num_threads=None)
    assert (found.rate_per_sec, found.per_sec) == (250, 4 * 500)
    assert found.reached == 0.125
    assert found.gap_usd == pytest.approx(3.5), "all lanes are paid for four seconds"


def test_lanes_beyond_the_number_of_cores_could_do_no_more() -> None:
    cores = [
        LaneDevice(name=f"cpu{index}", num_threads=1, cores=frozenset({index // 2}))
        for index in range(4)
    ]
    found = sum_of_ceilings([DoneLane(device=cores[0]), *map(IdleLane, cores[1:])])
    assert found is not None
    assert found.decode_per_sec == 2 * CEILINGS.decode_per_sec


def test_rows_that_were_never_decoded_count_for_nothing() -> None:
    """Three of four row groups are damaged: their rows are committed, in quarantine."""
    found = limit(DoneLane(4.0, inferred=250), num_threads=None)
    assert found.rate_per_sec == 62.5
    assert found.gap_usd == pytest.approx(3.5)


def test_rows_of_a_process_that_died_count_once() -> None:
    assert limit(DoneLane(4.0, inferred=1_500)).rate_per_sec == 250


def test_a_stage_that_the_cores_wait_for_bounds_the_run() -> None:
    found = limit(DoneLane(4.0, read_busy_s=3.9))
    assert found.bound_by == "read"
    assert found.per_sec == limit(DoneLane(4.0)).per_sec, "of the work of the CPU"
    assert limit(DoneLane(4.0, read_busy_s=1.9)).bound_by == "infer"


def test_the_bottleneck_is_what_is_busy_for_the_largest_part_of_its_time() -> None:
    stages = {
        "read": StageTimes(busy_s=9, wait_s=1, items=1),
        "decode": StageTimes(busy_s=4, wait_s=1, items=1),
        "infer": StageTimes(busy_s=12, wait_s=3, items=1),  # on two cores
    }
    assert bottleneck_of(stages) == "read"
    del stages["read"]
    assert bottleneck_of(stages) == "infer", "cores that do both: what takes longer"
    assert bottleneck_of({}) == "none"


def test_the_gap_is_what_the_attempt_would_have_cost_less() -> None:
    found = limit(DoneLane(4.0), num_threads=None, rows=10_000)
    assert found.gap_usd == pytest.approx(2.0)
    assert found.gap_usd_per_100k == pytest.approx(20.0), "of all rows, as the other prices"
    assert limit(DoneLane(1.9), num_threads=None).gap_usd == 0.0


def test_without_rows_or_ceilings_there_is_no_limit() -> None:
    assert sum_of_ceilings([IdleLane()]) is None
    for lane in (DoneLane(ceilings=None), DoneLane(inferred=0), IdleLane()):
        assert find(lane) is None
    assert find() is None


def test_the_report_says_it_and_reads_it_back(a_report: Callable[..., RunReport]) -> None:
    report = a_report(limit=limit(DoneLane(4.0), num_threads=None))
    sentence = words.limit_sentence(report)
    assert sentence is not None
    assert sentence.startswith("50.0% of the 500 rows/s that its stages allow together, bound by ")
    assert "the gap cost $200.00 per 100,000 rows" in sentence
    assert report_from_dict(report.to_dict()) == report
    old = report.to_dict()
    del old["limit"]  # reports of before
    assert report_from_dict(old).limit is None


@pytest.mark.parametrize(
    ("lane", "attempts", "sentence"),
    [
        (
            DoneLane(1.9),
            1,
            "105.3% of the 500 rows/s that its own measurements let expect, bound by infer; "
            "no gap to pay for.",
        ),
        (
            DoneLane(4.0, read_busy_s=3.9),
            2,
            "50.0% of the 500 rows/s that the device's work allows, bound by read, for which the "
            "device waited; the gap cost $200.00 per 100,000 rows (in the attempt that published).",
        ),
    ],
)
def test_a_limit_that_is_none_is_not_called_one(
    a_report: Callable[..., RunReport], lane: DoneLane, attempts: int, sentence: str
) -> None:
    found = limit(lane, num_threads=None)
    bottleneck = bottleneck_of(lane.times())
    report = a_report(limit=found, stages=lane.times(), bottleneck=bottleneck, attempts=attempts)
    assert words.limit_sentence(report) == sentence
