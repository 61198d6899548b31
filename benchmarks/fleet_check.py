"""Hold the simulation against nights that are really run: on 1 and 2 lanes, with and without kills.

    python benchmarks/fleet_check.py [--from-rows 4000000] [--rows 8000000] [--rounds 3]

Makes users of the features demo for two dates. In each round, and for each number of lanes, the
first date is scored to measure rates, and the second twice: undisturbed, and with a `kill -9` of
all its processes when half of its shards are committed, followed by the same command. All three go
to new folders. The forecast of a round rests on that round's rates, so that a machine which is slow
for a while is slow in both; it knows nothing of the night itself. Times are from process start to
publication. Writes a Markdown table to standard output; exit 1 when a median ratio is off by more
than `TOLERANCE`.

Lanes on a CPU share its cores: rates for two lanes are those of a night on two lanes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from flows.demo import make_features_demo
from flows.demo_data import USERS_ROW_GROUP_ROWS
from flows.lanes import GROUPS_PER_LANE
from flows.planning.simulate import Measured, measure
from pipeline.config import Job
from pipeline.fleet import THREAD_TASK_S, Fleet, phases_of
from pipeline.report import RunReport, report_from_dict
from pipeline.simulate import SEED, simulate
from pipeline.storage import open_storage

CONFIG = Path(__file__).parents[1] / "configs" / "demo-features.yaml"
RATES_DATE, NIGHT_DATE = "2026-11-01", "2026-11-02"
SEEDS = 50
"""Simulated nights behind each forecast: what a kill loses is left to chance."""
TOLERANCE = 0.10
POLL_S = 0.002


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One night, forecast and run."""

    forecast_s: float
    measured_s: float


class Nights:
    """Commands that score dates of the features demo, each into a folder of its own."""

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder, self._job = folder, job
        self._output = folder / "scores"

    def run(self, date: str, lanes: int) -> RunReport:
        """Score a date from the beginning."""
        shutil.rmtree(self._output, ignore_errors=True)
        return self._report(self._start(date, lanes))

    def rates(self, lanes: int) -> Measured:
        """What a night on so many lanes measures."""
        report = self.run(RATES_DATE, lanes)
        return measure(open_storage(str(self._output)), report, engine_cached=True)

    def run_killed(self, date: str, lanes: int, num_shards: int) -> float:
        """Kill a night at half of its shards, and run it again; seconds of both."""
        shutil.rmtree(self._output, ignore_errors=True)
        began = time.monotonic()
        first = self._start(date, lanes)
        while len(list(self._output.glob("*/_runs/*/commits/[!.]*.json"))) < num_shards / 2:
            if first.poll() is not None:
                sys.exit("the night ended before it could be killed; give it more --rows")
            time.sleep(POLL_S)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        again = time.monotonic()
        return again - began + attempt_s(self._report(self._start(date, lanes)))

    def _start(self, date: str, lanes: int) -> subprocess.Popen[str]:
        sets = {
            "input.uri": self._job.input.uri,
            "model.source": self._job.model.source,
            "engine.store": self._job.engine.store,
            "output.uri": self._output,
            # Shards of one row group: enough of them to measure a rate.
            "lanes.shard_rows": USERS_ROW_GROUP_ROWS,
            "lanes.count": lanes,
        }
        options = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        program = Path(sys.executable).with_name("score")
        return subprocess.Popen(
            [str(program), "run", str(CONFIG), "--date", date, "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _report(self, process: subprocess.Popen[str]) -> RunReport:
        out, said = process.communicate()
        if process.returncode != 0:
            sys.exit(said)
        values = json.loads(out)
        path = self._output / self._job.name / f"dt={values['date']}" / "_report.json"
        return report_from_dict(json.loads(path.read_text(encoding="utf-8")))


def attempt_s(report: RunReport) -> float:
    """Seconds of the attempt that published."""
    phases = report.phases
    parts = (phases.startup_s, phases.plan_s, phases.engine_s, phases.score_s, phases.publish_s)
    return sum(parts)


def forecast_s(measured: Measured, rows: int, *, killed: bool) -> float:
    """Median of simulated nights on the machine that was measured."""
    rates, work = measured.rates, measured.work(rows)
    lanes = rates.lanes_per_machine
    fleet = Fleet(lanes=lanes, groups_per_lane=GROUPS_PER_LANE, task_s=THREAD_TASK_S)
    half_s = phases_of(rates, work, fleet.store).before_s + rows / 2 / (rates.rows_per_s * lanes)
    kills_s = (half_s,) if killed else ()
    return median(
        simulate(rates, work, fleet, seed=SEED + seed, kills_s=kills_s).wall_s
        for seed in range(SEEDS)
    )


def check(nights: Nights, lane_counts: Sequence[int], rows: int, rounds: int) -> list[str]:
    """Lines of the table; the last of each says whether it is within the tolerance."""
    nights.run(RATES_DATE, 1)  # builds the engine, fills the page cache
    trials: dict[tuple[int, str], list[Trial]] = {}
    for _ in range(rounds):
        for lanes in lane_counts:
            measured = nights.rates(lanes)
            calm = nights.run(NIGHT_DATE, lanes)
            both_s = nights.run_killed(NIGHT_DATE, lanes, calm.shards)
            for kill, seconds in (("no", attempt_s(calm)), ("half-way", both_s)):
                expected_s = forecast_s(measured, rows, killed=kill != "no")
                trial = Trial(forecast_s=expected_s, measured_s=seconds)
                trials.setdefault((lanes, kill), []).append(trial)
    return [_line(lanes, kill, rows, found) for (lanes, kill), found in sorted(trials.items())]


def _line(lanes: int, kill: str, rows: int, trials: Sequence[Trial]) -> str:
    ratios = [trial.forecast_s / trial.measured_s for trial in trials]
    forecasts = ", ".join(f"{trial.forecast_s:.2f}" for trial in trials)
    measured = ", ".join(f"{trial.measured_s:.2f}" for trial in trials)
    is_near = abs(median(ratios) - 1) <= TOLERANCE
    return (
        f"| {lanes} | {kill} | {rows:,} | {forecasts} | {measured} | {median(ratios):.2f} "
        f"| {'yes' if is_near else 'no'} |"
    )


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from-rows", type=int, default=4_000_000)
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_features_demo(folder, RATES_DATE, args.from_rows)
        job = make_features_demo(folder, NIGHT_DATE, args.rows)
        lines = check(Nights(Path(folder), job), args.lanes, args.rows, args.rounds)
    heading = [
        f"{datetime.date.today()}, rates from {args.from_rows:,} rows, {args.rounds} rounds",
        "",
        f"| lanes | kill | rows | forecast s | measured s | ratio | within {TOLERANCE:.0%} |",
        "|--:|---|--:|--:|--:|--:|---|",
    ]
    sys.stdout.write("\n".join([*heading, *lines]) + "\n")
    sys.exit(any(line.endswith("| no |") for line in lines))


if __name__ == "__main__":
    main()
