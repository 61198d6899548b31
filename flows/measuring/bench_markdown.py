"""The benchmark in words and tables: Markdown for a file, a table of 80 columns for a terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import report_words as words

Facts = dict[str, Any]
COLUMNS = ("variant", "batch", "rows/s", "IQR", "base", "p50", "p99", "CPU s", "agree")
DETAILS = (
    "batch",
    "rows/s",
    "IQR",
    "% of base line",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "CPU s per 1000",
    "peak RSS MiB",
    "utilisation",
    "device MiB",
    "J per 1000",
    "W",
    "SM MHz",
    "throttled",
    "agreement",
    "load s",
)


def setup_lines(facts: Facts) -> list[str]:
    """The set-up, one line a subject."""
    setup, options = facts["setup"], facts["setup"]["options"]
    dataset, model = setup["dataset"], setup["model"]
    versions = ", ".join(f"{name} {v}" for name, v in setup["versions"].items() if v)
    loads = [setup[when]["loadavg"][0] for when in ("load_before", "load_after")]
    clock = setup["load_after"]["cpu_mhz"]
    environment = " ".join(f"{name}={value}" for name, value in setup["environment"].items())
    return [
        f"{setup['date']}, revision {setup['git_revision'] or 'unknown'}: {setup['command']}",
        f"cpu: {setup['cpu']}, {setup['cores']} cores ({' '.join(setup['instructions'])}), "
        f"governor {setup['governor'] or 'unknown'}, {clock or 'unknown'} MHz",
        f"gpu: {setup['gpu'] or 'none'}",
        f"threads: {setup['threads']} for every variant; environment: {environment or 'nothing'}",
        f"load average: {loads[0]:.2f} before, {loads[1]:.2f} after",
        f"{setup['os']}, Python {setup['python']}, {versions}",
        f"model: {model['source']}, fingerprint {model['fingerprint'][:16]}",
        f"rows: {dataset['rows']:,} decoded rows of {dataset['uri']} for {dataset['date']}, seed "
        f"{dataset['seed']}, {dataset['calibration_rows']:,} others for calibration, sha256 "
        f"{dataset['rows_sha256'][:16]}",
        f"measured: {options['num_rounds']} interleaved rounds, one process a variant; each "
        f"{options['warmup_s']:g} s warm-up, {options['duration_s']:g} s stream of batches, "
        f"{options['latency_s']:g} s single batches; batches of "
        f"{', '.join(map(str, options['batch_sizes']))}",
    ]


def render_bench(facts: Facts) -> RenderableType:
    """Each variant at its best batch size, then those that did not run, then the set-up."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for variant in facts["variants"]:
        if best := best_of(variant):
            table.add_row(variant["name"], *_short(best))
    return Group(
        table,
        Text(_legend(facts), style="dim"),
        *(Text(line, style="yellow") for line in _failures(facts)),
        Text(),
        *(Text(line, style="dim") for line in setup_lines(facts)),
        *(Text(f"{kind}: {path}") for kind, path in facts["files"].items()),
    )


def best_of(variant: Facts) -> Facts | None:
    """The measurement with the highest throughput."""
    rates = {m["batch_size"]: m for m in variant["measurements"]}
    return rates.get(variant["best_batch_size"])


def _short(found: Facts) -> tuple[str, ...]:
    rate, latency = found["rows_per_s"], found["latency_ms"]
    return (
        str(found["batch_size"]),
        f"{rate['median']:,.0f}",
        _iqr(rate),
        _percent(found),
        f"{latency['p50']:,.1f}",
        f"{latency['p99']:,.1f}",
        words.amount(found["cpu_s_per_1000"]),
        _agreement(found),
    )


def _legend(facts: Facts) -> str:
    base = facts["base_line"]
    return (
        "rows/s: median of rounds at the variant's best batch size; IQR: of the median; base: "
        f"of {base or 'nothing: no base line ran'}; p50, p99: ms of a batch by itself; CPU s: for "
        "1,000 rows; agree: with fp32 on ONNX Runtime."
    )


def _failures(facts: Facts) -> list[str]:
    """Whatever did not run; variants with one reason share a line."""
    failed = [
        (variant["name"] if size == "all" else f"{variant['name']}, batch {size}", error)
        for variant in facts["variants"]
        for size, error in variant["errors"].items()
    ]
    return [
        f"not run: {'; '.join(name for name, _ in group)}: {reason}"
        for reason, group in groupby(failed, key=lambda entry: entry[1])
    ]


def to_markdown(facts: Facts) -> str:
    """Short table, all measurements, how each variant is run, and the set-up."""
    lines = [f"# Benchmark of {facts['job']}", "", _legend(facts), "", *_row(COLUMNS), _rule(9)]
    for variant in facts["variants"]:
        best = best_of(variant)
        cells = _short(best) if best else (f"not run: {variant['reason']}", *[""] * 7)
        lines += _row((variant["name"], *cells))
    lines += ["", "## All batch sizes", "", *_row(("variant", *DETAILS)), _rule(len(DETAILS) + 1)]
    for variant in facts["variants"]:
        lines += [
            line for m in variant["measurements"] for line in _row((variant["name"], *_details(m)))
        ]
    lines += ["", "## How each is run", ""]
    lines += [f"- {variant['name']}: {variant['how']}" for variant in facts["variants"]]
    lines += ["", "## Set-up", "", *(f"- {line}" for line in setup_lines(facts)), ""]
    return "\n".join(lines)


def _details(found: Facts) -> tuple[str, ...]:
    rate, latency, device = found["rows_per_s"], found["latency_ms"], found["device"] or {}
    memory, joules = device.get("memory_bytes"), device.get("joules_per_1000")
    return (
        str(found["batch_size"]),
        f"{rate['median']:,.1f}",
        f"{rate['q1']:,.1f} to {rate['q3']:,.1f}",
        _percent(found),
        *(f"{latency[share]:,.2f}" for share in ("p50", "p95", "p99")),
        words.amount(found["cpu_s_per_1000"]),
        f"{found['peak_rss_bytes'] / 2**20:,.0f}",
        _known(device.get("utilisation"), ".0%"),
        _known(memory and memory / 2**20, ",.0f"),
        "-" if joules is None else words.amount(joules),
        _known(device.get("power_w"), ",.0f"),
        _known(device.get("sm_clock_mhz"), ",.0f"),
        _known(device.get("throttled"), ".0%"),
        _agreement(found),
        f"{found['load_s']:,.1f}",
    )


def _iqr(rate: Facts) -> str:
    return f"{(rate['q3'] - rate['q1']) / rate['median']:.0%}"


def _percent(found: Facts) -> str:
    return _known(found["percent_of_base"], ",.0f", "%")


def _agreement(found: Facts) -> str:
    return _known(found["accuracy"]["agreement"], ".4f")


def _known(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _row(cells: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _rule(num_columns: int) -> str:
    return "|---|" + "--:|" * (num_columns - 1)
