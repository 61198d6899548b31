"""Two nights side by side: figures with their change, scores, and what explains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pipeline.changes import what_changed
from pipeline.compare import Figure, compare
from pipeline.history import row_of
from pipeline.report import RunReport, ScoreDistribution

Build = Callable[..., RunReport]


def figures(before: RunReport, now: RunReport) -> dict[str, Figure]:
    return {figure.name: figure for figure in compare(before, now).figures}


def distribution(counts: str, head: str = "scores") -> ScoreDistribution:
    return ScoreDistribution(counts=counts, num_values=400, model="4f1c", head=head)


def test_a_night_compared_with_itself_has_not_changed(a_report: Build) -> None:
    found = compare(a_report(), a_report())
    assert found.changed == ()
    assert {figure.change for figure in found.figures if figure.before} == {0.0}


def test_figures_have_both_values_as_numbers_and_in_words(a_report: Build) -> None:
    found = figures(a_report(), a_report(rows=5_000, wall_s=85.4, examples_per_sec=46.8))
    assert (found["rows"].before, found["rows"].now) == (4_000, 5_000)
    assert found["rows"].change == pytest.approx(0.25)
    assert found["wall-clock time"].now_text == "1 min 25 s"
    assert found["examples per second"].before_text == "93.7"


def test_reasons_of_quarantine_stand_beside_each_other(a_report: Build) -> None:
    before = a_report(quarantined_by_reason={"corrupt": 2, "null": 6})
    found = figures(before, a_report(quarantined_by_reason={"corrupt": 3, "truncated": 5}))
    reasons = {name: (f.before, f.now) for name, f in found.items() if name.startswith("- ")}
    assert reasons["- corrupt"] == (2, 3)
    assert reasons["- null"] == (6, 0)
    assert reasons["- truncated"] == (0, 5)
    assert found["- truncated"].change is None


def test_the_parts_of_the_cost_add_up_to_it(a_report: Build) -> None:
    found = figures(a_report(), a_report())
    parts = ("- scoring", "- building the engine", "- other")
    total = found["$ per 100,000 rows"].now
    assert sum(found[part].now or 0 for part in parts) == pytest.approx(total, rel=0.01)
    assert found["$ an hour"].now_text == "$0.0850"


def test_what_neither_night_knows_is_left_out_and_what_one_knows_is_not(a_report: Build) -> None:
    assert "J per 1,000 rows" not in figures(a_report(), a_report())
    found = figures(a_report(), a_report(joules_per_1000_rows=41.5))["J per 1,000 rows"]
    assert (found.before_text, found.now_text, found.change) == ("unknown", "41.5", None)


def test_engine_machine_and_price_stand_beside_each_other(a_report: Build) -> None:
    engine = dataclasses.replace(a_report().engine, precision="fp32")
    found = figures(a_report(), a_report(engine=engine, bottleneck="infer"))
    assert (found["engine"].before_text, found["engine"].now_text) == (
        "openvino int8",
        "openvino fp32",
    )
    assert (found["bottleneck"].before_text, found["bottleneck"].now_text) == ("decode", "infer")
    assert found["machine"].now_text == "c6i.large"
    assert (found["market"].now_text, found["market"].change) == ("on demand", None)
    assert found["price read on"].now_text == "2025-07-01"


def test_scores_are_compared_by_their_stability_index(a_report: Build) -> None:
    counts = " ".join(f"{key}:10" for key in range(2_000, 2_040))
    moved = " ".join(f"{key}:10" for key in range(2_030, 2_070))
    before = a_report(distribution=distribution(counts))
    same = compare(before, a_report(distribution=distribution(counts))).shifts["scores"]
    far = compare(before, a_report(distribution=distribution(moved))).shifts["scores"]
    assert same.psi == pytest.approx(0.0, abs=1e-9)
    assert far.psi > 0.25 + far.chance


@pytest.mark.parametrize("other", [None, distribution("3:400;7:400", head="classes")])
def test_scores_of_other_kinds_are_not_compared(
    a_report: Build, other: ScoreDistribution | None
) -> None:
    found = compare(a_report(distribution=distribution("4:400")), a_report(distribution=other))
    assert found.shifts == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 4_399}, ()),
        ({"rows": 4_401}, ("rows: 4,000, now 4,401",)),
        (
            {"instance": "g5.xlarge", "market": "spot", "usd_per_hour": 0.45},
            (
                "machine: c6i.large, on demand, now g5.xlarge, spot",
                "price: $0.0850 an hour, now $0.450 an hour",
            ),
        ),
        (
            {"precision": "fp32", "engine_key": "x-12345678"},
            ("engine: openvino int8 b83d7705, now openvino fp32 12345678",),
        ),
        ({"model_fingerprint": "b" * 64}, ("model: aaaaaaaa, now bbbbbbbb",)),
        ({"model_fingerprint": None}, ()),
        (
            {"machine_share": 0.5, "usd_per_hour": 0.0425},
            (
                "machine: c6i.large, on demand, now c6i.large, on demand, 50.0% of it",
                "price: $0.0850 an hour, now $0.0425 an hour",
            ),
        ),
        (
            {"rows_taken_over": 3_800},
            ("rows taken over: none, now 3,800; in no rate or price",),
        ),
        ({"building_s": 31.4}, ("engine build: none, now 31.4 s",)),
        ({"examples_per_sec": 1.0, "usd": 9.0, "wall_s": 1e4}, ()),
    ],
)
def test_what_explains_a_difference_is_named(
    a_report: Build, changes: dict[str, object], said: tuple[str, ...]
) -> None:
    row = row_of(a_report(), version=1, published_at="2026-11-21T02:00:00Z")
    before = dataclasses.replace(row, model_fingerprint="a" * 64)
    assert what_changed(before, dataclasses.replace(before, **changes)) == said
