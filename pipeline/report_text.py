"""The report for a terminal, and as Markdown for Prefect's artifact."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline import report_tables as tables
from pipeline import report_words as words
from pipeline import window_words
from pipeline.report import Alert, RunReport
from pipeline.report_devices import device_facts
from pipeline.report_guards import guard_facts

BAR_COLUMNS = 16


def render_text(report: RunReport) -> RenderableType:
    """The report for `rich.console.Console.print`: for 80 columns, and without colour as well.

    Whatever comes from data is a `Text` or plain cell, never console markup.
    """
    parts: list[RenderableType] = [
        Text(f"{words.plain(report.job)}, {words.plain(report.date)}", style="dim"),
        Text(words.headline(report), style=_mood(report)),
        Text(words.subline(report)),
        *alert_lines(report.alerts),
        Text(),
        _facts(_key_facts(report)),
    ]
    sections = {
        _stages_title(report): _stages(report) if report.stages else None,
        "Ceilings of this device": _limits(report) if report.ceilings else None,
        "Engine candidates": _rungs(report) if report.engine.rungs else None,
        "Quarantined rows": _quarantine(report) if report.quarantined else None,
        "Unreadable files": _unreadable(report) if report.unreadable_files else None,
    }
    for title, content in sections.items():
        if content is not None:
            parts += [Text(), Text(title, style="bold"), content]
    return Group(*parts, Text(), _facts(_places(report)))


def alert_lines(alerts: Iterable[Alert]) -> list[RenderableType]:
    """A line for each alert, set apart from what stands above; nothing without any."""
    lines = [Text.assemble((f"{alert.name}: ", "bold yellow"), alert.text) for alert in alerts]
    return [Text(), *lines] if lines else []


def render_markdown(report: RunReport) -> str:
    """The report as GitHub-flavoured Markdown."""
    blocks = [
        f"# {_md(words.headline(report))}",
        f"{_md(report.job)}, {_md(report.date)}. {_md(words.subline(report))}",
        *(f"**{_md(alert.name)}**: {_md(alert.text)}" for alert in report.alerts),
        _md_table(("fact", "value"), _key_facts(report)),
    ]
    if report.stages:
        blocks += [
            f"## {_md(_stages_title(report))}",
            _md_table(
                ("stage", "busy", "waiting", "rows", "busy share"), tables.stage_rows(report)
            ),
        ]
    if report.ceilings:
        blocks += [
            "## Ceilings of this device",
            _md_table(("ceiling", "rows per second", "reached"), tables.limit_rows(report)),
        ]
    if report.engine.rungs:
        heads = ("candidate", "rows/s", "agreement", "cosine", "divergence", "result")
        blocks += ["## Engine candidates", _md_table(heads, tables.rung_rows(report))]
    if report.quarantined:
        blocks += ["## Quarantined rows", _md_table(("reason", "rows"), tables.reason_rows(report))]
        if report.quarantine_samples:
            blocks.append(
                _md_table(("file", "row", "reason", "message"), tables.sample_rows(report))
            )
    if report.unreadable_files:
        blocks += [
            "## Unreadable files",
            _md_table(("file", "bytes", "rows", "message"), tables.unreadable_rows(report)),
        ]
    blocks += ["## This run", _md_table(("", ""), _places(report))]
    return "\n\n".join(blocks) + "\n"


def _key_facts(report: RunReport) -> list[tuple[str, str]]:
    scoring = words.scoring_per_s(report)
    while_scoring = f"; {words.amount(scoring)} while scoring" if scoring else ""
    split = ", ".join(
        f"{part.name} {words.usd(part.amount)}" for part in words.costs_per_100k(report)
    )
    engine, price = report.engine, report.cost.price
    limit = words.limit_sentence(report)
    engines = words.engines_sentence(report.engines)
    interrupted = words.interruption_sentence(report)
    return [
        (
            "examples per second",
            f"{words.amount(report.examples_per_sec)}, everything included{while_scoring}",
        ),
        *([("of the limit", limit)] if limit else []),
        ("cost per 100,000 rows", f"{words.usd(report.usd_per_100k)}: {split}"),
        ("cost of the run", words.usd(report.cost.usd)),
        *([("interruptions", interrupted)] if interrupted else []),
        *([("window", window_words.outcome(report.window))] if report.window else []),
        (
            "price",
            f"{words.hourly(price)}; {words.plain(price.source)}, as of {words.plain(price.as_of)}",
        ),
        (
            tables.of_attempt("phases", report),
            ", ".join(f"{p.name} {words.duration(p.amount)}" for p in words.phases(report)),
        ),
        *device_facts(report),
        ("engine", f"{words.engine_name(engine)}, {words.engine_origin(engine)}"),
        *([("all engines", engines)] if engines else []),
        ("agreement", words.agreement_sentence(engine)),
        ("why this engine", words.plain(engine.reason)),
        *guard_facts(report),
    ]


def _stages_title(report: RunReport) -> str:
    return tables.of_attempt(words.bottleneck_sentence(report), report)


def _places(report: RunReport) -> list[tuple[str, str]]:
    return [
        ("shards", words.shards_sentence(report)),
        ("run", words.plain(report.run_id)),
        ("engine key", words.plain(report.engine.key)),
        (tables.of_attempt("started", report), words.plain(report.started_at)),
        ("finished", words.plain(report.finished_at)),
        ("output", words.plain(report.output)),
        ("manifest", words.plain(report.manifest)),
    ]


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, Text(value))
    return grid


def _stages(report: RunReport) -> Table:
    table = _table(("stage", ""), ("busy", "waiting", "rows", "busy share"))
    table.columns[0].no_wrap = True
    for (name, *numbers), times in zip(
        tables.stage_rows(report), report.stages.values(), strict=True
    ):
        style = "bold" if name == report.bottleneck else ""
        table.add_row(Text(name), _bar(times.busy_share), *numbers, style=style)
    return table


def _limits(report: RunReport) -> Table:
    table = _table(("ceiling", ""), ("rows per second", "reached"))
    table.columns[0].no_wrap = True
    rows = zip(tables.limit_rows(report), words.limits(report), strict=True)
    for (name, *numbers), limit in rows:
        table.add_row(Text(name), _bar(limit.reached or 0.0), *numbers)
    return table


def _rungs(report: RunReport) -> Table:
    table = _table(("candidate",), ("rows/s", "agreement", "cosine", "divergence"))
    table.add_column("result", overflow="fold")
    for row in tables.rung_rows(report):
        table.add_row(*(Text(cell) for cell in row))
    return table


def _quarantine(report: RunReport) -> Group:
    by_reason = _table(("reason",), ("rows",))
    for row in tables.reason_rows(report):
        by_reason.add_row(*(Text(cell) for cell in row))
    if not report.quarantine_samples:
        return Group(by_reason)
    samples = _table(("file",), ("row",))
    samples.add_column("reason: message", overflow="fold", ratio=1)
    for file, index, reason, message in tables.sample_rows(report):
        samples.add_row(Text(file), index, Text(f"{reason}: {message}"))
    return Group(by_reason, Text(), samples)


def _unreadable(report: RunReport) -> Table:
    table = _table(("file",), ("bytes",))
    table.add_column("rows: message", overflow="fold", ratio=1)
    for file, num_bytes, rows, message in tables.unreadable_rows(report):
        table.add_row(Text(file), num_bytes, Text(f"{rows}: {message}"))
    return table


def _mood(report: RunReport) -> str:
    return "bold" if report.quarantined or report.degraded else "bold green"


def _table(names: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", overflow="fold")
    return table


def _bar(share: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=share, width=BAR_COLUMNS)


def _md(text: str) -> str:
    r"""Foreign text as Markdown that shows it: no markup, no HTML, no table cell's end."""
    return re.sub(r"([\\`*\[\]<>|&#~])", r"\\\1", words.plain(text))


def _md_table(heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    names = list(heads)
    lines = [names, ["---"] * len(names)]
    lines += [[_md(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
