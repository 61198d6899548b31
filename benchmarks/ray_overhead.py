"""What a night on Ray costs beside the same night on local lanes, on the same cores.

    python benchmarks/ray_overhead.py [--rows 1000000] [--more-rows 10000000] [--rounds 3]

Starts a Ray cluster of this machine: a head without CPUs, and a node with all of them. Makes users
of the features demo, and scores each date in alternation with lanes of one thread: local ones, and
as many on the cluster. Times of a night are those of its report, in seconds: from process start
until the first lane is there, and from then to publication. What a night takes whatever its size
(Ray starts workers, and they their lanes) is told from what rows take by two sizes of it. Writes a
Markdown table to standard output; exit 1 when rows take longer on Ray by more than `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from flows.demo import make_features_demo
from flows.devices import num_cores

CONFIG = Path(__file__).parents[1] / "configs" / "demo-features.yaml"
BIN = Path(sys.executable).parent
TOLERANCE = 0.10
START_TIMEOUT_S = 90.0
DATES = ("2026-11-01", "2026-11-02")
"""Of the smaller and of the larger night."""
RUNNERS = ("local", "ray")


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray cluster of this machine; the variables by which a driver finds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment = {**os.environ, **token, "RAY_USAGE_STATS_ENABLED": "0"}
    started: list[subprocess.Popen[bytes]] = []
    head = ("--head", f"--port={address.rpartition(':')[2]}", "--num-cpus=0")
    try:
        for options in (head, (f"--address={address}", f"--num-cpus={num_cores()}")):
            log = folder / f"ray{len(started)}.log"
            with log.open("wb") as output:
                command = [str(BIN / "ray"), "start", "--block", *options]
                started.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
            deadline = time.monotonic() + START_TIMEOUT_S
            while b"Ray runtime started" not in log.read_bytes():
                if started[-1].poll() is not None or time.monotonic() > deadline:
                    sys.exit(log.read_text()[-3000:])
                time.sleep(0.1)
        yield {**token, "RAY_ADDRESS": address}
    finally:
        for node in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
            node.wait()


def night(folder: Path, date: str, runner: str, environment: dict[str, str]) -> dict[str, Any]:
    """Score a date from the beginning; its report."""
    shutil.rmtree(folder / "scores", ignore_errors=True)
    sets = {
        "input.uri": folder / "users",
        "model.source": folder / "ranking.onnx",
        "engine.store": folder / "engines",
        "output.uri": folder / "scores",
        "limits.max_quarantined": 1.0,
        "lanes.device": "cpu",
        "lanes.runner": runner,
        "lanes.threads": 1,
        "lanes.count": num_cores(),
    }
    options = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    command = [str(BIN / "score"), "run", str(CONFIG), "--date", date, "--json", *options]
    ended = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if ended.returncode != 0:
        sys.exit(ended.stderr)
    report: dict[str, Any] = json.loads(ended.stdout)
    assert report["num_lanes"] == num_cores(), report["device"]
    return report


def say(text: str) -> None:
    """A line of the result, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def measure(
    folder: Path, rows: tuple[int, int], rounds: int, environment: dict[str, str]
) -> dict[tuple[str, str], float]:
    """Median seconds after the start, by runner and date; a line of the table for each."""
    say("| rows | runner | start s | after it s, median (range) |")
    say("|--:|---|--:|--:|")
    medians = {}
    for date, num_rows in zip(DATES, rows, strict=True):
        reports: dict[str, list[dict[str, Any]]] = {runner: [] for runner in RUNNERS}
        for _ in range(rounds):
            for runner in RUNNERS:
                reports[runner].append(night(folder, date, runner, environment))
        for runner in RUNNERS:
            starts_s = [report["phases"]["startup_s"] for report in reports[runner]]
            after_s = sorted(
                report["wall_s"] - start_s
                for report, start_s in zip(reports[runner], starts_s, strict=True)
            )
            medians[runner, date] = median(after_s)
            say(
                f"| {num_rows:,} | {runner} | {median(starts_s):.2f} | {median(after_s):.2f} "
                f"({after_s[0]:.2f} to {after_s[-1]:.2f}) |"
            )
    return medians


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))  # the cluster ends with us
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--more-rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="Where data goes, and stays; a temporary one by default.")
    arguments = parser.parse_args()
    rows = (arguments.rows, arguments.more_rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        for date, num_rows in zip(DATES, rows, strict=True):
            if not (folder / "users" / f"dt={date}").exists():
                make_features_demo(str(folder), date, num_rows)
        with cluster(Path(temporary)) as environment:
            for runner in RUNNERS:  # builds engines, fills the page cache
                night(folder, DATES[0], runner, environment)
            found = measure(folder, rows, arguments.rounds, environment)
    rows_s = {runner: found[runner, DATES[1]] - found[runner, DATES[0]] for runner in RUNNERS}
    fixed_s = {
        runner: found[runner, DATES[0]] - rows_s[runner] * rows[0] / (rows[1] - rows[0])
        for runner in RUNNERS
    }
    over = rows_s["ray"] / rows_s["local"] - 1
    say("")
    say(
        f"After the start a night of no rows takes {fixed_s['local']:.1f} s, and "
        f"{fixed_s['ray']:.1f} s on Ray. Rows take {over:+.1%}."
    )
    sys.exit(over > TOLERANCE)


if __name__ == "__main__":
    main()
