"""What a night on Ray costs beside the same night on local lanes, on the same cores.

    python -m benchmarks.ray_overhead [--rows 100000 1000000 10000000] [--rounds 3]

Starts a Ray cluster of this machine: a head without CPUs, and a node with all of them. Makes users
of the features demo, and scores them in alternation with lanes of one thread: local ones, and
as many on the cluster. Times of a night are those of its report: its start, from process start
until the first lane is there, and all that comes after, to publication: other lanes start in it,
all of them import, score and leave. Writes a Markdown table to standard output; exit 1 when what
comes after the start of the largest night is longer on Ray by more than `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.nights import DATE, report_of
from flows.demo import make_features_demo
from flows.devices import num_cores
from tests.scenarios.ray_nodes import RayNodes

SCORE = Path(sys.executable).with_name("score")
TOLERANCE = 0.10
ROWS = (100_000, 1_000_000, 10_000_000)
RUNNERS = ("local", "ray")


def night(folder: Path, num_rows: int, runner: str, nodes: RayNodes) -> dict[str, Any]:
    """Score so many rows from the beginning; the report."""
    shutil.rmtree(folder / "scores", ignore_errors=True)
    sets = {
        "input.uri": folder / str(num_rows) / "users",
        "model.source": folder / str(num_rows) / "ranking.onnx",
        "engine.store": folder / "engines",
        "output.uri": folder / "scores",
        "lanes.runner": runner,
        "lanes.ray_address": nodes.address,
        "lanes.threads": 1,
        "lanes.count": num_cores(),
    }
    return report_of([str(SCORE)], sets, nodes.environment)


def say(text: str) -> None:
    """A line of the result, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def measure(folder: Path, num_rows: int, rounds: int, nodes: RayNodes) -> dict[str, float]:
    """Median seconds after the start, by runner; a line of the table for each."""
    reports: dict[str, list[dict[str, Any]]] = {runner: [] for runner in RUNNERS}
    for _ in range(rounds):
        for runner in RUNNERS:
            reports[runner].append(night(folder, num_rows, runner, nodes))
    medians = {}
    for runner in RUNNERS:
        start_s = median(report["phases"]["startup_s"] for report in reports[runner])
        total_s = sorted(report["wall_s"] for report in reports[runner])
        after_s = sorted(
            report["wall_s"] - report["phases"]["startup_s"] for report in reports[runner]
        )
        medians[runner] = median(after_s)
        say(
            f"| {num_rows:,} | {runner} | {start_s:.2f} | {median(after_s):.2f} "
            f"({after_s[0]:.2f} to {after_s[-1]:.2f}) | {median(total_s):.2f} "
            f"({total_s[0]:.2f} to {total_s[-1]:.2f}) |"
        )
    return medians


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))  # the cluster ends with us
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="Where data goes, and stays; a temporary one by default.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        for num_rows in arguments.rows:
            if not (folder / str(num_rows)).exists():
                make_features_demo(str(folder / str(num_rows)), DATE, num_rows)
        nodes = RayNodes()
        try:
            nodes.add(num_cores())
            for runner in RUNNERS:  # builds engines, fills the page cache
                night(folder, min(arguments.rows), runner, nodes)
            say("| rows | runner | start s | after it s, median (range) | total s (range) |")
            say("|--:|---|--:|--:|--:|")
            for num_rows in sorted(arguments.rows):
                found = measure(folder, num_rows, arguments.rounds, nodes)
        finally:
            nodes.close()
    over = found["ray"] / found["local"] - 1
    say("")
    say(f"After its first lane is there, the largest night takes {over:+.1%} on Ray.")
    sys.exit(over > TOLERANCE)


if __name__ == "__main__":
    main()
