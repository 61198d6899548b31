"""`score bench`: what it prints and writes, and that an interruption leaves nothing running."""

from __future__ import annotations

import io
import json
import re
import signal
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.commands.bench import parse_sizes
from flows.measuring.bench_markdown import render_bench, to_markdown
from flows.measuring.bench_plot import to_svg
from pipeline.errors import ConfigError
from tests.processes import PARENT, alive_with, command_of, is_alive

pytestmark = pytest.mark.timeout(300)
DATE = "2026-11-20"


def measurement(batch_size: int, rate: float, percent: float | None) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "load_s": 1.5,
        "rows_per_s": {"median": rate, "q1": rate * 0.95, "q3": rate * 1.05, "values": [rate]},
        "cpu_s_per_1000": 31.25,
        "latency_ms": {"p50": 1.0, "p95": 1200.0, "p99": 1300.0},
        "num_latencies": 9,
        "peak_rss_bytes": 512 * 2**20,
        "accuracy": {"agreement": 0.9844, "num_rows": 256},
        "device": {"utilisation": 0.97, "memory_bytes": None, "joules_per_1000": 12.5},
        "percent_of_base": percent,
    }


def variant(name: str, *measurements: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    best = max(measurements, key=lambda m: m["rows_per_s"]["median"], default=None)
    return {
        "name": name,
        "runtime": name.split()[0],
        "precision": name[-4:],
        "how": f"how {name} is run",
        "reason": reason,
        "errors": {"all": reason} if reason else {},
        "best_batch_size": best and best["batch_size"],
        "measurements": list(measurements),
    }


@pytest.fixture
def facts() -> dict[str, Any]:
    load = {"loadavg": [0.25, 0.5, 1.0], "cpu_mhz": 2900.0}
    return {
        "job": "demo & co",
        "base_line": "torch eager fp32",
        "variants": [
            variant("torch eager fp32", measurement(1, 50.0, 83.3), measurement(8, 60.0, 100.0)),
            variant(
                "openvino int8", measurement(8, 1122.0, 1870.0), measurement(32, 954.0, 1590.0)
            ),
            variant("gpu tensorrt fp16", reason="no NVIDIA driver"),
            variant("gpu tensorrt int8", reason="no NVIDIA driver"),
        ],
        "setup": {
            "date": "2026-11-21T07:00:00+00:00",
            "command": "score bench configs/demo.yaml --date 2026-11-20",
            "cpu": "A <processor>",
            "cores": 2,
            "instructions": ["avx512_vnni"],
            "threads": 2,
            "governor": None,
            "gpu": None,
            "os": "Linux",
            "python": "3.11.7",
            "versions": {"torch": "2.13.0", "tensorrt": None},
            "environment": {},
            "git_revision": "abc1234",
            "model": {"source": "m:f", "fingerprint": "f" * 64},
            "dataset": {
                "uri": "in",
                "date": DATE,
                "rows_sha256": "d" * 64,
                "rows": 256,
                "calibration_rows": 128,
                "seed": 0,
            },
            "options": {
                "batch_sizes": [1, 8, 32],
                "num_rounds": 5,
                "warmup_s": 0.5,
                "duration_s": 2.0,
                "latency_s": 1.0,
            },
            "load_before": load,
            "load_after": load,
        },
        "files": {"json": "bench.json"},
    }


def test_the_table_fits_80_columns_and_shows_each_variant_at_its_best(
    facts: dict[str, Any],
) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_bench(facts))
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    header, base, openvino, *_ = lines
    assert header.split() == "variant batch rows/s IQR base p50 p99 CPU s agree".split()
    assert base.split()[3:] == ["8", "60", "10%", "100%", "1.0", "1,300.0", "31.2", "0.9844"]
    assert openvino.split()[2:5] == ["8", "1,122", "10%"]
    assert "1,870%" in openvino
    assert "not run: gpu tensorrt fp16; gpu tensorrt int8: no NVIDIA driver" in " ".join(lines)


def test_markdown_has_all_batch_sizes_and_the_whole_set_up(facts: dict[str, Any]) -> None:
    text = to_markdown(facts)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    short, full = tables
    assert "| gpu tensorrt fp16 | not run: no NVIDIA driver |" in short
    assert [line.split("|")[2].strip() for line in full.splitlines()[2:]] == ["1", "8", "8", "32"]
    for said in ("A <processor>", "torch 2.13.0", "abc1234", "d" * 16, "how openvino int8 is run"):
        assert said in text


def test_features_which_cost_microseconds_a_row_are_told_apart(facts: dict[str, Any]) -> None:
    for each in facts["variants"]:
        for found in each["measurements"]:
            found["cpu_s_per_1000"], found["device"]["joules_per_1000"] = 0.00532, 0.0213
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_bench(facts))
    assert console.export_text().splitlines()[1].split()[-2] == "0.00532"
    text = to_markdown(facts)
    assert text.count("| 0.00532 |") == 2 + 4
    assert text.count("| 0.0213 |") == 4


