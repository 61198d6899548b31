"""The four numbers that are read first, the same on the page and in the mail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline import report_words as words
from pipeline.report import RunReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A number that is read first."""

    name: str
    value: str
    note: str
    mood: Literal["good", "odd", ""] = ""


def tiles(report: RunReport) -> tuple[Tile, ...]:
    """Rows, quarantine, speed and price."""
    scoring = words.scoring_per_s(report)
    while_scoring = f", {words.amount(scoring)} while scoring" if scoring else ""
    quarantined = words.percent(report.quarantined / report.rows) if report.rows else "0%"
    price = report.cost.price
    return (
        Tile(
            name="Rows scored",
            value=words.count(report.scored),
            note=f"of {words.count(report.rows)}",
        ),
        Tile(
            name="Quarantined",
            value=words.count(report.quarantined),
            note=f"{quarantined} of all rows",
            mood="odd" if report.quarantined else "good",
        ),
        Tile(
            name="Examples per second",
            value=words.amount(report.examples_per_sec),
            note=f"everything included{while_scoring}",
        ),
        Tile(
            name="Cost per 100,000 rows",
            value=words.usd(report.usd_per_100k),
            note=f"{words.plain(price.instance)}, {words.market(price)}",
        ),
    )
