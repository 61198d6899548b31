"""`score plan --fleet`: the cheapest machines that score a night of any size within its window."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flows.lanes import GROUPS_PER_LANE
from flows.planning.plan import plan_facts
from flows.planning.simulate import (
    RECENT_DAYS,
    ROWS,
    Measured,
    measure,
    past_reports,
    source_facts,
    telling_night,
)
from flows.shipped import shipped_config
from pipeline.config import Job
from pipeline.cost import InstancePrice, Market, find_price, load_prices
from pipeline.errors import ConfigError
from pipeline.fleet import RAY_TASK_S, S3, Fleet
from pipeline.fleet_search import Forecast, ceilings, fewest_lanes
from pipeline.rates import Rates, most_telling
from pipeline.report import Price, RunReport
from pipeline.storage import open_storage

Facts = dict[str, Any]

SPOT_INTERRUPTIONS_PER_H = 0.05
"""Assumed: one a day of a machine. AWS lists 5 to 20 in 100 a month for most machines
(https://aws.amazon.com/ec2/spot/instance-advisor/), but those that are short go together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetRequest:
    """What is asked of a fleet."""

    rows: tuple[int, ...]
    """Empty: the plan's own and `ROWS`."""
    window_h: float
    instances: tuple[str, ...]
    """Of the price list; empty: all whose rate is known."""
    market: Market
    rates: Mapping[str, float]
    """Rows a second of a whole machine, for those on which no night was scored."""
    shard_rows: int | None
    """Other shards than those of the last night."""
    interruptions_per_h: float | None
    """Of each machine; None: `SPOT_INTERRUPTIONS_PER_H` on the spot market, none elsewhere."""
    replacement_s: float
    """Seconds until a machine is there for one that was taken away."""
    machine_spread: float
    """Standard deviation of the machines' speeds, relative to their mean."""
    seeds: int
    """Nights of each fleet that are simulated."""

    @property
    def fleet(self) -> Fleet:
        """All but how many lanes it has."""
        usual = SPOT_INTERRUPTIONS_PER_H if self.market == "spot" else 0.0
        given = self.interruptions_per_h
        return Fleet(
            lanes=1,
            groups_per_lane=GROUPS_PER_LANE,
            interruptions_per_h=usual if given is None else given,
            replacement_s=self.replacement_s,
            machine_spread=self.machine_spread,
            task_s=RAY_TASK_S,
            store=S3,
        )


def parse_rates(texts: Sequence[str]) -> dict[str, float]:
    """Rows a second by machine, from `g6.xlarge=5200`.

    Raises:
        ConfigError: One of them is something else.
    """
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        if not name or not 0 < rate < math.inf:
            raise ConfigError(
                f"--rate: {text!r}; expected INSTANCE=ROWS_PER_S, such as g6.xlarge=5200."
            )
        found[name] = rate
    return found


def fleet_facts(job: Job, date: str, request: FleetRequest) -> Facts:
    """The plan of `date`, and under `fleet` what would score it and larger nights.

    Raises:
        ConfigError: No night has been published to take rates from, or a machine has no price.
    """
    facts = plan_facts(job, date)
    output = open_storage(job.output.uri)
    has_engine = facts["engine"] is not None
    last = telling_night(output, job.name, date)
    alike: dict[str, list[RunReport]] = defaultdict(list)
    for report in past_reports(output, job.name, date, RECENT_DAYS):
        alike[report.cost.price.instance].append(report)
    nights = {
        report.cost.price.instance: measure(output, report, engine_cached=has_engine)
        for report in (*map(most_telling, alike.values()), last)
        if report is not None
    }
    base = nights[last.cost.price.instance]
    prices = load_prices(Path(shipped_config("prices.yaml")))
    machines = _machines(nights, base, prices, request)
    fleet = {
        "from": source_facts(last, base.rates),
        "rates": asdict(base.rates),
        "engine_cached": has_engine,
        "build_s": base.build_s,
        "window_h": request.window_h,
        "market": request.market,
        "interruptions_per_h": request.fleet.interruptions_per_h,
        "replacement_s": request.replacement_s,
        "machine_spread": request.machine_spread,
        "store": S3.name,
        "instances": {name: _machine_facts(*each) for name, each in machines.items()},
        "without_rate": sorted(set(request.instances or prices) - set(machines)),
        "nights": [
            _night(machines, rows, request)
            for rows in request.rows or sorted({facts["rows"], *ROWS})
        ],
    }
    return {**facts, "fleet": fleet}


Machines = dict[str, tuple[Measured, Price]]


def _machines(
    nights: Mapping[str, Measured],
    base: Measured,
    prices: dict[str, InstancePrice],
    request: FleetRequest,
) -> Machines:
    """What is known of each machine whose rate is known."""
    for name in (*request.rates, *request.instances):
        find_price(prices, name, request.market)
    found = {}
    for name in {**nights, **request.rates}:
        if request.instances and name not in request.instances:
            continue
        measured = nights.get(name, base)
        is_listed = name in prices  # or it is the job's own, at its own price
        price = find_price(prices, name, request.market) if is_listed else measured.price
        rates = replace(measured.rates, usd_per_hour=price.usd_per_hour)
        if name in request.rates:
            rates = replace(rates, rows_per_s=request.rates[name], lanes_per_machine=1)
        found[name] = (_cut(replace(measured, rates=rates), request.shard_rows), price)
    if not found:
        raise ConfigError(
            f"--instance: no rate of {', '.join(request.instances)} is known; expected one that a "
            "night was scored on. Say what it does: --rate INSTANCE=ROWS_PER_S."
        )
    return found


def _cut(measured: Measured, shard_rows: int | None) -> Measured:
    """The same with other shards, and files large enough for them.

    With larger ones an interruption costs more, and their times are more alike.
    """
    if shard_rows is None:
        return measured
    rates = measured.rates
    larger = shard_rows / rates.rows_per_shard
    at_risk = measured.rows_at_risk - rates.rows_per_shard + shard_rows
    return replace(
        measured,
        rates=replace(rates, rows_per_shard=shard_rows, spread=rates.spread / math.sqrt(larger)),
        rows_at_risk=max(float(shard_rows), at_risk),
        files_per_shard=min(1.0, measured.files_per_shard * larger),
    )


def _machine_facts(measured: Measured, price: Price) -> Facts:
    rates: Rates = measured.rates
    return {
        "rows_per_s": rates.rows_per_s * rates.lanes_per_machine,
        "lanes": rates.lanes_per_machine,
        "rows_per_shard": rates.rows_per_shard,
        "rows_at_risk": measured.rows_at_risk,
        "price": asdict(price),
    }


def _night(machines: Machines, rows: int, request: FleetRequest) -> Facts:
    """The smallest fleet of each machine, and what would stop the cheapest from growing."""
    window_s = request.window_h * 3600
    found: dict[str, Forecast | None] = {}
    for name, (measured, _) in machines.items():
        work = measured.work(rows)
        found[name] = fewest_lanes(
            measured.rates, work, request.fleet, window_s=window_s, seeds=request.seeds
        )
    cheapest = sorted(found.items(), key=lambda item: item[1].usd if item[1] else math.inf)
    measured, _ = machines[cheapest[0][0]]
    limits = ceilings(measured.rates, measured.work(rows), request.fleet, window_s=window_s)
    return {
        "rows": rows,
        "fleets": [
            {"instance": name, "forecast": asdict(each) if each else None}
            for name, each in cheapest
        ],
        "ceilings": [asdict(each) for each in limits],
    }
