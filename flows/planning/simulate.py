"""`score plan --simulate`: nights that have not been, forecast from the last one that has."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.lanes import GROUPS_PER_LANE
from flows.night import price_of
from flows.planning.plan import plan_facts, render_plan
from pipeline import report_words as words
from pipeline.config import Job
from pipeline.errors import ConfigError
from pipeline.fleet import THREAD_TASK_S, Fleet, Workload
from pipeline.fleet_search import Forecast, fewest_lanes, forecast
from pipeline.ledger import Ledger
from pipeline.publish import find_report
from pipeline.rates import Rates, measure_rates, most_telling
from pipeline.report import Price, RunReport
from pipeline.storage import Storage, open_storage
from pipeline.versions import find_published

Facts = dict[str, Any]

ROWS = (100_000_000, 10_000_000_000)
"""Forecast besides the plan's own rows, unless others are asked for."""
MAX_ROWS = 10**12
DAYS_BACK = 366
"""How far a past night is looked for; each day costs one request."""
RECENT_DAYS = 35
"""How far before the last night one is looked for that tells more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationRequest:
    """What is asked of a simulation."""

    rows: tuple[int, ...] = ()
    """Empty: the plan's own and `ROWS`."""
    lanes: tuple[int, ...] = ()
    """Empty: as many as the night had whose rates are used."""
    window_h: float = 4.0
    """Hours that a night may take."""
    interruptions_per_h: float = 0.0
    """How often a spot machine is taken away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the last night of a job tells about the next."""

    rates: Rates
    price: Price
    rows_at_risk: float
    """Of a lane; see pipeline/block_size.py."""
    files_per_shard: float
    build_s: float
    """In `rates.engine_s`: what building the engine will take, if it is not stored."""

    def work(self, rows: int) -> Workload:
        """So many rows, cut as that night's."""
        return Workload(
            rows=rows,
            rows_per_shard=self.rates.rows_per_shard,
            rows_at_risk=self.rows_at_risk,
            files_per_shard=self.files_per_shard,
        )


def parse_counts(option: str, texts: Sequence[str], largest: int) -> tuple[int, ...]:
    """Whole numbers from `8`, `1_000` or `1e10`, sorted, each once.

    Raises:
        ConfigError: One of them is none, or is not from 1 to `largest`.
    """
    found = set()
    for text in texts:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not (1 <= number <= largest and number.is_integer()):
            raise ConfigError(
                f"{option}: {text!r}; expected a whole number from 1 to {largest:,}, such as 8 "
                "or 1e8."
            )
        found.add(int(number))
    return tuple(sorted(found))


def simulation_facts(job: Job, date: str, request: SimulationRequest) -> Facts:
    """The plan of `date`, and under `simulation` what it and larger nights would take.

    Raises:
        ConfigError: No night of the job has been published on that date or in the year before.
    """
    facts = plan_facts(job, date)
    output = open_storage(job.output.uri)
    report = telling_night(output, job.name, date)
    measured = measure(output, report, engine_cached=facts["engine"] is not None)
    price = _price(job, date, report.cost.price)
    rates = replace(measured.rates, usd_per_hour=price.usd_per_hour)
    measured = replace(measured, rates=rates, price=price)
    simulation = {
        "from": source_facts(report, rates),
        "price": asdict(price),
        "rates": asdict(rates),
        "rows_at_risk": measured.rows_at_risk,
        "window_h": request.window_h,
        "interruptions_per_h": request.interruptions_per_h,
        "engine_cached": facts["engine"] is not None,
        "build_s": measured.build_s,
        "forecasts": [
            line
            for rows in request.rows or sorted({facts["rows"], *ROWS})
            for line in _forecasts(measured, rows, request)
        ],
    }
    return {**facts, "simulation": simulation}


def _price(job: Job, date: str, night: Price) -> Price:
    """The job's; or the night's, if that is the same for several machines or for a part of one."""
    price = price_of(job, date)
    is_same = (night.instance, night.market) == (price.instance, price.market)
    return night if is_same and night.source.startswith(f"{price.source}; ") else price


def source_facts(report: RunReport, rates: Rates) -> Facts:
    """Of the night whose rates are used; its rows and shards are those that were measured."""
    return {
        "run_id": report.run_id,
        "date": report.date,
        "device": report.device,
        "rows": rates.measured_rows,
        "shards": rates.measured_shards,
        "price": asdict(report.cost.price),
    }


def telling_night(output: Storage, job: str, date: str) -> RunReport:
    """The newest night that tells rates; those of a few rows are passed over if another does.

    Raises:
        ConfigError: No night has been published on that date or in the year before.
    """
    last = next(past_reports(output, job, date), None)
    if last is None:
        raise no_night(output, job, date)
    return most_telling(past_reports(output, job, last.date, RECENT_DAYS)) or last


def past_reports(
    output: Storage, job: str, date: str, days: int = DAYS_BACK
) -> Iterator[RunReport]:
    """Of published nights that scored all rows themselves, `days` back from `date`, last first.

    A version that took over rows scored those that the one before could not: few, and others.
    """
    day = datetime.date.fromisoformat(date)
    for age in range(days + 1):
        past = (day - datetime.timedelta(days=age)).isoformat()
        report = find_report(output, job, past)
        if report is None or report.rows_taken_over:
            continue
        if report.shards > report.shards_reused:
            yield report


