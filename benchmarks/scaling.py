"""How the product scales: its memory over the number of pictures, its speed over rows and lanes.

    python -m benchmarks.scaling [--parts memory rows lanes] [--rounds 3]

Each point is a whole `score run` in a process of its own, in interleaved rounds; medians. The
40,000 pictures are the 4,000 of `make bench`, ten times as links under other names.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.compare import add_places, find_places, say
from benchmarks.contenders import HERE, PRODUCT, WORKLOADS, Places, product_command
from benchmarks.prepare import (
    PrepareError,
    build_engine,
    make_environments,
    make_models,
    make_rows,
)
from benchmarks.process_tree import CommandError, adopt_orphans, run_measured
from benchmarks.rounds import ROOT, count_rows, last_object
from engines.devices import this_cpu
from flows.devices import num_cores
from flows.measuring.bench_setup import machine_facts

COPIES = 10
FEATURE_ROWS = (10**3, 10**4, 10**5, 10**6, 10**7)
ALLOWED_GROWTH = 1.1
HEADINGS = (
    *("measured", "input", "rows", "lanes x threads", "examples/s", "wall s", "CPU s / 1,000 rows"),
    "peak RSS MiB",
)
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What one `score run` is given."""

    part: str
    workload: str
    rows: Path
    threads: int
    """Of each lane."""
    lanes: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one run of a point used."""

    num_rows: int
    seconds: float
    """Process start to publication."""
    cpu_s: float
    peak_rss_bytes: int


def main() -> None:
    """Measure all points, and write the record."""
    options = parse_options()
    adopt_orphans()
    try:
        points = prepare(options)
        found = measure(points, options)
    except (PrepareError, CommandError) as error:
        sys.exit(f"benchmarks: {error}")
    machine = machine_facts(this_cpu(num_cores()), None)
    day = machine["date"][:10]
    where = f"{day}, {machine['cpu']}, {machine['cores']} cores"
    text = to_markdown(found, where, machine["git_revision"] or "unknown", options.rounds)
    whole = {*options.parts} == {*POINTS} and not options.rows
    folder = HERE if whole else options.work
    record = folder / f"{day}-scaling-{machine['cores']}-cores.md"
    record.write_text(text, encoding="utf-8")
    say(f"{text}\nwritten: {record}")


def prepare(options: argparse.Namespace) -> list[Point]:
    """The rows and engines of all points, made where they are missing."""
    places = options.places
    make_environments(["base"], places, say)
    make_models(options.photos, places, say)
    points = [point for part in options.parts for point in POINTS[part](options)]
    # An engine belongs to a number of threads, too: those of all lanes together.
    keys = {point: (point.workload, point.threads * point.lanes) for point in points}
    for key in dict.fromkeys(keys.values()):
        own = [point for point in points if keys[point] == key]
        largest = max(own, key=lambda point: count_rows(point.rows))
        build_engine(WORKLOADS[largest.workload], largest.rows, places, say, settings_of(largest))
    return points


def settings_of(point: Point) -> list[str]:
    """What a point changes in its job."""
    return ["--set", f"lanes.count={point.lanes}", "--set", f"lanes.threads={point.threads}"]


def memory_points(options: argparse.Namespace) -> list[Point]:
    """The pictures, and ten times the pictures."""
    once = rows_of("photos", options.rows, options)
    sets, cores = (once, link_copies(once)), num_cores()
    return [Point(part="memory", workload="photos", rows=rows, threads=cores) for rows in sets]


def rows_points(options: argparse.Namespace) -> list[Point]:
    """Users from a thousand to ten million."""
    counts = [count for count in FEATURE_ROWS if count <= (options.rows or count)]
    sets, cores = [rows_of("features", count, options) for count in counts], num_cores()
    return [Point(part="rows", workload="features", rows=rows, threads=cores) for rows in sets]


def lanes_points(options: argparse.Namespace) -> list[Point]:
    """Both workloads on one core, on all cores in one lane, and on all cores as lanes."""
    sets, cores = {name: rows_of(name, options.rows, options) for name in WORKLOADS}, num_cores()
    return [
        Point(part="lanes", workload=name, rows=rows, lanes=lanes, threads=threads)
        for name, rows in sets.items()
        for lanes, threads in dict.fromkeys([(1, 1), (1, cores), (cores, 1)])
    ]


POINTS = {"memory": memory_points, "rows": rows_points, "lanes": lanes_points}


def rows_of(name: str, num_rows: int, options: argparse.Namespace) -> Path:
    """The folder of so many rows; 0: as many as `make bench` scores."""
    workload = WORKLOADS[name]
    return make_rows(workload, num_rows or workload.num_rows, options.photos, options.places, say)


def link_copies(rows: Path) -> Path:
    """A folder with every file of `rows` ten times, as links: no byte is copied."""
    folder = rows.with_name(f"{rows.name}-times-{COPIES}")
    folder.mkdir(exist_ok=True)
    for path in sorted(rows.glob("*.parquet")):
        for copy in range(COPIES):
            link = folder / f"{path.stem}-{copy}.parquet"
            if not link.exists():
                os.link(path.resolve(), link)
    return folder


def measure(points: Sequence[Point], options: argparse.Namespace) -> dict[Point, list[Found]]:
    """Every point once a round, in a new order each time."""
    found: dict[Point, list[Found]] = {point: [] for point in points}
    for number in range(options.rounds):
        order = list(points)
        random.Random(number).shuffle(order)
        for point in order:
            one = run_point(point, options.places)
            found[point].append(one)
            say(
                f"round {number + 1}, {point.part}, {point.workload}, {one.num_rows:,} rows "
                f"on {point.lanes} x {point.threads}: {one.num_rows / one.seconds:,.0f} rows/s, "
                f"{one.peak_rss_bytes / MIB:,.0f} MiB"
            )
    return found


def run_point(point: Point, places: Places) -> Found:
    """One `score run`.

    Raises:
        CommandError: It failed, or scored other rows than it was given.
    """
    source = str(places.data / "models" / WORKLOADS[point.workload].product_model)
    command = product_command(["run"], point.workload, places, source)
    with tempfile.TemporaryDirectory(prefix="nightscore-scaling-") as output:
        own = ["--set", f"output.uri={output}", *settings_of(point)]
        filled = [word.replace("{input}", str(point.rows)) for word in command]
        usage = run_measured([*filled, *own], timeout_s=1800, cwd=ROOT)
    report, expected = last_object(usage.stdout), count_rows(point.rows)
    if report["engine"]["built"]:
        raise CommandError(f"{PRODUCT} built an engine while the clock ran; expected it built")
    if report["scored"] != expected:
        raise CommandError(f"{PRODUCT} scored {report['scored']:,} rows; expected {expected:,}")
    return Found(
        num_rows=expected,
        seconds=report["wall_s"],
        cpu_s=usage.cpu_s,
        peak_rss_bytes=usage.peak_rss_bytes,
    )


def to_markdown(found: dict[Point, list[Found]], where: str, revision: str, num_rounds: int) -> str:
    """The record: one table, and whether memory stays flat."""
    lines = [
        "# How nightscore scales",
        "",
        f"{where}, revision {revision}. Command: `make bench-scaling`, "
        + ("1 round." if num_rounds == 1 else f"{num_rounds} interleaved rounds, medians."),
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---|---|" + "--:|" * (len(HEADINGS) - 2),
    ]
    lines += [_row(point, runs) for point, runs in found.items()]
    peaks = [peak_bytes(runs) for point, runs in found.items() if point.part == "memory"]
    if peaks:
        growth = peaks[1] / peaks[0]
        verdict = "reached" if growth <= ALLOWED_GROWTH else "NOT reached"
        lines += [
            "",
            f"Memory: {COPIES} times the pictures take {growth:.3f} times the memory; asked: at "
            f"most {ALLOWED_GROWTH:g}: {verdict}.",
        ]
    return "\n".join([*lines, ""])


def _row(point: Point, runs: Sequence[Found]) -> str:
    num_rows, seconds = runs[0].num_rows, median(run.seconds for run in runs)
    cpu_s = median(run.cpu_s for run in runs)
    return (
        f"| {point.part} | {point.workload} | {num_rows:,} | {point.lanes} x {point.threads} "
        f"| {num_rows / seconds:,.0f} | {seconds:.2f} | {cpu_s / num_rows * 1000:.4g} "
        f"| {peak_bytes(runs) / MIB:,.0f} |"
    )


def peak_bytes(runs: Sequence[Found]) -> float:
    """Median over the rounds of the process tree's peak."""
    return median(run.peak_rss_bytes for run in runs)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, help="smoke test: no more rows than this")
    add_places(parser)
    options = parser.parse_args()
    options.places = find_places(options)
    return options


if __name__ == "__main__":
    main()
