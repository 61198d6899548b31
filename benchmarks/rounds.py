"""Interleaved rounds: every contender once in each, in a new order, whatever becomes of others."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from benchmarks.answers import Marker, read_answers
from benchmarks.contenders import Contender
from benchmarks.process_tree import CommandError, Usage, run_measured

Facts = dict[str, Any]
Kind = Literal["full", "startup"]
CLOCK_TOLERANCE_S = 0.1
ROOT = Path(__file__).resolve().parents[1]
SURROUNDINGS = {
    "PEERS_CHECK": "0",
    # A cluster that was killed leaves its address behind, and Ray would look for it.
    "RAY_ADDRESS": "local",
}
"""Variables of every contender's environment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run that ended well."""

    rows: int
    seconds: float
    """By the command's own clock: from the start of its process to the written output."""
    wall_s: float
    """By our clock: from spawn to exit."""
    cpu_s: float
    peak_rss_bytes: int
    other_load_cores: float
    quality: float | None
    """None for the start-up."""
    marked_against: str | None
    engine: str | None
    """What the product scored with; None for a peer."""
    of_limit: float | None = None
    """Share of what its stages allow together that the product reached; None for a peer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a contender; a failed one has an error and no measurement."""

    name: str
    kind: Kind
    round: int
    at: str
    measured: Measured | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What the contenders of a workload are given."""

    rows: Path
    startup_rows: Path
    model: Path
    timeout_s: float

    def input_of(self, kind: Kind) -> Path:
        """The folder of rows for a kind of run."""
        return self.rows if kind == "full" else self.startup_rows


def run_rounds(
    field: Sequence[Contender],
    course: Course,
    num_rounds: int,
    keep: Callable[[Run], None],
    say: Callable[[str], None],
) -> list[Run]:
    """Run every contender on all rows and on a few, `num_rounds` times.

    Args:
        field: Who runs.
        course: On what.
        num_rounds: How many times.
        keep: Is given each run as soon as it is there.
        say: Is told each result in one line.
    """
    jobs: list[tuple[Contender, Kind]] = [(c, k) for c in field for k in ("full", "startup")]
    marker, runs = Marker(), []
    for number in range(num_rounds):
        random.Random(number).shuffle(jobs)
        for contender, kind in jobs:
            run = run_once(contender, kind, course, marker, number)
            runs.append(run)
            keep(run)
            say(f"round {number + 1}, {run.name}, {kind}: {_outcome(run)}")
    return runs


def _outcome(run: Run) -> str:
    found = run.measured
    return f"{found.rows / found.seconds:,.0f} rows/s" if found else f"failed: {run.error}"


def run_once(
    contender: Contender, kind: Kind, course: Course, marker: Marker, number: int = 0
) -> Run:
    """One run, measured and marked; whatever goes wrong is in `Run.error`."""
    at = time.strftime("%FT%T%z")
    with tempfile.TemporaryDirectory(prefix="nightscore-bench-") as scratch:
        output = Path(scratch, "output")
        filled = {"{input}": course.input_of(kind), "{model}": course.model, "{output}": output}
        command = [_fill(word, filled) for word in contender.command]
        try:
            usage = run_measured(
                command, timeout_s=course.timeout_s, environment=SURROUNDINGS, cwd=ROOT
            )
            measured = _judge(contender, kind, course, usage, output, marker)
        except (CommandError, OSError, ValueError, KeyError) as error:
            reason = str(error) if isinstance(error, CommandError) else repr(error)
            return Run(name=contender.name, kind=kind, round=number, at=at, error=reason)
    return Run(name=contender.name, kind=kind, round=number, at=at, measured=measured)


def _fill(word: str, values: dict[str, Path]) -> str:
    for field, value in values.items():
        word = word.replace(field, str(value))
    return word


def _judge(
    contender: Contender, kind: Kind, course: Course, usage: Usage, output: Path, marker: Marker
) -> Measured:
    """The run's figures, once its output was found whole."""
    report = last_object(usage.stdout)
    seconds = report["seconds_total"] if "seconds_total" in report else report["wall_s"]
    if seconds > usage.wall_s + CLOCK_TOLERANCE_S:
        raise CommandError(f"its clock says {seconds:.2f} s of {usage.wall_s:.2f} s from outside")
    table = read_answers(Path(report.get("output", output)), contender.columns)
    expected = count_rows(course.input_of(kind))
    expected = min(expected, contender.max_rows or expected)
    if table.num_rows != expected:
        raise CommandError(f"{table.num_rows:,} rows were written; expected {expected:,}")
    quality, against = marker.mark(contender.name, table) if kind == "full" else (None, None)
    engine, limit = report.get("engine"), report.get("limit")
    return Measured(
        rows=table.num_rows,
        seconds=seconds,
        wall_s=usage.wall_s,
        cpu_s=usage.cpu_s,
        peak_rss_bytes=usage.peak_rss_bytes,
        other_load_cores=usage.other_load_cores,
        quality=quality,
        marked_against=against,
        engine=engine and describe_engine(engine),
        of_limit=limit and limit["reached"],
    )


def last_object(stdout: str) -> Facts:
    """The last JSON object that a command printed on a line of its own.

    Raises:
        CommandError: There is none.
    """
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise CommandError("it printed no JSON object; expected one line with its rows and seconds")
    found: Facts = json.loads(lines[-1])
    return found


def describe_engine(engine: Facts) -> str:
    """Runtime, precision and batch of the engine, and whether the run had to build it."""
    built = ", BUILT IN THIS RUN" if engine["built"] else ""
    what = f"{engine['runtime']} {engine['precision']}, batches of {engine['batch_size']}"
    return f"{what}, agreement with fp32 {engine['agreement']:.4f}{built}"


def count_rows(folder: Path) -> int:
    """Rows of the Parquet files in a folder, from their footers."""
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


def to_json(run: Run) -> str:
    """A run as one line."""
    return json.dumps(asdict(run))


def from_json(line: str) -> Run:
    """The run that `to_json` wrote."""
    facts = json.loads(line)
    measured = facts.pop("measured")
    return Run(**facts, measured=measured and Measured(**measured))
