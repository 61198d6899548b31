"""What a night on Ray costs beside the same night on local lanes, on the same cores.

    python benchmarks/ray_overhead.py [--rows 1000000 10000000] [--rounds 3]

Starts a Ray cluster of this machine: a head without CPUs, and a node with all of them. Makes users
of the features demo, and scores each date in alternation with lanes of one thread: local ones, and
as many on the cluster. Times of a night are those of its report, in seconds: from process start to
the moment that it could plan, which on Ray includes reaching the cluster and starting its first
lane; and from there to publication. The overhead is that of the second. Writes a Markdown table to
standard output; exit 1 when the median overhead of the largest night is above `TOLERANCE`.
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
from collections.abc import Iterator, Sequence
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
DATES = ("2026-11-01", "2026-11-02", "2026-11-03", "2026-11-04")
"""One for each number of rows."""


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


def after_start_s(report: dict[str, Any]) -> float:
    """Seconds from the moment that it could plan to publication."""
    return float(report["wall_s"] - report["phases"]["startup_s"])


def line(rows: int, local: Sequence[dict[str, Any]], ray: Sequence[dict[str, Any]]) -> str:
    """A row of the table."""
    start = [median(r["phases"]["startup_s"] for r in reports) for reports in (local, ray)]
    after = [median(map(after_start_s, reports)) for reports in (local, ray)]
    times = [sorted(map(after_start_s, reports)) for reports in (local, ray)]
    spans = [f"{several[0]:.2f}-{several[-1]:.2f}" for several in times]
    return (
        f"| {rows:,} | {start[0]:.2f} | {start[1]:.2f} | {after[0]:.2f} ({spans[0]}) | "
        f"{after[1]:.2f} ({spans[1]}) | {after[1] / after[0] - 1:+.1%} |"
    )


def say(text: str) -> None:
    """A line of the result, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))  # the cluster ends with us
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="Where data goes, and stays; a temporary one by default.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        for date, rows in zip(DATES, arguments.rows, strict=False):
            if not (folder / "users" / f"dt={date}").exists():
                make_features_demo(str(folder), date, rows)
        with cluster(Path(temporary)) as environment:
            for runner in ("local", "ray"):  # builds engines, fills the page cache
                night(folder, DATES[0], runner, environment)
            say("| rows | start, local | start, Ray | after, local | after, Ray | overhead |")
            say("|--:|--:|--:|--:|--:|--:|")
            for date, rows in zip(DATES, arguments.rows, strict=False):
                reports: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
                for _ in range(arguments.rounds):
                    for runner, found in reports.items():
                        found.append(night(folder, date, runner, environment))
                say(line(rows, reports["local"], reports["ray"]))
    over = median(map(after_start_s, reports["ray"])) / median(map(after_start_s, reports["local"]))
    sys.exit(over - 1 > TOLERANCE)


if __name__ == "__main__":
    main()
