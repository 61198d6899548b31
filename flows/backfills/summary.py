"""What came of a backfill: a line for each date, one exit code, and how it looks."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.cli import EXIT_INTERRUPTED
from pipeline import report_words as words

Status = Literal[
    "published", "already_published", "to_do", "no_input", "failed", "guard", "cost_cap",
    "interrupted",
]  # fmt: skip
SAID: dict[Status, str] = {
    "published": "published",
    "already_published": "already published",
    "to_do": "to do",
    "no_input": "not done: no input",
    "failed": "not done: failed",
    "guard": "not done: a guard",
    "cost_cap": "not done: cost cap",
    "interrupted": "not done: interrupted",
}
EXIT_FAILED, EXIT_STOPPED = 1, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DateOutcome:
    """What came of one date."""

    date: str
    status: Status
    why: str = ""
    """Of a date that is not done, or not whole; what a dry run expects of one that would be."""
    run_id: str | None = None
    rows: int | None = None
    usd: float = 0.0
    """That this command spent on it; of a published date, what all of its attempts cost."""
    wall_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BackfillSummary:
    """What came of all dates, oldest first."""

    job: str
    first: str
    last: str
    dates: tuple[DateOutcome, ...]
    began_at: str | None
    """When the first command for this period began; None: none has, as in a dry run."""
    spent_usd: float
    """Since then, by all commands for this period."""
    max_usd: float | None
    strict: bool
    """Whether a date without input is a failure."""
    dry_run: bool

    @property
    def exit_code(self) -> int:
        """As of the command: the first that applies of 75, 1, 3 and 0; of a dry run 75 or 0.

        75: interrupted, or a store is full or out of reach: the same command goes on. 1: a date
        failed, or has no input and `strict` is set. 3: a guard or the cost cap stopped dates.
        """
        found = {outcome.status for outcome in self.dates}
        if self.dry_run:
            found &= {"interrupted"}
        if "interrupted" in found:
            return EXIT_INTERRUPTED
        if "failed" in found or (self.strict and "no_input" in found):
            return EXIT_FAILED
        return EXIT_STOPPED if found & {"guard", "cost_cap"} else 0

    @property
    def status(self) -> str:
        """`planned`, `done`, `failed`, `stopped` or `interrupted`."""
        names = {EXIT_FAILED: "failed", EXIT_STOPPED: "stopped", EXIT_INTERRUPTED: "interrupted"}
        return names.get(self.exit_code, "planned" if self.dry_run else "done")

    def counts(self) -> dict[Status, int]:
        """Dates by status, in the order of `SAID`."""
        found = Counter(outcome.status for outcome in self.dates)
        return {status: found[status] for status in SAID if found[status]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        head = {"status": self.status, "exit_code": self.exit_code, "counts": self.counts()}
        return {**head, **asdict(self)}

    def headline(self) -> str:
        """`30 dates: 24 published, 2 not done: no input`."""
        parts = [f"{number} {SAID[status]}" for status, number in self.counts().items()]
        return f"{words.plural(len(self.dates), 'date')}: {', '.join(parts) or 'none'}"

    def money(self) -> str:
        """What was spent, and what may be."""
        since = f" since {self.began_at[:16]}" if self.began_at else ""
        of = "" if self.max_usd is None else f" of {words.usd(self.max_usd)}"
        return f"{words.usd(self.spent_usd)}{of} spent{since}"


def render_summary(summary: BackfillSummary) -> RenderableType:
    """A line for each date."""
    table = Table(box=None, pad_edge=False)
    table.add_column("date", no_wrap=True)
    table.add_column("state", overflow="fold")
    for heading in ("rows", "cost"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("why", overflow="fold")
    for outcome in summary.dates:
        rows = "" if outcome.rows is None else words.count(outcome.rows)
        cost = words.usd(outcome.usd) if outcome.usd else ""
        said, why = SAID[outcome.status], Text(words.message(outcome.why))
        table.add_row(outcome.date, said, rows, cost, why)
    return Group(table, Text(), Text(summary.headline()), Text(summary.money()))


def plain_summary(summary: BackfillSummary) -> str:
    """The same as lines of text, for a mail."""
    lines = [
        f"{outcome.date}  {SAID[outcome.status]}  {words.message(outcome.why)}".rstrip()
        for outcome in summary.dates
    ]
    return "\n".join([summary.headline(), summary.money(), "", *lines])
