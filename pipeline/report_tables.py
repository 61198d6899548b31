"""The rows of the report's tables as cells of text, the same for terminal, Markdown and page."""

from __future__ import annotations

from pipeline import report_words as words
from pipeline.report import RunReport
from pipeline.report_engine import EngineFacts, EngineRung

Rows = list[tuple[str, ...]]


def of_attempt(label: str, report: RunReport) -> str:
    """A label of what is only known of the attempt that published; says so if others were before.

    The wall clock and the cost that stand beside it are those of all attempts.
    """
    return f"{label} (last attempt)" if report.attempts > 1 else label


def stage_rows(report: RunReport) -> Rows:
    """Stage, busy, waiting, rows, busy share; in the order of the stages."""
    return [
        (
            words.plain(name),
            words.duration(times.busy_s),
            words.duration(times.wait_s),
            words.count(times.items),
            words.percent(times.busy_share),
        )
        for name, times in report.stages.items()
    ]


def limit_rows(report: RunReport) -> Rows:
    """Ceiling, rows per second, share reached; in the order of `report_words.limits`."""
    return [
        (
            limit.name,
            words.amount(limit.per_s),
            "unknown" if limit.reached is None else words.percent(limit.reached),
        )
        for limit in words.limits(report)
    ]


def rung_rows(report: RunReport) -> Rows:
    """Candidate, rows per second, agreement, cosine, divergence, result."""
    return [
        (
            f"{words.plain(rung.runtime)} {words.plain(rung.precision)}",
            words.amount(rung.rows_per_s) if rung.rows_per_s else "-",
            words.agreement(rung.agreement),
            words.agreement(rung.cosine),
            "-" if rung.divergence is None else f"{rung.divergence:.4f}",
            _result(rung, report.engine),
        )
        for rung in report.engine.rungs
    ]


def reason_rows(report: RunReport) -> Rows:
    """Reason, rows; in the order of `report_words.reasons`."""
    return [(words.plain(reason), words.count(rows)) for reason, rows in words.reasons(report)]


def sample_rows(report: RunReport) -> Rows:
    """File, row index or range of them, reason, message."""
    return [
        (
            words.plain(sample.file),
            words.count(sample.row)
            if sample.num_rows == 1
            else f"{words.count(sample.row)} to {words.count(sample.row + sample.num_rows - 1)}",
            words.plain(sample.reason),
            words.message(sample.message),
        )
        for sample in report.quarantine_samples
    ]


def unreadable_rows(report: RunReport) -> Rows:
    """File, bytes, rows, message."""
    return [
        (
            words.plain(file.path),
            words.count(file.num_bytes),
            "row count unknown",
            words.message(file.message),
        )
        for file in report.unreadable_files
    ]


def is_chosen(rung: EngineRung, engine: EngineFacts) -> bool:
    """Whether this candidate became the engine."""
    return rung.passed and (rung.runtime, rung.precision) == (engine.runtime, engine.precision)


def _result(rung: EngineRung, engine: EngineFacts) -> str:
    if rung.error:
        return words.message(rung.error)
    said = ["chosen" if is_chosen(rung, engine) else "passed"]
    if not rung.passed:
        said = ["missed the gate" + (f": {', '.join(rung.failures)}" if rung.failures else "")]
    if rung.metric is not None and rung.reference_metric is not None:
        said.append(f"{rung.metric_name} {rung.metric:.4f} (fp32 {rung.reference_metric:.4f})")
    if rung.float_layers:
        said.append(words.plural(len(rung.float_layers), "layer") + " in float")
    if rung.note:
        said.append(words.message(rung.note))
    return "; ".join(said)
