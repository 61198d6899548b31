"""`score tune`: searches the settings of a lane within a time budget, and keeps what is faster."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engines.keys import runtime_version
from engines.manifest import EngineManifest
from flows.devices import lane_devices
from flows.measuring.tune_search import DEFAULTS, Axis, Comparison, Search
from flows.measuring.tune_trials import LaneTrials
from pipeline.block_size import BLOCK_ROWS, QUEUE_DEPTH, decoder_kind
from pipeline.config import Job
from pipeline.lane import LaneDevice
from pipeline.ledger import utc_now
from pipeline.tuning import (
    LaneSettings,
    Tuning,
    find_tuning,
    forget_tuning,
    is_free,
    tuning_key,
    write_tuning,
)

Facts = dict[str, Any]
Say = Callable[[str], None]

TRIALS_PER_BUDGET = 150
TRIAL_S = (0.2, 3.0)
"""Seconds that a trial measures at least and at most."""
HARDWARE_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0)
QUEUE_DEPTHS = (1, 2, 4, 8)
FACTORS = (0.25, 0.5, 1, 2, 4)
"""Of the default, for blocks and batches."""


def tune_facts(job: Job, date: str, budget_s: float, say: Say) -> Facts:
    """Search, and keep the result in the job's engine store, even that the defaults are best.

    The engine for the defaults is built first when there is none; the budget begins after that.
    An interruption keeps settings that have been accepted until then.
    """
    device = lane_devices(job)[0]
    earlier = find_tuning(job, device.engine_device)
    shortest, longest = TRIAL_S
    trial_s = min(max(budget_s / TRIALS_PER_BUDGET, shortest), longest)
    with LaneTrials(job, date, device, trial_s, say) as trials:
        manifest = trials.engine(DEFAULTS).manifest
        search = Search(trials, axes_of(job, device, manifest), budget_s, say)
        started = time.monotonic()

        def result() -> Tuning:
            took_s = round(time.monotonic() - started, 1)
            default, tuned = search.rates
            return Tuning(
                key=tuning_key(job, device.engine_device),
                job=job.name,
                device=manifest.device.name,
                num_threads=device.num_threads,
                settings=search.best,
                rows_per_s_default=default,
                rows_per_s_tuned=tuned,
                confirmed=search.confirmed,
                num_rows=trials.num_rows,
                num_trials=search.num_trials,
                budget_s=budget_s,
                took_s=took_s,
                versions=_versions(manifest),
                host=socket.gethostname(),
                tuned_at=utc_now(),
            )

        try:
            search.run(_seeds(job, earlier))
        except BaseException:
            if search.best != DEFAULTS:
                write_tuning(job, result())
            raise
    tuning = result()
    # Without a judgement an earlier tuning stays.
    path = write_tuning(job, tuning) if search.has_judged else None
    return {
        **asdict(tuning),
        "gain": tuning.gain,
        "is_out_of_time": search.is_out_of_time,
        "comparisons": [_comparison_facts(comparison) for comparison in search.comparisons],
        "file": f"{job.engine.store}/{path}" if path else None,
    }


def forget_facts(job: Job) -> Facts:
    """Go back to the defaults on this device."""
    num_removed = forget_tuning(job, lane_devices(job)[0].engine_device)
    return {"job": job.name, "store": job.engine.store, "removed": num_removed}


def axes_of(job: Job, device: LaneDevice, manifest: EngineManifest) -> tuple[Axis, ...]:
    """What can be searched: settings that matter on this lane and that the job leaves open.

    The batch size comes last: each needs an engine of its own.
    """
    threads, batch = device.num_threads, manifest.batch_size
    some_threads = {max(1, threads // 4), max(1, threads // 2), threads, threads + -(-threads // 2)}
    on_gpu = manifest.device.kind == "gpu"
    decoder = decoder_kind(job, on_gpu=on_gpu)
    load = job.lanes.gpu_decode.hardware_decoder_load
    candidates: dict[str, tuple[tuple[float, ...], float]] = {}
    if not on_gpu:
        candidates["engine_threads"] = (tuple(some_threads), threads)
    if decoder in ("dali", "gpu"):  # on cores the engine's threads decode
        candidates["decode_threads"] = (tuple(some_threads), threads)
    if decoder == "gpu":  # there a block is a batch
        candidates["hardware_decoder_load"] = (HARDWARE_LOADS, load)
    else:
        block = BLOCK_ROWS[decoder]
        candidates["block_rows"] = (tuple(int(block * factor) for factor in FACTORS), block)
    candidates["queue_depth"] = (QUEUE_DEPTHS, QUEUE_DEPTH)
    candidates["batch_size"] = (tuple(max(1, int(batch * factor)) for factor in FACTORS), batch)
    return tuple(
        Axis(setting=name, values=tuple(sorted({*values, default})), default=default)
        for name, (values, default) in candidates.items()
        if is_free(job, name)
    )


def _seeds(job: Job, earlier: Tuning | None) -> list[LaneSettings]:
    """What an earlier tuning found, of what the job still leaves open."""
    if earlier is None:
        return []
    given = earlier.settings.given()
    return [LaneSettings(**{name: given[name] for name in given if is_free(job, name)})]


def _versions(manifest: EngineManifest) -> dict[str, str]:
    names = (manifest.runtime, "nvidia-dali-cuda130", "nightscore")
    return {name: runtime_version(name) for name in names}


def _comparison_facts(comparison: Comparison) -> Facts:
    return {
        "candidate": comparison.candidate.given(),
        "reference": comparison.reference.given(),
        "gain": comparison.gain,
        "verdict": comparison.verdict,
        "rates": comparison.rates,
        "reference_rates": comparison.reference_rates,
    }


def render_tuning(facts: Facts) -> RenderableType:
    """What was found, and what it brings."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    given = {name: value for name, value in facts["settings"].items() if value is not None}
    for name, value in given.items():
        table.add_row(name, f"{value:,}")
    default, tuned = facts["rows_per_s_default"], facts["rows_per_s_tuned"]
    table.add_row("defaults", f"{default:,.0f} rows/s end to end")
    if given:
        table.add_row("tuned", f"{tuned:,.0f} rows/s, {facts['gain']:+.1%}")
    table.add_row(
        "measured",
        f"{facts['num_trials']} trials of {facts['num_rows']:,} rows in {facts['took_s']:,.0f} s"
        + (", not all settings" if facts["is_out_of_time"] else ""),
    )
    table.add_row("file", facts["file"] or "none; an earlier tuning stays as it is")
    what = "faster settings, used from now on" if given else "nothing is faster than the defaults"
    if facts["file"] is None:
        what = "nothing could be compared within the budget; give more with --budget-s"
    return Group(Text(f"{facts['job']} on {facts['device']}: {what}", style="bold"), table)


def render_forgotten(facts: Facts) -> RenderableType:
    """What was removed."""
    return Text(f"{facts['job']}: {facts['removed']} tunings removed; the defaults are used")
