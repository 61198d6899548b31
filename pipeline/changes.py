"""What is not as it was on an earlier night: the first thing to ask when a number is odd."""

from __future__ import annotations

from pipeline import report_words as words
from pipeline.history import HistoryRow

NOTABLE_ROWS = 0.1
"""Share by which the rows of a night may differ before it is worth a word."""


def what_changed(before: HistoryRow, now: HistoryRow) -> tuple[str, ...]:
    """Differences that explain others, such as `engine: openvino fp32, now openvino int8`.

    What was measured (rates, costs) is not among them; empty when all is as it was.
    """
    facts = {
        "engine": (_engine(before), _engine(now)),
        "model": (_model(before), _model(now)),
        "device": (before.device, now.device),
        "machine": (_machine(before), _machine(now)),
        "price": (_price(before), _price(now)),
    }
    changed = [
        f"{name}: {words.plain(old)}, now {words.plain(new)}"
        for name, (old, new) in facts.items()
        if old is not None and new is not None and old != new
    ]
    if abs(now.rows - before.rows) > NOTABLE_ROWS * before.rows:
        changed.append(f"rows: {words.count(before.rows)}, now {words.count(now.rows)}")
    if now.rows_taken_over != before.rows_taken_over:
        changed.append(
            f"rows taken over: {_taken_over(before)}, now {_taken_over(now)}; in no rate or price"
        )
    if bool(now.building_s) != bool(before.building_s):
        changed.append(f"engine build: {_build(before)}, now {_build(now)}")
    return tuple(changed)


def _engine(row: HistoryRow) -> str:
    return f"{row.runtime} {row.precision} {row.engine_key[-8:]}"


def _build(row: HistoryRow) -> str:
    return words.duration(row.building_s) if row.building_s else "none"


def _taken_over(row: HistoryRow) -> str:
    return words.count(row.rows_taken_over) if row.rows_taken_over else "none"


def _model(row: HistoryRow) -> str | None:
    return row.model_fingerprint and row.model_fingerprint[:8]


def _machine(row: HistoryRow) -> str:
    share = f", {words.percent(row.machine_share)} of it" if row.machine_share < 1 else ""
    return f"{row.instance}, {words.MARKETS.get(row.market, row.market)}{share}"


def _price(row: HistoryRow) -> str:
    return f"{words.usd(row.usd_per_hour)} an hour"
