"""The `score plan` command."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.fleet import (
    Fleet,
    Instances,
    MachineRates,
    MachinesDiffer,
    Market,
    ReplacementS,
    Seeds,
    ShardRows,
)
from flows.commands.terminal import Date, JobPath, Json, Set, load, number, show

MAX_HOURS = 10_000.0
"""Of a simulated night: more than a year."""

Rows = Annotated[
    list[str] | None,
    typer.Option(help="Rows of a simulated night, such as 1e8; may be repeated."),
]
Lanes = Annotated[
    list[str] | None, typer.Option(help="Lanes of a simulated night; may be repeated.")
]


FORECASTS = {"rows", "window_h", "interruptions_per_h"}
USED_BY = {
    "": set[str](),
    "--simulate": FORECASTS | {"lanes"},
    "--fleet": FORECASTS
    | {"instance", "rate", "market", "shard_rows", "replacement_s", "machines_differ", "seeds"},
}
"""Options that only a forecast uses, by the option that asks for it."""


def plan(  # noqa: PLR0913  # each argument is an option of the command
    context: typer.Context,
    job: JobPath,
    date: Date,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Forecast lanes, hours and dollars as well.")
    ] = False,
    rows: Rows = None,
    lanes: Lanes = None,
    window_h: Annotated[
        float, number("Hours that a simulated night may take.", min=0.01, max=MAX_HOURS)
    ] = 4.0,
    interruptions_per_h: Annotated[
        float | None,
        number("How often each machine is taken away.", max=20.0),
    ] = None,
    fleet: Fleet = False,
    instance: Instances = None,
    rate: MachineRates = None,
    market: Market = "spot",
    shard_rows: ShardRows = None,
    replacement_s: ReplacementS = 180.0,
    machines_differ: MachinesDiffer = 0.05,
    seeds: Seeds = 20,
    json: Json = False,
    set: Set = None,
) -> None:
    """Say what a run would do, from footers alone; nothing is written.

    With --simulate also what it, and nights of other sizes, would take on more lanes: from the
    rates that the last published night of the job measured that had shards enough for it. With
    --fleet the cheapest fleet of machines from the price list that scores such nights within
    --window-h, from a shared store.
    """
    from flows.planning.plan import plan_facts, render_plan
    from pipeline.job_file import parse_date

    _refuse_unused(context, simulate=simulate, fleet=fleet)
    loaded, day = load(job, set), parse_date(date)
    if fleet:
        from flows.planning.fleet import FleetRequest, fleet_facts, parse_rates
        from flows.planning.fleet_table import render_fleet
        from flows.planning.simulate import MAX_ROWS, parse_counts

        wanted = FleetRequest(
            rows=parse_counts("--rows", rows or (), MAX_ROWS),
            window_h=window_h,
            instances=tuple(instance or ()),
            market=market,
            rates=parse_rates(rate or ()),
            shard_rows=shard_rows,
            interruptions_per_h=interruptions_per_h,
            replacement_s=replacement_s,
            machine_spread=machines_differ,
            seeds=seeds,
        )
        show(fleet_facts(loaded, day, wanted), render_fleet, as_json=json)
        return
    if not simulate:
        show(plan_facts(loaded, day), render_plan, as_json=json)
        return
    from flows.planning.simulate import (
        MAX_ROWS,
        SimulationRequest,
        parse_counts,
        render_simulation,
        simulation_facts,
    )
    from pipeline.fleet_search import MAX_LANES

    request = SimulationRequest(
        rows=parse_counts("--rows", rows or (), MAX_ROWS),
        lanes=parse_counts("--lanes", lanes or (), MAX_LANES),
        window_h=window_h,
        interruptions_per_h=interruptions_per_h or 0.0,
    )
    show(simulation_facts(loaded, day, request), render_simulation, as_json=json)


def _refuse_unused(context: typer.Context, *, simulate: bool, fleet: bool) -> None:
    """An option that changes nothing was meant for something."""
    from pipeline.errors import ConfigError

    if simulate and fleet:
        raise ConfigError("--simulate: together with --fleet; expected one of them.")
    used = USED_BY["--fleet" if fleet else "--simulate" if simulate else ""]
    for name in sorted(set[str]().union(*USED_BY.values()) - used):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            users = " or ".join(user for user, names in USED_BY.items() if name in names)
            raise ConfigError(f"{option}: not used here; expected it with {users}.")
