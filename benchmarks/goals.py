"""What the product is asked to reach beside its peers, and whether the medians of a run say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.answers import LABELS
from benchmarks.contenders import PRODUCT
from benchmarks.summary import Summary

GIB = 2**30
ENGINES = ("ray_data", "daft", "spark")
HALF_A_POINT = 0.005
ROUNDING = 1e-9  # 0.725 - 0.72 is a little more than half a point


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One thing asked for; `found` is None where one of its sides was not measured."""

    what: str
    asked: float
    found: float | None
    at_least: bool = True
    """False: at most."""

    @property
    def verdict(self) -> str:
        """Whether it is reached, in words."""
        if self.found is None:
            return "not measured"
        above = self.found - self.asked if self.at_least else self.asked - self.found
        reached = above >= -ROUNDING
        return "reached" if reached else "NOT reached"


def find_goals(workload: str, summaries: Sequence[Summary]) -> list[Goal]:
    """The goals of a workload, measured.

    Args:
        workload: `photos` or `features`.
        summaries: Of the product and the peers, from the same rounds.
    """
    by_name = {summary.name: summary for summary in summaries}
    return _photos(by_name) if workload == "photos" else _features(by_name)


def _photos(by_name: Mapping[str, Summary]) -> list[Goal]:
    engines = [f"{name}/{variant}" for name in ENGINES for variant in ("docs", "tuned", "fast")]
    documented = [name for name in engines if name.endswith("/docs")]
    experts = ["expert_script/threads", "expert_script/procs"]
    product = by_name.get(PRODUCT)
    return [
        _faster("the best expert_script", 1.1, by_name, experts),
        _faster("the best variant of Ray Data, Daft and Spark", 1.4, by_name, engines),
        _faster("the best of what their documentations show", 2.3, by_name, documented),
        _faster("torch eager", 15, by_name, ["torch_loader/eager"]),
        Goal(
            what="accuracy lost against the best peer on all rows",
            asked=HALF_A_POINT,
            found=_lost(by_name),
            at_least=False,
        ),
        Goal(
            what="CPU seconds per 1,000 rows, of the lowest peer's",
            asked=1.0,
            found=_share_of_lowest_cpu(by_name),
            at_least=False,
        ),
        _of_limit(product),
        _memory(product, 1.5),
        Goal(
            what="start-up with the engine in the store, s",
            asked=5.0,
            found=product.startup_s.middle if product and product.startup_s else None,
            at_least=False,
        ),
    ]


def _features(by_name: Mapping[str, Summary]) -> list[Goal]:
    return [
        _faster("the best by hand", 0.9, by_name, ["arrow_ort", "pandas_ort", "polars_ort"]),
        _faster("Daft", 2.5, by_name, ["daft"]),
        _faster("Ray Data", 5, by_name, ["ray_data"]),
        _faster("Spark", 5, by_name, ["spark"]),
        _of_limit(by_name.get(PRODUCT)),
        _memory(by_name.get(PRODUCT), 1.0),
    ]


def _faster(whom: str, asked: float, by_name: Mapping[str, Summary], names: Iterable[str]) -> Goal:
    """Speed over the fastest of `names`; not measured unless all of them were."""
    rates = [_rate(by_name.get(name)) for name in (PRODUCT, *names)]
    known = [rate for rate in rates if rate is not None]
    found = known[0] / max(known[1:]) if len(known) == len(rates) else None
    return Goal(what=f"times as fast as {whom}", asked=asked, found=found)


def _rate(summary: Summary | None) -> float | None:
    return summary.examples_per_s.middle if summary and summary.examples_per_s else None


def _lost(by_name: Mapping[str, Summary]) -> float | None:
    product = by_name.get(PRODUCT)
    if product is None or product.quality is None or product.marked_against != LABELS:
        return None
    # torch's accuracy is that of the first rows only
    peers = [s.quality for s in by_name.values() if s is not product and s.rows == product.rows]
    known = [quality for quality in peers if quality is not None]
    return max(known) - product.quality if known else None


def _share_of_lowest_cpu(by_name: Mapping[str, Summary]) -> float | None:
    costs = {n: s.cpu_s_per_1000.middle for n, s in by_name.items() if s.cpu_s_per_1000}
    product = costs.pop(PRODUCT, None)
    return product / min(costs.values()) if product is not None and costs else None


def _of_limit(product: Summary | None) -> Goal:
    found = product.of_limit if product else None
    return Goal(
        what="of what its stages allow on these cores, start-up aside", asked=0.95, found=found
    )


def _memory(product: Summary | None, asked_gib: float) -> Goal:
    found = product.peak_rss_bytes if product else None
    return Goal(
        what="peak memory of the process tree, GiB",
        asked=asked_gib,
        found=None if found is None else found / GIB,
        at_least=False,
    )


def to_markdown(goals: Sequence[Goal]) -> str:
    """The goals as a table."""
    lines = ["| what | asked | found | |", "|---|--:|--:|---|"]
    for goal in goals:
        sign = "at least" if goal.at_least else "at most"
        found = "-" if goal.found is None else f"{goal.found:.4g}"
        lines.append(f"| {goal.what} | {sign} {goal.asked:g} | {found} | {goal.verdict} |")
    return "\n".join(lines)
