"""How near a run came to what its own stages allow, and what the rest of the way costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.report import Ceilings, Cost, Limit, StageTimes


def sum_of_ceilings(several: Iterable[Ceilings | None]) -> Ceilings | None:
    """What lanes side by side can do; those that measured nothing do not count."""
    measured = [ceilings for ceilings in several if ceilings is not None]
    if not measured:
        return None
    return Ceilings(
        decode_per_sec=sum(ceilings.decode_per_sec for ceilings in measured),
        engine_per_sec=sum(ceilings.engine_per_sec for ceilings in measured),
        engine_with_copies_per_sec=sum(one.engine_with_copies_per_sec for one in measured),
    )


def limit_of(
    ceilings: Ceilings | None,
    stages: Mapping[str, StageTimes],
    cost: Cost,
    *,
    rows: int,
    num_lanes: int,
    num_threads: int | None,
) -> Limit | None:
    """The limit of a run; None when nothing was scored or measured.

    On a device stages work side by side, and the slowest is the limit. On a CPU they share the
    cores: a row costs the sum of what each stage costs. Decoder and engine were measured alone;
    what a row costs to read and to write is the CPU time of those stages in the run itself.

    Args:
        ceilings: Of all lanes together.
        stages: Times, summed over lanes; the lanes' start is not in them.
        cost: Of the run.
        rows: Of the run, reused ones too: what `cost` was spent on.
        num_lanes: Lanes side by side.
        num_threads: Threads of each lane whose stages share the cores; None: on a device.
    """
    written = stages.get("write")
    if ceilings is None or written is None or not written.items:
        return None
    rate_per_sec = written.items * num_lanes / (written.busy_s + written.wait_s)
    decode_s, infer_s = 1 / ceilings.decode_per_sec, 1 / ceilings.engine_with_copies_per_sec
    seconds = {"decode": decode_s, "infer": infer_s}
    if num_threads is not None:
        for name in ("read", "write"):
            per_row_s = stages[name].cpu_s / max(1, stages[name].items)
            seconds[name] = per_row_s / (num_threads * num_lanes)
    per_sec = 1 / (max(seconds.values()) if num_threads is None else sum(seconds.values()))
    reached = rate_per_sec / per_sec
    gap_usd = cost.scoring_usd * max(0.0, 1 - reached)
    return Limit(
        per_sec=per_sec,
        rate_per_sec=rate_per_sec,
        reached=reached,
        bound_by=max(seconds, key=lambda name: seconds[name]),
        gap_usd=gap_usd,
        gap_usd_per_100k=gap_usd * 100_000 / rows if rows else 0.0,
    )
