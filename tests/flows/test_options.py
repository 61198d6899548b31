"""Options that cannot mean anything, alone or together, are refused before anything is done."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from flows.cli import run_command
from flows.commands.app import app

DATE = "2026-11-20"
Refused = Callable[..., str]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], features_job: Path
) -> Refused:
    """Runs a command on a job in this process: it is wrong use; what it says is given."""

    def call(command: str, *arguments: str) -> str:
        words = ["score", command, str(features_job), *arguments, "--json"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            run_command()
        assert stop.value.code == 2
        return str(json.loads(capsys.readouterr().out)["error"])

    return call


def number_options() -> Iterator[Any]:
    """Every option of a command that takes a number with a fraction."""
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    for command in (command for group in groups for command in group.registered_commands):
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_args(hint) and get_args(hint)[0] in (float, float | None):
                yield pytest.param(get_args(hint)[1], id=f"{command.callback.__name__} {name}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("option", [*number_options()])
def test_a_number_without_end_is_refused_by_every_option(option: Any, value: float) -> None:
    with pytest.raises(typer.BadParameter, match="is not a finite number"):
        option.callback(value)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (("gc",), "--older-than-days", "nan"),
        (("plan", "--date", DATE, "--simulate"), "--window-h", "1e308"),
        (("backfill", "--from", DATE, "--to", DATE, "--dry-run"), "--max-usd", "inf"),
    ],
)
def test_a_number_without_end_is_wrong_use(
    refused: Refused, command: tuple[str, ...], option: str, value: str
) -> None:
    assert f"Invalid value for '{option}'" in refused(*command, option, value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lanes", "3"), "--lanes: not used here; expected it with --simulate."),
        (("--lanes", "3", "--fleet"), "--lanes: not used here; expected it with --simulate."),
        (("--rows=9",), "--rows: not used here; expected it with --simulate or --fleet."),
        (("--simulate", "--seeds", "3"), "--seeds: not used here; expected it with --fleet."),
        (("--simulate", "--fleet"), "--simulate: together with --fleet; expected one of them."),
    ],
)
def test_an_option_that_a_plan_would_not_use_is_refused(
    refused: Refused, arguments: tuple[str, ...], said: str
) -> None:
    assert refused("plan", "--date", DATE, *arguments) == said


@pytest.mark.parametrize("other", [("--send",), ("--date", DATE)])
def test_a_table_of_nights_is_no_report_of_one(refused: Refused, other: tuple[str, ...]) -> None:
    assert f"--last: together with {other[0]}" in refused("report", "--last", "3", *other)


@pytest.mark.parametrize("command", ["report", "status", "run"])
def test_an_empty_date_is_no_date(refused: Refused, command: str) -> None:
    assert refused(command, "--date", "").startswith("date: ''; expected an ISO date")
