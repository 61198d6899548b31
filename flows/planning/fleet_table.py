"""The fleets of `score plan --fleet` in 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.planning.plan import render_plan
from flows.planning.simulate import rates_lines
from pipeline import report_words as words
from pipeline.report import Price

Facts = dict[str, Any]


def render_fleet(facts: Facts) -> RenderableType:
    """The plan, the fleets, what ends their growth, and what all this rests on."""
    found = facts["fleet"]
    table = Table(box=None, pad_edge=False)
    for heading in ("rows", "machines", "", "hours", "cost", "per 100,000"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for night in found["nights"]:
        for number, fleet in enumerate(night["fleets"]):
            rows = words.count(night["rows"]) if number == 0 else ""
            table.add_row(rows, *_cells(fleet))
    first = found["nights"][-1]
    limits = Table(box=None, pad_edge=False)
    limits.add_column("rows", justify="right", no_wrap=True)
    limits.add_column("", no_wrap=True)
    limits.add_column("")
    for limit in first["ceilings"]:
        limits.add_row(f"{limit['rows']:.1e}", limit["name"], limit["why"])
    cheapest = first["fleets"][0]["instance"]
    shard_rows = words.count(round(found["instances"][cheapest]["rows_per_shard"]))
    heading = (
        f"However many {cheapest} there are, with shards of {shard_rows} rows "
        f"{found['window_h']:g} h are filled by"
    )
    blank = Text()
    return Group(
        render_plan(facts), blank, table, blank, Text(heading), limits, blank, Text(_source(found))
    )


def _cells(fleet: Facts) -> tuple[str, ...]:
    night, name = fleet["forecast"], fleet["instance"]
    if night is None:
        return "-", name, "no number does", "-", "-"
    low, high = (f"{night[key] / 3600:.2f}" for key in ("wall_low_s", "wall_high_s"))
    return (
        words.count(night["machines"]),
        name,
        low if low == high else f"{low} to {high}",
        words.usd(night["usd"]),
        words.usd(night["usd_per_100k"]),
    )


def _source(found: Facts) -> str:
    """Whose rates these are, and what is assumed."""
    lines = rates_lines(found)
    lines += [
        f"{words.hourly(Price(**each['price']))}: {each['rows_per_s']:,.0f} rows/s."
        for each in found["instances"].values()
    ]
    lines += [
        f"{words.count(night['rows'])} rows on {fleet['instance']}: most of the time goes into "
        f"{fleet['forecast']['bottleneck']}."
        for night in found["nights"]
        for fleet in night["fleets"]
        if fleet["forecast"] and fleet["forecast"]["bottleneck"] != "lanes"
    ]
    if found["without_rate"]:
        num = words.plural(len(found["without_rate"]), "machine")
        lines.append(f"{num} of the price list: no rate; say --rate INSTANCE=ROWS_PER_S.")
    lines.append(
        f"Assumed: each machine is taken away {found['interruptions_per_h']:g} times an hour and "
        f"replaced after {found['replacement_s']:g} s; machines differ by "
        f"{words.percent(found['machine_spread'])}; requests and limits of {found['store']}. "
        "Machines are there when the night begins, and paid to its end."
    )
    return "\n".join(lines)