def test_the_plot_is_well_formed_and_its_bars_are_as_long_as_the_rates(
    facts: dict[str, Any],
) -> None:
    root = xml.etree.ElementTree.fromstring(to_svg(facts))
    space = "{http://www.w3.org/2000/svg}"
    background, *bars = root.findall(f"{space}rect")
    assert background.get("fill") == "#fff"
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert widths[1] / widths[0] == pytest.approx(1122 / 60, rel=0.01)
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert "demo & co: rows per second, inference only" in texts
    assert "1,122  (1,870 %), batch 8" in texts


def test_with_nothing_that_ran_there_are_still_reasons(facts: dict[str, Any]) -> None:
    facts["variants"] = facts["variants"][2:]
    facts["base_line"] = None
    xml.etree.ElementTree.fromstring(to_svg(facts))
    assert "no base line ran" in to_markdown(facts)


def test_batch_sizes_are_a_list_of_whole_numbers() -> None:
    assert parse_sizes(None) is None
    assert parse_sizes("32, 1,8,8") == (1, 8, 32)
    for wrong in ("", "0", "1;8", "eight", "1,,8", "-1"):
        with pytest.raises(ConfigError, match=r"--batch-sizes: .*; expected whole numbers"):
            parse_sizes(wrong)


def test_a_job_is_measured_and_written_down(
    score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench"
    ended = score(
        *("bench", features_job, "--date", DATE, "--json", "--out", out, "--threads", 2),
        *("--batch-sizes", "16,64", "--rounds", 2, "--duration-s", 0.05, "--warmup-s", 0.01),
        *("--rows", 500, "--variants", "onnxruntime", "--variants", "tensorrt"),
        *("--set", "engine.calibration.method=percentile"),
    )
    assert ended.code == 0, ended.err
    found = ended.json
    assert found["base_line"] == "onnxruntime fp32"
    by_name = {entry["name"]: entry for entry in found["variants"]}
    assert list(by_name) == [
        "onnxruntime fp32",
        "onnxruntime int8",
        "gpu tensorrt fp16",
        "gpu tensorrt int8",
    ]
    for name in ("onnxruntime fp32", "onnxruntime int8"):
        cells = by_name[name]["measurements"]
        assert [cell["batch_size"] for cell in cells] == [16, 64]
        assert all(len(cell["rows_per_s"]["values"]) == 2 for cell in cells)
    percents = [c["percent_of_base"] for c in by_name["onnxruntime fp32"]["measurements"]]
    assert max(percents) == pytest.approx(100)
    assert by_name["gpu tensorrt int8"]["reason"]
    check_setup(found["setup"])
    written = json.loads((out / "bench.json").read_text())
    assert {**written, "files": found["files"]} == found
    assert "# Benchmark of users" in (out / "bench.md").read_text()
    xml.etree.ElementTree.fromstring((out / "bench.svg").read_text())


def check_setup(setup: dict[str, Any]) -> None:
    assert setup["threads"] == 2
    assert setup["options"]["batch_sizes"] == [16, 64]
    assert setup["options"]["method"] == "percentile"
    assert setup["dataset"]["rows"] == 500
    assert setup["dataset"]["calibration_rows"] == 64
    assert re.fullmatch("[0-9a-f]{64}", setup["dataset"]["rows_sha256"])
    assert re.fullmatch("[0-9a-f]{64}", setup["model"]["fingerprint"])
    assert len(setup["load_before"]["loadavg"]) == len(setup["load_after"]["loadavg"]) == 3
    assert {"torch", "onnxruntime", "openvino"} <= set(setup["versions"])


def test_variants_that_do_not_exist_are_wrong_use(
    score: Callable[..., Any], features_job: Path
) -> None:
    ended = score("bench", features_job, "--date", DATE, "--variants", "tensorflow")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "none has tensorflow in its name; expected a part of one of: torch eager fp32," in line


def test_an_interruption_ends_every_process(
    start_score: Callable[..., Any], features_job: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench"
    command = start_score(
        *("bench", features_job, "--date", DATE, "--variants", "fp32", "--out", out),
        *("--rounds", 1000),
    )
    wait_until(lambda: len(variants_of(command.pid)) >= 2, 60)
    pids = variants_of(command.pid)
    command.signal(signal.SIGINT)
    ended = command.end(60)
    assert ended.code == 75, ended.err
    assert "nothing was written" in ended.err
    wait_until(lambda: not any(map(is_alive, pids)), 5)
    assert not out.exists()


def variants_of(parent: int) -> list[int]:
    """Processes that multiprocessing spawned for a parent, whichever group they are in."""
    return [pid for pid in alive_with(PARENT, parent) if "spawn_main" in command_of(pid)]


def wait_until(condition: Callable[[], bool], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
