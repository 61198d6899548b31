"""How near a run came to what its own stages allow, and what the rest of the way costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.report import NO_TIME, Ceilings, Limit, Price, StageTimes

if TYPE_CHECKING:
    from pipeline.lane import LaneFigures

THREADS_OF_THEIR_OWN = ("read", "write")
"""Stages that no ceiling is measured of: they wait for the store more than for the device."""
NEARLY_ALWAYS = 0.9
"""Share of its time from which on a stage bounds the run: all others wait for it."""


def add_times(several: Iterable[dict[str, StageTimes]]) -> dict[str, StageTimes]:
    """Sum of stage times, stage by stage, in order of first appearance."""
    total: dict[str, StageTimes] = {}
    for times in several:
        for name, stage in times.items():
            total[name] = total.get(name, NO_TIME) + stage
    return total


def sum_of_ceilings(lanes: Sequence[LaneFigures]) -> Ceilings | None:
    """What all lanes can do side by side; None when nothing was measured.

    One that had nothing to score measured nothing: it can do what the others can on average.
    """
    telling = [lane for lane in lanes if lane.ceilings is not None]
    measured = [lane.ceilings for lane in telling if lane.ceilings is not None]
    if not measured:
        return None
    scale = _num_devices(lanes) / _num_devices(telling)
    return Ceilings(
        decode_per_sec=scale * sum(ceilings.decode_per_sec for ceilings in measured),
        engine_per_sec=scale * sum(ceilings.engine_per_sec for ceilings in measured),
        engine_with_copies_per_sec=scale * sum(one.engine_with_copies_per_sec for one in measured),
    )


def ceilings_of_cores(times: Mapping[str, StageTimes], num_threads: int) -> Ceilings | None:
    """What threads would do that only decoded, or only inferred; None: no row is done yet.

    By CPU seconds: others may take the cores.
    """
    decode, infer = times.get("decode"), times.get("infer")
    if decode is None or infer is None or not (decode.cpu_s and infer.cpu_s):
        return None
    infer_per_sec = num_threads * infer.items / infer.cpu_s
    return Ceilings(
        decode_per_sec=num_threads * decode.items / decode.cpu_s,
        engine_per_sec=infer_per_sec,
        engine_with_copies_per_sec=infer_per_sec,  # a CPU copies nothing
    )


def bottleneck_of(stages: Mapping[str, StageTimes]) -> str:
    """The stage with the largest busy share; of cores that decode and infer, what takes longer."""
    return max(
        stages,
        key=lambda name: (round(stages[name].busy_share, 6), stages[name].busy_s),
        default="none",
    )


def waited_for(stages: Mapping[str, StageTimes]) -> str | None:
    """Reading or writing, where decoder and engine wait for it nearly all the time."""
    busiest = bottleneck_of(stages)
    is_it = busiest in THREADS_OF_THEIR_OWN and stages[busiest].busy_share >= NEARLY_ALWAYS
    return busiest if is_it else None


def limit_of(
    lanes: Sequence[LaneFigures],
    stages: Mapping[str, StageTimes],
    price: Price,
    *,
    rows: int,
    num_threads: int | None,
) -> Limit | None:
    """The limit of an attempt; None when nothing was scored or measured.

    On a device stages work side by side, and the slowest is the limit: decoder and engine were
    measured alone. On a CPU they share the cores: a row costs the sum of the CPU seconds that each
    stage takes for it, in the run itself (with DALI, decoder and engine were measured alone, too).
    Where decoder and engine wait for reading or writing, that bounds the run; see `waited_for`.

    Args:
        lanes: All of the run, those too that had nothing to score.
        stages: Times, summed over lanes; the lanes' start is not in them.
        price: Of the machine.
        rows: Of the run, those that other attempts scored too: what `usd_per_100k` is divided by.
        num_threads: Threads of each lane whose stages share the cores; None: on a device.
    """
    ceilings = sum_of_ceilings(lanes)
    num_rows = _rows_through(stages)
    if ceilings is None or not num_rows:
        return None
    score_s = max(_total_s(lane.times().get("write")) for lane in lanes)
    seconds = {"decode": 1 / ceilings.decode_per_sec}
    seconds["infer"] = 1 / ceilings.engine_with_copies_per_sec
    if num_threads is not None:
        for name in THREADS_OF_THEIR_OWN:
            per_row_s = stages[name].cpu_s / num_rows
            seconds[name] = per_row_s / (num_threads * _num_devices(lanes))
    row_s = max(seconds.values()) if num_threads is None else sum(seconds.values())
    gap_usd = max(0.0, score_s - num_rows * row_s) * price.usd_per_hour / 3600
    return Limit(
        per_sec=1 / row_s,
        rate_per_sec=num_rows / score_s,
        reached=num_rows * row_s / score_s,
        bound_by=waited_for(stages) or max(seconds, key=lambda name: seconds[name]),
        gap_usd=gap_usd,
        gap_usd_per_100k=gap_usd * 100_000 / rows if rows else 0.0,
    )


def _num_devices(lanes: Sequence[LaneFigures]) -> int:
    """With fewer cores than lanes, several have the same one."""
    cores = [lane.device.cores for lane in lanes if lane.device.cores and lane.device.gpu is None]
    return len(lanes) - len(cores) + len(set(cores))


def _rows_through(stages: Mapping[str, StageTimes]) -> int:
    """Rows that decoder and engine had, and that were committed.

    Those of damaged row groups are committed without; those of a process that died were not.
    """
    return min((stages[name].items for name in ("infer", "write") if name in stages), default=0)


def _total_s(times: StageTimes | None) -> float:
    """Seconds from a lane's first row to its last commit."""
    return times.busy_s + times.wait_s if times else 0.0
