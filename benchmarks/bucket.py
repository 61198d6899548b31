"""How fast rows come from a bucket that is as far away as a cloud's.

    python -m benchmarks.bucket [--rows 2000000] [--files 4] [--rounds 3] [--latency-ms 30]
        [--mb-per-s 60] [--beside FOLDER]

Starts an object store (SeaweedFS) behind a slow link (`benchmarks/slow_link.py`), and puts users of
the features demo there. Scores them in turns from the local disk and from the bucket, scores on the
local disk, then with scores in the bucket too; with `--beside`, by the code of another checkout as
well. Store and link take CPU time of the same cores. Writes a Markdown table to standard output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import s3fs

from benchmarks.nights import DATE, report_of
from benchmarks.slow_link import slow_link
from engines.demo_models import write_ranking_onnx
from flows.demo_data import write_users
from tests.object_store import CREDENTIALS, object_store

ROOT = Path(__file__).parents[1]
BUCKET = "night"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A night that is measured."""

    name: str
    code: Path
    """Checkout that scores."""
    source: str
    """Folder of the users, or its address."""
    target: str


def night(arm: Arm, folder: Path, address: str) -> dict[str, Any]:
    """Score all rows from the beginning; the report."""
    shutil.rmtree(folder / "scores", ignore_errors=True)
    sets = {
        "input.uri": arm.source,
        "model.source": folder / "ranking.onnx",
        "engine.store": folder / "engines",
        "output.uri": arm.target,
    }
    score = [sys.executable, "-c", "from flows.cli import main; main()"]
    environment = {"PYTHONPATH": str(arm.code), "AWS_ENDPOINT_URL": address}
    return report_of(score, sets, environment, "--force", cwd=arm.code)


def line(arm: Arm, reports: list[dict[str, Any]]) -> str:
    """A row of the table."""
    rates = [each["limit"]["rate_per_sec"] for each in reports]
    waits = [each["stages"]["read"]["busy_s"] / each["scoring_s"] for each in reports]
    walls = [each["wall_s"] for each in reports]
    plans = [each["phases"]["plan_s"] for each in reports]
    return (
        f"| {arm.name} | {median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | "
        f"{median(waits):.0%} | {median(plans):.2f} | {median(walls):.2f} |"
    )


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--mb-per-s", type=float, default=60.0, help="of one connection")
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turns")
    asked = parser.parse_args()
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_users(folder / "users", DATE, num_rows=asked.rows, num_files=asked.files)
        write_ranking_onnx(folder / "ranking.onnx")
        (folder / "store").mkdir()
        with object_store(folder / "store", BUCKET) as near:
            fs = s3fs.S3FileSystem(endpoint_url=near)
            fs.put(str(folder / "users"), f"{BUCKET}/users", recursive=True)
            with slow_link(near, asked.latency_ms, asked.mb_per_s) as far:
                say_table(asked, folder, far)


def say_table(asked: argparse.Namespace, folder: Path, address: str) -> None:
    """Run all nights in turns, and write what came of them."""
    bucket, scores = f"s3://{BUCKET}/users", str(folder / "scores")
    arms = [
        Arm(name="local disk", code=ROOT, source=str(folder / "users"), target=scores),
        Arm(name="bucket", code=ROOT, source=bucket, target=scores),
        Arm(name="bucket to bucket", code=ROOT, source=bucket, target=f"s3://{BUCKET}/scores"),
    ]
    if asked.beside:
        arms.append(
            Arm(
                name=f"bucket, by {asked.beside.name}",
                code=asked.beside,
                source=bucket,
                target=scores,
            )
        )
    night(arms[0], folder, address)  # builds the engine
    reports: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number in range(asked.rounds):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            reports[arm.name].append(night(arm, folder, address))
    sys.stdout.write(
        f"{asked.rows:,} users in {asked.files} files; {asked.latency_ms:g} ms a request, "
        f"{asked.mb_per_s:g} MB/s a connection; medians of {asked.rounds} rounds in turns\n\n"
        "| from | rows/s while scoring (min to max) | reading, of that time | plan s | wall s |\n"
        "|---|--:|--:|--:|--:|\n"
    )
    for arm in arms:
        sys.stdout.write(f"{line(arm, reports[arm.name])}\n")


if __name__ == "__main__":
    main()