def no_night(output: Storage, job: str, date: str) -> ConfigError:
    """For a job of which there is nothing to measure."""
    day = datetime.date.fromisoformat(date)
    past = (day - datetime.timedelta(days=DAYS_BACK)).isoformat()
    return ConfigError(
        f"{output.uri}/{job}: no night published from {past} to {date}; expected one to take "
        "measured rates from. Run `score run JOB --date D` for some date first; a part of the rows "
        "is enough."
    )


def measure(output: Storage, report: RunReport, *, engine_cached: bool) -> Measured:
    """The rates of a published night, and what its interruption would have cost."""
    published = find_published(output, report.job, report.date)
    records = published.records() if published else {}
    build_s = 0.0 if engine_cached else report.engine.build_s
    rates = measure_rates(report, records, build_s)
    attempts = Ledger(output, report.job, report.run_id).attempts()
    known = [each.rows_at_risk for each in attempts if each.rows_at_risk is not None]
    at_risk = known[-1] / report.num_lanes if known else rates.rows_per_shard
    files = len({record.file for record in records.values()})
    return Measured(
        rates=rates,
        price=report.cost.price,
        rows_at_risk=at_risk,
        files_per_shard=files / len(records),
        build_s=build_s,
    )


def _forecasts(measured: Measured, rows: int, request: SimulationRequest) -> list[Facts]:
    """One for each number of lanes, and one with the fewest lanes that fit the window."""
    rates, work = measured.rates, measured.work(rows)
    window_s = request.window_h * 3600
    fleet = Fleet(
        lanes=rates.lanes_per_machine,
        groups_per_lane=GROUPS_PER_LANE,
        interruptions_per_h=request.interruptions_per_h,
        task_s=THREAD_TASK_S,
    )
    found = {
        lanes: forecast(rates, work, replace(fleet, lanes=lanes))
        for lanes in request.lanes or (fleet.lanes,)
    }
    fewest = fewest_lanes(rates, work, fleet, window_s=window_s)
    if fewest is not None:
        found.setdefault(fewest.lanes, fewest)
    lines = [_line(each, window_s, fewest) for _, each in sorted(found.items())]
    if fewest is None:
        lines.append({"rows": rows, "lanes": None, "fits": False, "is_fewest": True})
    return lines


def _line(found: Forecast, window_s: float, fewest: Forecast | None) -> Facts:
    return {
        **asdict(found),
        "hours": found.wall_s / 3600,
        "fits": found.wall_high_s <= window_s,
        "is_fewest": fewest is not None and found.lanes == fewest.lanes,
    }


def render_simulation(facts: Facts) -> RenderableType:
    """The plan, the forecasts, and where they come from."""
    found = facts["simulation"]
    table = Table(box=None, pad_edge=False)
    for heading in ("rows", "lanes", "hours", "cost", "per 100,000"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"within {found['window_h']:g} h?")
    for line in found["forecasts"]:
        table.add_row(*_cells(line))
    return Group(render_plan(facts), Text(), table, Text(), Text(_source(found)))


def _cells(line: Facts) -> tuple[str, ...]:
    rows = words.count(line["rows"])
    if line["lanes"] is None:
        return rows, "-", "-", "-", "-", "on no number"
    fits = "yes" if line["fits"] else "no"
    return (
        rows,
        words.count(line["lanes"]),
        words.amount(line["hours"]),
        words.usd(line["usd"]),
        words.usd(line["usd_per_100k"]),
        f"{fits}, fewest" if line["is_fewest"] else fits,
    )


def _source(found: Facts) -> str:
    """Whose rates these are, and what they leave out."""
    price, then = Price(**found["price"]), found["from"]["price"]["instance"]
    each = words.plural(found["rates"]["lanes_per_machine"], "lane")
    lines = [
        *rates_lines(found),
        f"Price: {words.hourly(price)} for {each}; all machines are paid to the end.",
    ]
    if price.instance != then:
        lines.append(f"The rates are those of {words.plain(then)}, which that run was on.")
    if found["interruptions_per_h"]:
        lines.append(f"Each machine is taken away {found['interruptions_per_h']:g} times an hour.")
    lines.append("Not in the model: slower machines, and a disk or network that lanes share.")
    lines.append("For a fleet with a shared store, on other machines: --fleet.")
    return "\n".join(lines)


def rates_lines(found: Facts) -> list[str]:
    """Where rates come from, and what they do not tell."""
    night, rates = found["from"], found["rates"]
    lines = [
        f"Rates: run {night['run_id']}, {words.plural(night['rows'], 'row')} in "
        f"{words.plural(night['shards'], 'shard')} on {night['device']}: "
        f"{rates['rows_per_s']:,.0f} rows/s a lane."
    ]
    lines.append(
        f"Its shards differ by {words.percent(rates['spread'])}."
        if rates["timed_shards"]
        else "It has too few shards: its start-up counts as scoring, and larger nights are faster."
    )
    if not found["engine_cached"]:
        lines.append(
            f"The engine must be built first: {words.duration(found['build_s'])}, as then."
            if found["build_s"]
            else "The engine must be built first; that is not counted, as that run had it stored."
        )
    return lines
