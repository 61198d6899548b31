"""`score plan` says what an hour costs, and warns of a price that is too old."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from flows.planning.plan import plan_facts, render_plan
from tests.pipeline.pipeline_cases import DATE, a_job, job_data, users, write_input


@pytest.mark.parametrize(
    ("cost", "max_age_days", "is_warned"),
    [({}, 0, True), ({}, None, False), ({"usd_per_hour": 0.31}, 0, False)],
)
def test_a_plan_warns_of_an_old_price_of_the_list_alone(
    tmp_path: Path, cost: dict[str, object], max_age_days: int | None, is_warned: bool
) -> None:
    write_input(tmp_path / "in", users(50))
    (tmp_path / "model.onnx").write_bytes(b"is not opened")
    job = a_job(
        job_data(tmp_path),
        model={"source": str(tmp_path / "model.onnx")},
        engine={"store": str(tmp_path / "engines")},
        cost=cost,
        alerts={"max_price_age_days": max_age_days},
    )
    facts = plan_facts(job, DATE)
    console = Console(file=io.StringIO(), width=80)
    console.print(render_plan(facts))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "an hour (USD)" in text
    assert ("The price of c6i.large was read on" in text) == is_warned
    assert (facts["price_warning"] is not None) == is_warned
    assert facts["price"]["currency"] == "USD"
