"""The report as one self-contained page: no script, nothing loaded, fit for a phone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from itertools import compress

from pipeline import report_devices, window_words
from pipeline import report_tables as tables
from pipeline import report_words as words
from pipeline.history import HistoryRow
from pipeline.report import RunReport, StageTimes
from pipeline.report_guards import guard_facts
from pipeline.report_markup import (
    Markup,
    bar,
    fact_list,
    legend,
    linked,
    section,
    stacked,
    table,
    tag,
    with_bars,
)
from pipeline.report_nights import alerts_part, nights_part, scores_figure
from pipeline.report_tiles import Tile, tiles

# Even if something slipped through the escaping, the page could neither run nor load it.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
COST_COLORS = ("main", "second", "rest", "third")
PHASE_COLORS = ("rest", "rest", "second", "main", "third")


def render_html(report: RunReport, past: Sequence[HistoryRow] = ()) -> str:
    """The whole page.

    Args:
        report: Of the night.
        past: Nights of the job before it, by date.
    """
    sections = [
        alerts_part(report),
        nights_part(report, past),
        _time(report),
        _limits(report),
        _devices(report),
        _cost(report),
        _engine(report),
        _quarantine(report),
        _guards(report),
        _unreadable(report),
        _run(report),
    ]
    style = resources.files("pipeline").joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        Markup(
            '<meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
            '<link rel="icon" href="data:,">'
        ),
        tag("title", f"{words.plain(report.job)} {words.plain(report.date)}: nightscore"),
        tag("style", Markup(style)),
    )
    main = tag("main", _header(report), *(section for section in sections if section))
    page = tag("html", head, tag("body", main), lang="en")
    return f"<!doctype html>\n{page}\n"


def _header(report: RunReport) -> Markup:
    return tag(
        "header",
        tag(
            "p",
            tag("b", "nightscore"),
            f" \N{MIDDLE DOT} {words.plain(report.job)} \N{MIDDLE DOT} {words.plain(report.date)}",
            class_="eyebrow",
        ),
        tag("h1", words.headline(report)),
        tag("p", words.subline(report), class_="lead"),
        tag("dl", *map(_tile, tiles(report)), class_="tiles"),
    )


def _tile(tile: Tile) -> Markup:
    number = (tag("span", tile.value, class_="value"), tag("span", tile.note, class_="note"))
    return tag("div", tag("dt", tile.name), tag("dd", *number), class_=f"tile {tile.mood}".strip())


def _time(report: RunReport) -> Markup:
    phases = words.phases(report)
    content = [stacked(phases, PHASE_COLORS), legend(phases, PHASE_COLORS, words.duration)]
    if report.stages:
        columns = {"stage": "", "": "wide"}
        columns |= dict.fromkeys(("busy", "waiting", "rows", "busy share"), "number")
        bars = [_busy_bar(times) for times in report.stages.values()]
        strong = [name == report.bottleneck for name in report.stages]
        rows = with_bars(tables.stage_rows(report), bars)
        content.append(
            table(
                "Stages run at the same time: busy (coloured) and waiting (grey)",
                columns,
                rows,
                strong,
            )
        )
    title = tables.of_attempt("Where the time went", report)
    return section(title, words.bottleneck_sentence(report), *content)


def _limits(report: RunReport) -> Markup:
    limits = words.limits(report)
    if not limits:
        return Markup()
    scoring = words.scoring_per_s(report)
    speed = f"The run scored {words.amount(scoring)} rows per second. " if scoring else ""
    columns = {"ceiling": "", "": "wide", "rows per second": "number", "reached": "number"}
    bars = [bar((limit.reached or 0.0, "main")) for limit in limits]
    return section(
        "How near to the limit",
        f"{speed}{words.limit_sentence(report) or ''} What the stages do, on this device and with "
        "rows of this run:",
        table("Rows per second", columns, with_bars(tables.limit_rows(report), bars)),
    )


def _devices(report: RunReport) -> Markup:
    if not report.devices:
        return Markup()
    rows = report_devices.device_rows(report)
    # What no device of this machine tells would only push the others out of the page.
    told = [
        any(row[place] != report_devices.UNKNOWN for row in rows)
        for place in range(len(report_devices.COLUMNS))
    ]
    shown = [tuple(compress(row, told)) for row in rows]
    first, *others = compress(report_devices.COLUMNS, told)
    bars = [bar((use.utilisation_mean or 0.0, "main")) for use in report.devices]
    columns = {first: "", "": "wide"} | dict.fromkeys(others, "number")
    energy = report_devices.energy_sentence(report)
    return section(
        "What the devices did",
        f"{energy}." if energy else "While rows were scored, sampled once a second:",
        table("Means and extremes", columns, with_bars(shown, bars)),
    )


def _cost(report: RunReport) -> Markup:
    costs = words.costs_per_100k(report)
    colors = COST_COLORS[: len(costs)]
    price = report.cost.price
    source = (linked(words.plain(price.source)), f", as of {words.plain(price.as_of)}")
    return section(
        "What it cost",
        f"{words.usd(report.usd_per_100k)} per 100,000 rows; "
        f"{words.usd(report.cost.usd)} for the whole run.",
        stacked(costs, colors),
        legend(costs, colors, words.usd),
        fact_list({"Price": words.hourly(price), "Source": tag("span", *source)}),
    )


def _engine(report: RunReport) -> Markup:
    engine = report.engine
    facts = {
        "Engine": f"{words.engine_name(engine)}, {words.engine_origin(engine)}",
        "Agreement": words.agreement_sentence(engine),
        "Key": tag("code", words.plain(engine.key)),
    }
    if engines := words.engines_sentence(report.engines):
        facts["All engines"] = engines
    content = [fact_list(facts)]
    if engine.rungs:
        figures = dict.fromkeys(("rows/s", "agreement", "cosine", "divergence"), "number")
        columns = {"candidate": "", **figures, "result": "message"}
        strong = [tables.is_chosen(rung, engine) for rung in engine.rungs]
        content.append(
            table("Candidates on this device", columns, tables.rung_rows(report), strong)
        )
    return section("The engine", _sentence(words.plain(engine.reason)), *content)


def _quarantine(report: RunReport) -> Markup:
    if not report.quarantined:
        return Markup()
    bars = [bar((num_rows / report.quarantined, "second")) for _, num_rows in words.reasons(report)]
    columns = {"reason": "", "": "wide", "rows": "number"}
    content = [table("By reason", columns, with_bars(tables.reason_rows(report), bars))]
    if report.quarantine_samples:
        columns = {"file": "", "row": "number", "reason": "", "message": "message"}
        content.append(table("Some of them", columns, tables.sample_rows(report), class_="stack"))
    return section(
        "What was odd",
        f"{words.count(report.quarantined)} of {words.plural(report.rows, 'row')} could not be "
        "scored; each is kept apart with its reason.",
        *content,
    )


def _guards(report: RunReport) -> Markup:
    facts = guard_facts(report)
    if not facts:
        return Markup()
    lead = "Published although a guard had stopped it." if report.accepted else ""
    return section("What was checked", lead, fact_list(dict(facts)), scores_figure(report))


def _unreadable(report: RunReport) -> Markup:
    if not report.unreadable_files:
        return Markup()
    columns = {"file": "", "bytes": "number", "rows": "", "message": "message"}
    return section(
        "What could not be read",
        f"{words.plural(len(report.unreadable_files), 'file')} of the date cannot be read as "
        "Parquet. Their rows are in none of the figures above; once repaired, score the date "
        "again.",
        table("Not scored", columns, tables.unreadable_rows(report), class_="stack"),
    )


def _run(report: RunReport) -> Markup:
    facts = {
        "Run": tag("code", words.plain(report.run_id)),
        "Output": tag("code", words.plain(report.output)),
        "Manifest": tag("code", words.plain(report.manifest)),
        "Shards": words.shards_sentence(report),
        "Attempts": words.count(report.attempts),
        "Interruptions": words.interruption_sentence(report) or "none",
        "Device": words.plain(report.device),
        "Window": window_words.outcome(report.window) if report.window else "none",
        tables.of_attempt("Started", report): words.plain(report.started_at),
        "Finished": words.plain(report.finished_at),
    }
    return section("This run", "", fact_list(facts))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _busy_bar(times: StageTimes) -> Markup:
    busy = times.busy_share
    return bar((busy, "main"), (1 - busy if times.wait_s else 0.0, "rest"))
