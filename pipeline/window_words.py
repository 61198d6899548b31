"""The night's window in words: when it will end, what is in danger, and what would save it."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline import report_words as words
from pipeline.cost import InstancePrice
from pipeline.report import WindowOutcome
from pipeline.window import Outlook, Window

PARTS_OF_HARDWARE = re.compile(r"(?:(\d+) x ([^,]+), )?(\d+) vCPU")
"""As configs/prices.yaml writes it: `8 x L4 24 GB, 96 vCPU`, or `4 vCPU, 8 GB`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What works at the night, and what there could be instead."""

    num_lanes: int
    """Of this machine."""
    shards_left: int
    instance: str
    market: str
    output: str
    prices: tuple[InstancePrice, ...]


def clock(moment: datetime.datetime) -> str:
    """`07:00`, in the moment's own time zone."""
    return f"{moment:%H:%M}"


def deadline(window: Window) -> str:
    """`07:00 Europe/Zurich on 2026-11-21`."""
    when = window.deadline
    return f"{clock(when)} {when.tzinfo} on {when:%Y-%m-%d}"


def end(now: datetime.datetime, outlook: Outlook, window: Window | None) -> str:
    """`ends 06:12 (06:05 to 06:20), 48 min 00 s before its deadline`; local time without a window.

    Args:
        now: Knows its time zone.
        outlook: As of then.
        window: Of the night, if it has one.
    """
    zone = window.deadline.tzinfo if window else None
    if not math.isfinite(outlook.left_s):
        return "no end in sight: no row in the last minutes"
    here = now.astimezone(zone)
    soonest, likely, latest = (
        clock(here + datetime.timedelta(seconds=seconds)) if math.isfinite(seconds) else "no end"
        for seconds in (outlook.soonest_s, outlook.left_s, outlook.latest_s)
    )
    said = f"ends {likely} ({soonest} to {latest})"
    if window is None:
        return said
    return f"{said}, {margin(window.margin_s(now) - outlook.left_s)} its deadline"


def margin(seconds: float) -> str:
    """`48 min 00 s before`, `2 h 05 min after`."""
    return f"{words.duration(abs(seconds))} {'before' if seconds >= 0 else 'after'}"


def outcome(found: WindowOutcome) -> str:
    """Whether the window was met, for the report."""
    when = datetime.datetime.fromisoformat(found.deadline)
    verdict = "met" if found.met else "missed"
    return f"{verdict}: published {margin(found.margin_s)} {when:%H:%M on %Y-%m-%d (UTC%z)}"


def danger(
    name: str, now: datetime.datetime, window: Window, outlook: Outlook | None, means: Means
) -> str:
    """A night that will be late, why that is expected, and what would save it.

    Args:
        name: Of job and date.
        now: The moment; knows its time zone.
        window: Of the night.
        outlook: As of now; None: no row is scored yet.
        means: What works at it.
    """
    due = deadline(window)
    left_s = window.margin_s(now)
    if outlook is None:
        passed = words.percent(1 - left_s / window.length_s) if window.length_s else "all"
        return (
            f"{name}: {passed} of its window has passed and no row is scored; expected it "
            f"published by {due}. Look at what it waits for: `score status`, and its log."
        )
    sure = "will" if outlook.soonest_s > left_s else "is likely to"
    rate = f"{words.amount(outlook.rows_per_s)} rows/s"
    if left_s <= 0:
        why = f"{words.count(outlook.rows_left)} rows are left, at {rate}"
    else:
        needed = f"{words.amount(outlook.rows_left / left_s)} rows/s"
        why = f"{end(now, outlook, window)}; {rate}, and it takes {needed}"
    return f"{name}: {sure} miss its deadline, {due}: {why}. {rescue(left_s, outlook, means)}"


def rescue(left_s: float, outlook: Outlook, means: Means) -> str:
    """What would still save a night of which `left_s` seconds of its window are left."""
    if left_s <= 0:
        return "The deadline has passed; the night goes on."
    if outlook.rows_per_s <= 0:
        return "Nothing moves: look at the store and at the log before you add machines."
    factor = outlook.rows_left / left_s / outlook.rows_per_s
    machines = math.ceil(factor)
    if machines * means.num_lanes > means.shards_left:
        return (
            f"It takes {machines} such machines from now on, and only {means.shards_left} shards "
            "are left for their lanes: smaller shards (lanes.shard_rows) next night."
        )
    what = words.plural(machines - 1, "more machine")
    advice = (
        f"What would save it: {what} like this from now on ({machines * means.num_lanes} lanes "
        f"together), with the same command on the same output, {words.plain(means.output)}"
    )
    larger = larger_instance(means.prices, means.instance, factor)
    if larger is None:
        return f"{advice}."
    hourly = larger.spot_usd_per_hour if means.market == "spot" else larger.on_demand_usd_per_hour
    return f"{advice}; next night, a {larger.instance} (${hourly:g} an hour)."


def larger_instance(
    prices: Iterable[InstancePrice], instance: str, factor: float
) -> InstancePrice | None:
    """The cheapest machine with `factor` times the GPUs, or CPUs, of the same kind.

    Kinds are compared by the price list's own words: GPUs by their name, CPUs by the family that
    the instance's name begins with.
    """
    listed = {price.instance: price for price in prices}
    here = _size(listed[instance]) if instance in listed else None
    if here is None:
        return None
    sizes = {name: _size(price) for name, price in listed.items()}
    enough = [
        listed[name]
        for name, size in sizes.items()
        if size and size[0] == here[0] and size[1] >= factor * here[1]
    ]
    return min(enough, key=lambda price: price.on_demand_usd_per_hour, default=None)


def _size(price: InstancePrice) -> tuple[str, int] | None:
    """Kind and number of what computes."""
    found = PARTS_OF_HARDWARE.match(price.hardware)
    if found is None:
        return None
    num_gpus, gpu, num_cpus = found.groups()
    if num_gpus:
        return gpu, int(num_gpus)
    return re.split(r"[.\-_](?=[^.\-_]*$)", price.instance)[0], int(num_cpus)
