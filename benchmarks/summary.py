"""From runs to medians, and from medians to a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.contenders import PRODUCT
from benchmarks.rounds import Measured, Run

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and extremes."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Medians over the rounds of one contender; None where no run of the kind ended well."""

    name: str
    rows: int | None
    examples_per_s: Spread | None
    cpu_s_per_1000: Spread | None
    peak_rss_bytes: float | None
    startup_s: Spread | None
    """The whole command on the start-up set."""
    wall_s: float | None
    quality: float | None
    marked_against: str | None
    of_limit: float | None
    """See `Measured.of_limit`."""
    other_load_cores: float | None
    num_runs: int
    """Of either kind, failed ones included."""
    num_failed: int
    errors: tuple[str, ...]
    """How they failed, each said once."""


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One summary for each contender, the fastest first, those that never ended well last."""
    names = dict.fromkeys(run.name for run in runs)
    found = [_summary(name, [run for run in runs if run.name == name]) for name in names]
    return sorted(found, key=lambda s: -s.examples_per_s.middle if s.examples_per_s else 1.0)


def _summary(name: str, runs: list[Run]) -> Summary:
    full = [run.measured for run in runs if run.measured and run.kind == "full"]
    startup = [run.measured for run in runs if run.measured and run.kind == "startup"]

    def middle(measured: list[Measured], value: Callable[[Measured], float | None]) -> float | None:
        values = [found for m in measured if (found := value(m)) is not None]
        return median(values) if values else None

    return Summary(
        name=name,
        rows=full[0].rows if full else None,
        examples_per_s=_spread([m.rows / m.seconds for m in full]),
        cpu_s_per_1000=_spread([m.cpu_s / m.rows * 1000 for m in full]),
        peak_rss_bytes=middle(full, lambda m: m.peak_rss_bytes),
        startup_s=_spread([m.seconds for m in startup]),
        wall_s=middle(full, lambda m: m.wall_s),
        quality=middle(full, lambda m: m.quality),
        marked_against=full[0].marked_against if full else None,
        of_limit=middle(full, lambda m: m.of_limit),
        other_load_cores=middle(full, lambda m: m.other_load_cores),
        num_runs=len(runs),
        num_failed=sum(run.error is not None for run in runs),
        errors=tuple(dict.fromkeys(f"{run.kind}: {run.error}" for run in runs if run.error)),
    )


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(middle=median(values), low=min(values), high=max(values))


def fastest_peer(summaries: Sequence[Summary]) -> float | None:
    """Median examples per second of the best peer."""
    rates = [s.examples_per_s.middle for s in summaries if s.examples_per_s and s.name != PRODUCT]
    return max(rates, default=None)


def to_markdown(summaries: Sequence[Summary], quality: str) -> str:
    """A line for each contender, which says how many of its runs failed; see `failures` for why.

    Args:
        summaries: In the table's order.
        quality: Heading of the quality's column.
    """
    headings = (
        *("command", "rows", "examples/s (min to max)", "of fastest peer", "CPU s / 1,000 rows"),
        *("peak RSS MiB", "start-up s", "wall s", quality, "other load"),
    )
    lines = [f"| {' | '.join(headings)} |", "|---|" + "--:|" * (len(headings) - 1)]
    lines += [f"| {' | '.join(_cells(s, fastest_peer(summaries)))} |" for s in summaries]
    return "\n".join(lines)


def _cells(summary: Summary, fastest: float | None) -> list[str]:
    rate, memory = summary.examples_per_s, summary.peak_rss_bytes
    name = f"**{summary.name}**" if summary.name == PRODUCT else summary.name
    return [
        name + (f" ({_failed(summary)})" if summary.num_failed else ""),
        _known(summary.rows, ","),
        _spread_words(rate, ",.0f"),
        _known(rate.middle / fastest if rate and fastest else None, ".2f"),
        _spread_words(summary.cpu_s_per_1000, ".4g"),
        _known(memory / MIB if memory else None, ",.0f"),
        _spread_words(summary.startup_s, ".2f"),
        _known(summary.wall_s, ".2f"),
        _known(summary.quality, ".5g"),
        _known(summary.other_load_cores, ".2f"),
    ]


def failures(summaries: Sequence[Summary]) -> list[str]:
    """A line for each contender of which a run failed: how, as it said itself."""
    return [
        f"{s.name}, {_failed(s)}: {' '.join('; '.join(s.errors).split())}"
        for s in summaries
        if s.num_failed
    ]


def _failed(summary: Summary) -> str:
    return f"{summary.num_failed} of {summary.num_runs} runs failed"


def _spread_words(found: Spread | None, form: str) -> str:
    if found is None:
        return "-"
    low, middle, high = (format(value, form) for value in (found.low, found.middle, found.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
