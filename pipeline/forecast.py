"""What a date will take and cost, from the last nights of its job on machines like this one.

Each of those nights says how long the date would take at its rate and with its overhead; the middle
one is the forecast, the fastest and the slowest are its interval. A night's warm-up counts as
scoring: what is much larger than the nights before will be faster than this says. Nights that had
another share of the machine count where there are no others, as if the machine's time were theirs
in proportion. For other numbers of lanes see `simulate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.history import HistoryRow
from pipeline.report import Price

MOST_NIGHTS = 7
LOOK_BACK_NIGHTS = 60
"""In which a night that built its engine is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NightForecast:
    """What scoring a date on this machine is expected to take."""

    rows: int
    """To score."""
    wall_s: float
    """Process start to publication."""
    low_s: float
    high_s: float
    """At the rates of the fastest and the slowest of the nights."""
    build_s: float
    """Of these, building an engine; 0 also when no night tells how long that takes."""
    rows_per_s: float
    """While scoring."""
    usd: float
    low_usd: float
    high_usd: float
    nights: tuple[str, ...]
    """Dates that it is taken from."""


def forecast_night(
    past: Sequence[HistoryRow], rows: int, price: Price, *, must_build: bool
) -> NightForecast | None:
    """Forecast a date.

    Args:
        past: Nights of the job by date, the last `LOOK_BACK_NIGHTS` for instance.
        rows: Of the date that are not committed.
        price: Of the machine, or of the date's share of it. Only nights on machines of its name
            are looked at.
        must_build: Whether the engine is not in the store.

    Returns:
        None when there has been no such night.
    """
    told = [row for row in past if row.instance == price.instance and _tells_a_rate(row)]
    share = price.machine_share
    alike = [row for row in told if row.machine_share == share] or told
    nights = alike[-MOST_NIGHTS:]
    if not nights:
        return None
    builds = [row.building_s * row.machine_share / share for row in told if row.building_s > 0]
    build_s = builds[-1] if must_build and builds else 0.0
    seconds = [
        build_s + (_overhead_s(row) + rows / _rows_per_s(row)) * row.machine_share / share
        for row in nights
    ]
    usd_per_s = price.usd_per_hour / 3600
    wall_s, low_s, high_s = median(seconds), min(seconds), max(seconds)
    return NightForecast(
        rows=rows,
        wall_s=wall_s,
        low_s=low_s,
        high_s=high_s,
        build_s=build_s,
        rows_per_s=median(_rows_per_s(row) * share / row.machine_share for row in nights),
        usd=wall_s * usd_per_s,
        low_usd=low_s * usd_per_s,
        high_usd=high_s * usd_per_s,
        nights=tuple(row.date for row in nights),
    )


def _tells_a_rate(row: HistoryRow) -> bool:
    """Not a version that took over most of its shards from the one before."""
    return row.rows > 0 and row.scoring_s > 0 and (row.version == 1 or row.shards_reused == 0)


def _rows_per_s(row: HistoryRow) -> float:
    return row.rows / row.scoring_s


def _overhead_s(row: HistoryRow) -> float:
    return max(0.0, row.wall_s - row.scoring_s - row.building_s)
