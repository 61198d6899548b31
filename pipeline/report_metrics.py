"""A run in figures for Prometheus: how it goes, and what the last published night was.

Only gauges: they are the same in the text format of Prometheus, which node_exporter's textfile
collector reads, and in OpenMetrics.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.report import RunReport, StageTimes

RUN, NIGHT = "nightscore_run_", "nightscore_night_"
"""Beginnings of the names: of the run at work or of the last one, and of the last published."""

Labels = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauge:
    """A metric and its values."""

    name: str
    help: str
    samples: tuple[tuple[Labels, float], ...]
    """Labels besides the job's name, and the value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """A run at some moment; moments are Unix times in s."""

    is_working: bool
    has_failed: bool
    """Its last attempt has ended without publishing."""
    started_at: float
    updated_at: float
    num_rows: int = 0
    num_done: int = 0
    rows_per_s: float = 0.0
    """Of this attempt so far."""
    stages: Mapping[str, StageTimes] = dataclasses.field(default_factory=dict)


def run_gauges(now: RunFigures) -> list[Gauge]:
    """The run at work, or the last one."""
    left_s = (now.num_rows - now.num_done) / now.rows_per_s if now.rows_per_s else 0.0
    figures = {
        "working": ("1 while a process is at work on it.", now.is_working),
        "failed": ("1 when its last attempt ended without publishing.", now.has_failed),
        "started_timestamp_seconds": ("When this attempt began.", now.started_at),
        "updated_timestamp_seconds": ("When these values were written.", now.updated_at),
        "rows": ("Rows of the date.", now.num_rows),
        "done_rows": ("Rows that are committed.", now.num_done),
        "rows_per_second": ("Rows a second of this attempt, so far.", now.rows_per_s),
        "left_seconds": ("Time left at that rate; 0 when there is none yet.", left_s),
    }
    stages = now.stages.items()
    return [
        *(_one(RUN + name, text, value) for name, (text, value) in figures.items()),
        _several(
            f"{RUN}stage_busy_seconds",
            "Seconds that a stage worked, summed over lanes.",
            "stage",
            {name: stage.busy_s for name, stage in stages},
        ),
        _several(
            f"{RUN}stage_wait_seconds",
            "Seconds that a stage waited for the one before or after it, summed over lanes.",
            "stage",
            {name: stage.wait_s for name, stage in stages},
        ),
    ]


def night_gauges(report: RunReport) -> list[Gauge]:
    """The last published night; what its report does not know is left out."""
    limit, drift, window = report.limit, report.drift, report.window
    figures: dict[str, tuple[str, float | None]] = {
        "date_timestamp_seconds": ("Midnight of the date, UTC.", _unix_time(report.date)),
        "published_timestamp_seconds": (
            "When it was published: too long ago means that a night is missing.",
            _unix_time(report.finished_at),
        ),
        "rows": ("Rows of the date.", report.rows),
        "scored_rows": ("Rows with a score.", report.scored),
        "quarantined_rows": ("Rows that could not be scored.", report.quarantined),
        "examples_per_second": ("Rows a second, everything included.", report.examples_per_sec),
        "wall_seconds": ("From the start of the process to publication.", report.wall_s),
        "usd": ("What it cost, US dollars.", report.cost.usd),
        "usd_per_100k": ("What 100,000 rows cost, US dollars.", report.usd_per_100k),
        "limit_ratio": (
            "Its rate relative to what its stages allow on this device.",
            limit.reached if limit else None,
        ),
        "joules_per_1000_rows": (
            "Energy of the meters that could be read.",
            report.joules_per_1000_rows,
        ),
        "drift_agreement": (
            "How its answers agree with those of fp32.",
            drift.agreement if drift else None,
        ),
        "window_margin_seconds": (
            "Seconds before its deadline; negative: too late.",
            window.margin_s if window else None,
        ),
        "interruptions": ("Attempts that ended half-way.", report.interruptions),
        "replayed_rows": ("Rows scored more than once.", report.rows_replayed),
        "alerts": ("What is odd beside the nights before.", len(report.alerts)),
    }
    cost, phases = report.cost, dataclasses.asdict(report.phases)
    costs = {
        "scoring": cost.scoring_usd,
        "building": cost.building_usd,
        "replay": cost.replay_usd,
        "other": cost.other_usd,
    }
    return [
        *(
            _one(NIGHT + name, text, value)
            for name, (text, value) in figures.items()
            if value is not None
        ),
        _several(
            f"{NIGHT}quarantined_by_reason_rows",
            "Rows that could not be scored, by reason.",
            "reason",
            report.quarantined_by_reason,
        ),
        _several(f"{NIGHT}part_usd", "What each part of the cost is, US dollars.", "part", costs),
        _several(
            f"{NIGHT}phase_seconds",
            "Wall-clock seconds of the phases of the attempt that published.",
            "phase",
            {name.removesuffix("_s"): seconds for name, seconds in phases.items()},
        ),
        _several(
            f"{NIGHT}ceiling_rows_per_second",
            "Rows a second of a stage alone, on this device.",
            "stage",
            _ceilings(report),
        ),
        _several(
            f"{NIGHT}device_busy_ratio",
            "Share of time, or of cores, that a device was busy while rows were scored.",
            "device",
            _busy(report),
        ),
        _several(
            f"{NIGHT}psi",
            "Population stability index against the last nights.",
            "of",
            report.distribution.psi if report.distribution else {},
        ),
    ]


def render_metrics(job: str, gauges: Iterable[Gauge]) -> str:
    """The text: a block for each metric that has values, every sample labelled with the job."""
    lines = []
    for gauge in gauges:
        if not gauge.samples:
            continue
        lines += [f"# HELP {gauge.name} {gauge.help}", f"# TYPE {gauge.name} gauge"]
        for labels, value in gauge.samples:
            pairs = {"job_name": job, **labels}
            inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in pairs.items())
            lines.append(f"{gauge.name}{{{inside}}} {float(value)!r}")
    return "".join(f"{line}\n" for line in lines)


def _one(name: str, text: str, value: float) -> Gauge:
    return Gauge(name=name, help=text, samples=(({}, value),))


def _several(name: str, text: str, label: str, values: Mapping[str, float]) -> Gauge:
    samples = tuple(({label: key}, value) for key, value in values.items())
    return Gauge(name=name, help=text, samples=samples)


def _ceilings(report: RunReport) -> dict[str, float]:
    if report.ceilings is None:
        return {}
    found = dataclasses.asdict(report.ceilings)
    return {name.removesuffix("_per_sec"): rate for name, rate in found.items()}


def _busy(report: RunReport) -> dict[str, float]:
    shares = {}
    for number, use in enumerate(report.devices):
        if use.utilisation_mean is not None:
            shares[f"{number} {use.name}"] = use.utilisation_mean
    return shares


def _unix_time(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
