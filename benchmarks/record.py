"""The record of a comparison in benchmarks/, its plot, and the tables that README.md quotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.answers import LABELS
from benchmarks.contenders import PRODUCT, Workload
from benchmarks.goals import find_goals
from benchmarks.goals import to_markdown as goals_to_markdown
from benchmarks.plot import to_svg
from benchmarks.rounds import Run
from benchmarks.summary import Summary, failures, summarise, to_markdown


class MarkerError(Exception):
    """README.md has no place for a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that is said of one workload."""

    workload: Workload
    runs: Sequence[Run]
    num_rounds: int
    machine: dict[str, Any]
    """As flows/measuring/bench_setup.py tells."""
    command: str
    notes: Sequence[str]
    """What a reader must know beside the table."""

    @property
    def date(self) -> str:
        """The day of the first run."""
        return self.runs[0].at[:10]

    @property
    def where(self) -> str:
        """Date and machine, in one line."""
        instructions = " ".join(self.machine["instructions"])
        return (
            f"{self.date}, {self.machine['cpu']}, {self.machine['cores']} cores"
            f"{f' ({instructions})' if instructions else ''}"
        )

    @property
    def stem(self) -> str:
        """Name of the record's files: that of another kind of machine is not overwritten."""
        newest = "".join(f"-{name}" for name in self.machine["instructions"][-1:])
        return f"{self.date}-peers-{self.workload.name}-{self.machine['cores']}-cores{newest}"


def write_record(comparison: Comparison, folder: Path) -> Path:
    """Write `<date>-peers-<workload>-<machine>.md` and its plot; the path of the first."""
    summaries = summarise(comparison.runs)
    folder.mkdir(parents=True, exist_ok=True)
    name = comparison.workload.name
    plot = to_svg(
        summaries,
        f"{name}: examples per second, process start to written output",
        comparison.where,
        f"medians of {comparison.num_rounds} interleaved rounds; whiskers: lowest and highest",
    )
    (folder / f"{comparison.stem}.svg").write_text(plot, encoding="utf-8")
    record = folder / f"{comparison.stem}.md"
    record.write_text(_record(comparison, summaries), encoding="utf-8")
    return record


def _record(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    machine = comparison.machine
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    rounds = f"{comparison.num_rounds} interleaved round{'s' * (comparison.num_rounds != 1)}"
    notes = [*_engines(comparison.runs), *comparison.notes, *failures(summaries)]
    lines = [
        f"# nightscore and its peers: {comparison.workload.name}",
        "",
        f"{comparison.where}. Command: `{comparison.command}`, {rounds}, medians; how to read it:",
        "[README](README.md).",
        "",
        table_of(comparison, summaries),
        "",
        f"![examples per second]({comparison.stem}.svg)",
        "",
        "## What was asked",
        "",
        goals_to_markdown(find_goals(comparison.workload.name, summaries)),
        "",
        "## How",
        "",
        *(f"- {note}" for note in notes),
        f"- nightscore: revision {machine['git_revision'] or 'unknown'}; {versions}",
        f"- {machine['os']}, Python {machine['python']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; peers: as pinned in peers/setup.sh",
        "",
    ]
    return "\n".join(lines)


def table_of(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """The table; without labels its quality column says whose answers are agreed with."""
    against = {s.marked_against for s in summaries if s.marked_against}
    quality = comparison.workload.quality
    if quality == "top-1 accuracy" and against != {LABELS}:
        quality = f"same top-1 as {', '.join(sorted(against)) or 'nobody'}"
    return to_markdown(summaries, quality)


def _engines(runs: Sequence[Run]) -> list[str]:
    used = {run.measured.engine for run in runs if run.measured and run.measured.engine}
    return [f"{PRODUCT}'s engine: {engine}" for engine in sorted(used)]


def readme_section(comparison: Comparison, record: str) -> str:
    """What README.md says of a workload: the table, and where it comes from.

    Args:
        comparison: What was measured.
        record: Path of the record, relative to README.md.
    """
    table = table_of(comparison, summarise(comparison.runs))
    source = (
        f"{comparison.where}; `{comparison.command}`, medians of {comparison.num_rounds} "
        f"interleaved rounds; [record]({record})"
    )
    return f"{table}\n\n{source}"


def replace_section(text: str, name: str, section: str) -> str:
    """`text` with what is between `<!-- peers:NAME -->` and `<!-- /peers:NAME -->` replaced.

    Raises:
        MarkerError: Not exactly one such pair is there.
    """
    opening, closing = f"<!-- peers:{name} -->", f"<!-- /peers:{name} -->"
    before, found, rest = text.partition(opening)
    _, ended, after = rest.partition(closing)
    if not (found and ended) or text.count(opening) + text.count(closing) != 2:
        raise MarkerError(
            f"README.md: {text.count(opening)} `{opening}` and {text.count(closing)} `{closing}`; "
            "expected one of each, in this order. Put them where the table belongs."
        )
    return f"{before}{opening}\n{section}\n{closing}{after}"
