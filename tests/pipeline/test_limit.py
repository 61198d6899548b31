"""The limit of a run: what its stages allow together, and what the gap to it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline import report_words as words
from pipeline.limit import limit_of, sum_of_ceilings
from pipeline.report import Ceilings, Cost, Limit, Price, RunReport, StageTimes, report_from_dict

CEILINGS = Ceilings(decode_per_sec=1_000, engine_per_sec=600, engine_with_copies_per_sec=500)
COST = Cost(
    price=Price(instance="x", market="spot", usd_per_hour=1, source="-", as_of="2026-11-21"),
    usd=12.0,
    usd_per_100k=12.0,
    scoring_usd=10.0,
    building_usd=1.0,
    other_usd=1.0,
)


def stages(write_s: float, *, cpu_s: float = 0.0) -> dict[str, StageTimes]:
    """1,000 rows in `write_s` seconds; reading and writing take `cpu_s` CPU seconds each."""
    return {
        "read": StageTimes(busy_s=1, wait_s=1, items=1_000, cpu_s=cpu_s),
        "write": StageTimes(busy_s=1, wait_s=write_s - 1, items=1_000, cpu_s=cpu_s),
    }


def limit(times: dict[str, StageTimes], num_lanes: int = 1, num_threads: int | None = 2) -> Limit:
    found = limit_of(
        CEILINGS, times, COST, rows=100_000, num_lanes=num_lanes, num_threads=num_threads
    )
    assert found is not None
    return found


def test_on_a_device_the_slowest_stage_is_the_limit() -> None:
    found = limit(stages(4.0), num_threads=None)
    assert (found.per_sec, found.bound_by) == (500, "infer")
    assert (found.rate_per_sec, found.reached) == (250, 0.5)


def test_on_a_cpu_a_row_costs_the_sum_of_its_stages() -> None:
    found = limit(stages(4.0))
    assert found.per_sec == pytest.approx(1 / (1 / 1_000 + 1 / 500))
    assert found.reached == pytest.approx(250 * (1 / 1_000 + 1 / 500))


def test_reading_and_writing_take_their_share_of_the_cores() -> None:
    # 1 ms a row each, on two cores: as much as decoding.
    found = limit(stages(4.0, cpu_s=1.0))
    assert found.per_sec == pytest.approx(1 / (1 / 1_000 + 1 / 500 + 2 * 0.0005))
    assert limit(stages(4.0, cpu_s=5.0)).bound_by == "read"


def test_lanes_side_by_side_add_up() -> None:
    both = sum_of_ceilings([CEILINGS, None, CEILINGS])
    assert both == Ceilings(
        decode_per_sec=2_000, engine_per_sec=1_200, engine_with_copies_per_sec=1_000
    )
    # Times are sums over lanes: two lanes for 2 s each are 4 s.
    assert limit(stages(4.0), num_lanes=2).rate_per_sec == 500


def test_the_gap_is_what_scoring_would_have_cost_less() -> None:
    found = limit(stages(4.0), num_threads=None)
    assert found.gap_usd == pytest.approx(5.0)
    assert found.gap_usd_per_100k == pytest.approx(5.0)
    assert limit(stages(1.9), num_threads=None).gap_usd == 0.0


def test_without_rows_or_ceilings_there_is_no_limit() -> None:
    nothing = {"write": StageTimes(busy_s=0, wait_s=1, items=0)}
    assert sum_of_ceilings([None]) is None
    for ceilings, times in ((None, stages(1.0)), (CEILINGS, nothing), (CEILINGS, {})):
        found = limit_of(ceilings, times, COST, rows=1, num_lanes=1, num_threads=2)
        assert found is None


def test_the_report_says_it_and_reads_it_back(a_report: Callable[..., RunReport]) -> None:
    report = a_report(limit=limit(stages(4.0), num_threads=None))
    sentence = words.limit_sentence(report)
    assert sentence is not None
    assert sentence.startswith("50.0% of the 500 rows/s that its stages allow together, bound by ")
    assert "the gap cost $5.00 per 100,000 rows" in sentence
    assert report_from_dict(report.to_dict()) == report
    old = report.to_dict()
    del old["limit"]  # reports of before
    assert report_from_dict(old).limit is None
