"""Hold `score plan --simulate` against nights that are then really run.

    python benchmarks/simulate_check.py [--from-rows 1000000] [--rows 2000000 4000000 8000000]

Makes users of the features demo, runs one night to build the engine and another to measure rates,
forecasts all sizes from that one, and then runs them. Every night is a `score run` in a process of
its own; times are from process start to publication. Writes a Markdown table to standard output;
under two minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.demo import make_features_demo
from flows.demo_data import USERS_ROW_GROUP_ROWS

FIRST_DAY = datetime.date(2026, 11, 1)
CONFIG = Path(__file__).parents[1] / "configs" / "demo-features.yaml"


class Nights:
    """Nights of the features demo below one folder, each on the next date."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._day = FIRST_DAY

    def make(self, num_rows: int) -> None:
        """The rows of the next night."""
        self._day += datetime.timedelta(days=1)
        job = make_features_demo(str(self._folder), self._day.isoformat(), num_rows)
        self._sets = [
            f"input.uri={job.input.uri}",
            f"model.source={job.model.source}",
            f"engine.store={job.engine.store}",
            f"output.uri={job.output.uri}",
            # Shards of one row group: enough of them to measure a rate, even in the first night.
            f"lanes.shard_rows={USERS_ROW_GROUP_ROWS}",
        ]

    def run(self) -> dict[str, Any]:
        """Score the night; its report."""
        return self._score("run")

    def forecast(self, sizes: Sequence[int]) -> dict[str, Any]:
        """What nights of these sizes would take, by the last night that was run."""
        rows = [part for size in sizes for part in ("--rows", str(size))]
        simulation: dict[str, Any] = self._score("plan", "--simulate", *rows)["simulation"]
        return simulation

    def _score(self, command: str, *more: str) -> dict[str, Any]:
        program = Path(sys.executable).with_name("score")
        arguments = [command, str(CONFIG), "--date", self._day.isoformat(), "--json", *more]
        sets = [part for text in self._sets for part in ("--set", text)]
        done = subprocess.run(
            [str(program), *arguments, *sets], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(done.stderr)
        value: dict[str, Any] = json.loads(done.stdout)
        return value


def check(folder: Path, from_rows: int, sizes: Sequence[int]) -> str:
    """Forecasts and measurements as Markdown."""
    nights = Nights(folder)
    for _ in ("builds the engine", "measures rates"):
        nights.make(from_rows)
        first = nights.run()
    found = nights.forecast(sizes)
    rates = found["rates"]
    lines = [
        f"{datetime.date.today()}, {first['device']}, {USERS_ROW_GROUP_ROWS:,} rows a shard. "
        f"Rates from {first['rows']:,} rows in {first['wall_s']:.2f} s: "
        f"{rates['rows_per_s']:,.0f} rows/s a lane, shards differ by {rates['spread']:.1%}, "
        f"start-up {rates['startup_s']:.2f} s, warm-up {rates['warmup_s']:.2f} s.",
        "",
        "| rows | forecast s | measured s | forecast / measured | scoring: forecast s "
        "| measured s |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    forecasts = {
        line["rows"]: line
        for line in found["forecasts"]
        if line["lanes"] == rates["lanes_per_machine"]
    }
    for size in sizes:
        nights.make(size)
        report, line = nights.run(), forecasts[size]
        lines.append(
            f"| {size:,} | {line['wall_s']:.2f} | {report['wall_s']:.2f} "
            f"| {line['wall_s'] / report['wall_s']:.2f} "
            f"| {line['score_s']:.2f} | {report['phases']['score_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from-rows", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000, 4_000_000, 8_000_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(check(Path(folder), args.from_rows, args.rows) + "\n")


if __name__ == "__main__":
    main()
