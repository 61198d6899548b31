"""Measure the demo job from process start to published output; medians of several runs.

    python benchmarks/demo_rate.py [--rows 4000] [--rounds 3] [--folder nightscore-demo]

Data and engine are made before the clock starts: the engine is built once, nights are many. Writes
a Markdown table to standard output, with the machine and the spread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from flows.demo import FIRST_DATE, demo_job
from flows.demo_data import write_pictures


def run_once(folder: str, output: str, date: str) -> dict[str, Any]:
    """One whole `score run` in a process of its own; its report."""
    job = demo_job("demo.yaml", folder)
    command = [
        *(str(Path(sys.executable).with_name("score")), "run", "configs/demo.yaml", "--json"),
        *("--date", date, "--set", f"output.uri={output}"),
        *("--set", f"input.uri={job.input.uri}", "--set", f"engine.store={job.engine.store}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def measure(folder: str, num_rows: int, num_rounds: int) -> list[dict[str, Any]]:
    """Reports of `num_rounds` runs after one that builds the engine."""
    date = FIRST_DATE.isoformat()
    write_pictures(Path(folder, "pictures"), date, num_rows=num_rows)
    reports = []
    for _ in range(num_rounds + 1):
        with tempfile.TemporaryDirectory() as output:
            reports.append(run_once(folder, output, date))
    return reports[1:]


def table(reports: list[dict[str, Any]]) -> str:
    """A Markdown table of medians, with extremes."""
    first = reports[0]

    def spread(values: list[float]) -> str:
        return f"{median(values):,.1f} | {min(values):,.1f} to {max(values):,.1f}"

    busiest = first["bottleneck"]
    lines = [
        f"{datetime.date.today()}, {first['device']}, {first['rows']:,} rows, "
        f"engine {first['engine']['runtime']} {first['engine']['precision']}, "
        f"{len(reports)} runs, bottleneck {busiest}",
        "",
        "| what | median | min to max |",
        "|---|--:|--:|",
        f"| examples/s, everything included | {spread([r['examples_per_sec'] for r in reports])} |",
        f"| wall s | {spread([r['wall_s'] for r in reports])} |",
        f"| scoring s | {spread([r['phases']['score_s'] for r in reports])} |",
        f"| engine alone, rows/s | {spread([r['ceilings']['engine_per_sec'] for r in reports])} |",
        f"| decode alone, rows/s | {spread([r['ceilings']['decode_per_sec'] for r in reports])} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="nightscore-demo")
    args = parser.parse_args()
    sys.stdout.write(table(measure(args.folder, args.rows, args.rounds)) + "\n")


if __name__ == "__main__":
    main()
