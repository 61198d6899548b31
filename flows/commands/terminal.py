"""What all commands share: options, both outputs, and what a signal does."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.errors import GUARDS, Interrupted
from pipeline.start_up import Stop, between_locks, printing

JobPath = Annotated[str, typer.Argument(metavar="JOB", help="Job file (YAML).", show_default=False)]
Date = Annotated[str, typer.Option("--date", help="ISO date of the run, such as 2026-11-20.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, such as output.uri=/tmp/x."),
]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="GUARD",
        help=f"Publish although this guard stopped it: {', '.join(GUARDS)}. May be repeated.",
    ),
]


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def number(help: str, *, min: float = 0.0, max: float | None = None) -> Any:
    """An option that takes a finite number: infinity, and for some typers NaN, is in a range."""
    return typer.Option(help=help, min=min, max=max, callback=_finite)


class _Output(Console):
    """Goes on where there is no room for what is printed."""

    def print(self, *objects: Any, **how: Any) -> None:
        with suppress(OSError) if self.stderr else printing():
            super().print(*objects, **how)


# Names and messages come from data: none of them is markup.
console = _Output(markup=False, emoji=False)
errors = _Output(stderr=True, markup=False, emoji=False)


def load(job: str, overrides: list[str] | None) -> Any:
    """The job of a command."""
    from pipeline.job_file import load_job

    return load_job(job, overrides or [])


def print_json(value: Any) -> None:
    """One JSON object on standard output; what a terminal could take for a command is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        text = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
    print_text(text + "\n")


def print_text(text: str) -> None:
    """As it is, on standard output."""
    with printing():
        sys.stdout.write(text)


def show(facts: Any, render: Callable[[Any], Any], *, as_json: bool) -> None:
    """Print facts as the user asked for them."""
    if as_json:
        print_json(facts)
    else:
        console.print(render(facts))


def show_report(report: Any, *, as_json: bool) -> None:
    """Print a report as the user asked for it."""
    from pipeline.report_text import render_text

    if as_json:
        print_json(report.to_dict())
    else:
        console.print(render_text(report))


def observer(*, quiet: bool) -> Any:
    """Bars on a terminal, lines elsewhere; always on standard error."""
    from flows.progress import LineProgress, LiveProgress

    if errors.is_terminal and not quiet:
        return LiveProgress(errors)
    return LineProgress(
        lambda line: errors.print(line, highlight=False, markup=False, soft_wrap=True)
    )


@contextmanager
def interruptible(kept: str = "committed shards are kept") -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`: lanes end, and exit code 75 says resume."""
    received: list[str] = []

    @between_locks
    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough; cleaning up must not be disturbed
        received.append(signal.Signals(number).name)
        raise Stop(number, stop)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException:
        # In the middle of an import a signal may come out as another error: what counts is
        # that there was one.
        if not received:
            raise
        raise Interrupted(
            f"{received[0]} received; {kept}. Run the same command again to go on."
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
