"""A run's facts in words and numbers for people; the terminal, the mail and the page share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.limit import NEARLY_ALWAYS, waited_for
from pipeline.report import Price, RunReport
from pipeline.report_engine import EngineFacts, EngineRows

MAX_MESSAGE_CHARACTERS = 200
LOST_GROUP = "row_group_"
"""How the reasons of `pipeline.row_groups.DAMAGES` begin; that module would bring Arrow with it."""
MARKETS = {"on_demand": "on demand", "spot": "spot", "own": "own price"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A named part of a whole."""

    name: str
    amount: float
    share: float
    """From 0 to 1; 0 as well when there is no whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLimit:
    """What one stage alone can do, and how near to it the run came."""

    name: str
    per_s: float
    reached: float | None
    """Rows per second while scoring, relative to `per_s`; None: unknown."""


def count(number: int) -> str:
    """`4,000`."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """`1 row`, `4,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def amount(value: float, *, min_decimals: int = 0) -> str:
    """Three significant digits, more before the point: `0.0123`, `97.1`, `1,235`."""
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(decimals, min_decimals)}f}"


def usd(value: float) -> str:
    """`$0.0123`, `$1.50`, `$1,234.50`."""
    return f"${amount(value, min_decimals=2)}"


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 59.95:  # more would be rounded to a minute
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole_seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"


def percent(share: float) -> str:
    """`97.3%`, `1,234.5%`; never a round `0%` or `100%` for something that only comes close."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:,.1%}"


def agreement(value: float | None) -> str:
    """Four decimals, rounded down: what failed a limit must not look as if it had met it."""
    return "-" if value is None else f"{math.floor(value * 10_000) / 10_000:g}"


def plain(text: str) -> str:
    """Foreign text on one line, without control characters.

    Names and messages quote what files contain; escape sequences, text direction marks and lone
    surrogates must reach neither a terminal nor a page.
    """
    one_line = " ".join(text.split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in one_line)


def message(text: str) -> str:
    """`plain`, and not endless."""
    safe = plain(text)
    is_long = len(safe) > MAX_MESSAGE_CHARACTERS
    return safe[: MAX_MESSAGE_CHARACTERS - 3] + "..." if is_long else safe


def headline(report: RunReport) -> str:
    """What happened, in one line."""
    if report.rows == 0:
        verdict = "No rows to score"
    elif report.quarantined == 0:
        verdict = f"All {plural(report.rows, 'row')} scored"
    else:
        verdict = (
            f"{count(report.scored)} of {plural(report.rows, 'row')} scored, "
            f"{count(report.quarantined)} quarantined"
        )
    if report.unreadable_files:
        verdict += f"; {plural(len(report.unreadable_files), 'file')} cannot be read"
    elif report.degraded:
        verdict += "; the input is damaged"
    if is_old(report):
        return f"Already published: {verdict[0].lower()}{verdict[1:]}"
    return verdict


def subline(report: RunReport) -> str:
    """What the headline leaves open: how long it took, and where."""
    where = f"{duration(report.wall_s)} on {plain(report.device)}"
    if is_old(report):
        return f"Nothing was left to do. The run that published {plain(report.date)} took {where}."
    attempts = f", in {report.attempts} attempts" if report.attempts > 1 else ""
    lost = sum(num for reason, num in reasons(report) if reason.startswith(LOST_GROUP))
    rows = f" Rate and price count {plural(lost, 'row')} of damaged row groups." if lost else ""
    return f"{where}{attempts}.{rows}"


def is_old(report: RunReport) -> bool:
    """Whether the command found the work done, and shows the report of the run that did it."""
    return report.status == "already_published"


def bottleneck_sentence(report: RunReport) -> str:
    """Which stage bound the run."""
    times = report.stages.get(report.bottleneck)
    if times is None:
        return "No stage ran in this attempt."
    name, share = plain(report.bottleneck), percent(times.busy_share)
    if times.busy_share < NEARLY_ALWAYS:
        return f"No stage was busy nearly all the time; {name} most of all: {share} of its time."
    return f"The bottleneck was {name}: busy {share} of its time."


def scoring_per_s(report: RunReport) -> float | None:
    """Rows per second while scoring, in this attempt; None when nothing was scored."""
    if report.limit is not None:
        return report.limit.rate_per_sec
    written = report.stages.get("write")
    if written is None or not written.items or not report.phases.score_s:
        return None
    return written.items / report.phases.score_s


def limit_sentence(report: RunReport) -> str | None:
    """How near the run came to what its stages allow together, and what the gap cost."""
    limit = report.limit
    if limit is None:
        return None
    bound_by = plain(limit.bound_by)
    gap = f"the gap cost {usd(limit.gap_usd_per_100k)} per 100,000 rows"
    if limit.reached >= 1:
        allowed, gap = "its own measurements let expect", "no gap to pay for"
    elif limit.bound_by == waited_for(report.stages):
        allowed, bound_by = "the device's work allows", f"{bound_by}, for which the device waited"
    else:
        allowed = "its stages allow together"
    where = " (in the attempt that published)" if report.attempts > 1 else ""
    return (
        f"{percent(limit.reached)} of the {amount(limit.per_sec)} rows/s that {allowed}, "
        f"bound by {bound_by}; {gap}{where}."
    )


def limits(report: RunReport) -> list[StageLimit]:
    """The ceilings measured on this device, each with the share that the run reached."""
    if report.ceilings is None:
        return []
    per_s = scoring_per_s(report)
    named = {
        "decoding alone": report.ceilings.decode_per_sec,
        "engine alone": report.ceilings.engine_per_sec,
        "engine with copies": report.ceilings.engine_with_copies_per_sec,
    }
    if report.limit is not None:
        named["all stages together"] = report.limit.per_sec
    return [
        StageLimit(name=name, per_s=limit, reached=per_s / limit if per_s and limit else None)
        for name, limit in named.items()
    ]


def phases(report: RunReport) -> list[Share]:
    """This attempt's wall-clock seconds, in order."""
    return _shares(
        {
            "start-up": report.phases.startup_s,
            "plan": report.phases.plan_s,
            "engine": report.phases.engine_s,
            "score": report.phases.score_s,
            "publish": report.phases.publish_s,
        }
    )


def costs_per_100k(report: RunReport) -> list[Share]:
    """Dollars per 100,000 rows that this version scored, by what they were spent on."""
    rows = report.rows - report.rows_taken_over
    per_100k = 100_000 / rows if rows else 0.0
    amounts = {
        "scoring": report.cost.scoring_usd * per_100k,
        "building the engine": report.cost.building_usd * per_100k,
        "other": report.cost.other_usd * per_100k,
    }
    if report.cost.replay_usd:
        amounts["replay"] = report.cost.replay_usd * per_100k
    return _shares(amounts)


def shards_sentence(report: RunReport) -> str:
    """How many shards, and how many of them this attempt did not score."""
    shards = count(report.shards)
    if not report.shards_reused:
        return shards
    reused = f"{shards}, {count(report.shards_reused)} of them from an earlier attempt"
    if not report.rows_taken_over:
        return reused
    rows = plural(report.rows_taken_over, "row")
    return f"{reused} or version ({rows} of the version before: in no rate or price)"


def interruption_sentence(report: RunReport) -> str | None:
    """What interruptions cost; None when there were none."""
    if not report.interruptions and not report.rows_replayed:
        return None
    what = plural(report.interruptions, "interruption") if report.interruptions else "none"
    if not report.rows_replayed:
        return f"{what}; no row scored twice"
    at_most = "" if report.replay_is_exact else "at most "
    rows = plural(report.rows_replayed, "row")
    return f"{what}; {at_most}{rows} scored twice, {usd(report.cost.replay_usd)}"


def market(price: Price) -> str:
    """`on demand`, `spot` or `own price`."""
    return MARKETS.get(price.market, plain(price.market))


def hourly(price: Price) -> str:
    """Which price an hour of the machine has."""
    hour = f"${price.usd_per_hour:,.6g} an hour ({plain(price.currency)})"
    return f"{plain(price.instance)}, {market(price)}, {hour}"


def engine_name(engine: EngineFacts) -> str:
    """`openvino int8, batches of 8`."""
    return f"{plain(engine.runtime)} {plain(engine.precision)}, batches of {engine.batch_size}"


def engines_sentence(engines: Sequence[EngineRows]) -> str | None:
    """Which engines scored how many rows; None when it was one."""
    if len(engines) < 2:
        return None
    return "; ".join(
        f"{plain(engine.key[:12])} for {plain(engine.device or 'a device that nobody knows now')}: "
        f"{plural(engine.rows, 'row')}"
        for engine in engines
    )


def engine_origin(engine: EngineFacts) -> str:
    """Whether this run had to build it."""
    return f"built in {duration(engine.build_s)}" if engine.built else "taken from the store"


def agreement_sentence(engine: EngineFacts) -> str:
    """How true the engine is to the model."""
    held_out = plural(engine.num_held_out, "held-out row")
    return (
        f"{agreement(engine.agreement)} with fp32 on {held_out}; "
        f"at least {agreement(engine.min_agreement)} required"
    )


def reasons(report: RunReport) -> list[tuple[str, int]]:
    """Quarantined rows by reason, the most frequent first."""
    return sorted(report.quarantined_by_reason.items(), key=lambda item: (-item[1], item[0]))


def _shares(amounts: dict[str, float]) -> list[Share]:
    total = sum(amounts.values())
    return [
        Share(name=name, amount=value, share=value / total if total else 0.0)
        for name, value in amounts.items()
    ]
