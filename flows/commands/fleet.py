"""Options of `score plan --fleet`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.commands.terminal import number

Fleet = Annotated[
    bool, typer.Option("--fleet", help="Find the cheapest machines for it, and for larger nights.")
]
Instances = Annotated[
    list[str] | None,
    typer.Option(help="Machine of the price list for --fleet; may be repeated. All with a rate."),
]
MachineRates = Annotated[
    list[str] | None,
    typer.Option(
        metavar="INSTANCE=ROWS_PER_S",
        help="What a machine of --fleet scores, if no night was scored on one; may be repeated.",
    ),
]
Market = Annotated[Literal["on_demand", "spot"], typer.Option(help="Whose prices --fleet takes.")]
ShardRows = Annotated[
    int | None, typer.Option(help="Rows of a shard for --fleet, as lanes.shard_rows.", min=1)
]
ReplacementS = Annotated[float, number("Seconds until a machine is there for one taken away.")]
MachinesDiffer = Annotated[float, number("Standard deviation of machines' speeds.", max=1.0)]
Seeds = Annotated[
    int, typer.Option(help="Nights that --fleet simulates of each fleet.", min=1, max=1000)
]
