"""What the guards looked at, in words; the terminal, the mail and the page share them."""

from __future__ import annotations

from pipeline import report_words as words
from pipeline.report import Drift, RunReport, ScoreDistribution

MAJOR_SHIFT = 0.25
MINOR_SHIFT = 0.1
"""The usual reading of the index: Siddiqi, Credit Risk Scorecards, 2006."""


def guard_facts(report: RunReport) -> list[tuple[str, str]]:
    """Names and sentences; what the report does not tell is left out."""
    facts = []
    if report.drift is not None:
        facts.append(("drift of the engine", drift_sentence(report.drift)))
    if report.distribution is not None:
        facts.append(("scores, other nights", distribution_sentence(report.distribution)))
    if report.accepted:
        facts.append(("accepted", " ".join(map(words.plain, report.accepted))))
    return facts


def drift_sentence(drift: Drift) -> str:
    """How near what was published is to fp32."""
    rows = words.plural(drift.rows, "row")
    if drift.agreement is None:
        return f"not judged: {words.message(drift.note)}"
    near = f"agreement {words.agreement(drift.agreement)} with fp32 on {rows} of this night"
    if drift.mean_abs_diff is None:
        return near
    return f"{near}; mean difference {words.amount(drift.mean_abs_diff)}"


def distribution_sentence(found: ScoreDistribution) -> str:
    """How far the scores have moved since the last nights."""
    if not found.nights:
        return "no earlier night of this model to compare with"
    parts = [f"{name} {shift_text(psi, found.chance[name])}" for name, psi in found.psi.items()]
    nights = words.plural(len(found.nights), "night")
    since = words.plain(found.nights[-1])
    return f"stability index: {', '.join(parts)}; against {nights} since {since}"


def shift_text(psi: float, chance: float) -> str:
    """`0.312 (a major shift)`."""
    if psi <= max(chance, MINOR_SHIFT):
        meaning = "no shift"
    else:
        meaning = "a major shift" if psi > MAJOR_SHIFT + chance else "a minor shift"
    return f"{psi:.3f} ({meaning})"
