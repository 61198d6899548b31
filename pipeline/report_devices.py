"""What the devices did, in words and as the cells of a table; for terminal, Markdown and page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline import report_words as words
from pipeline.report import DeviceUse, RunReport

GIB = 1024**3
UNKNOWN = "-"
COLUMNS = (
    "device",
    "busy",
    "at most",
    "memory",
    "power",
    "energy",
    "SM clock",
    "clocks lowered",
)


def device_rows(report: RunReport) -> list[tuple[str, ...]]:
    """A row for each device, its cells in the order of `COLUMNS`."""
    return [
        (
            words.plain(use.name),
            _cell(use.utilisation_mean, words.percent),
            _cell(use.utilisation_max, words.percent),
            _cell(use.memory_peak_bytes, _gib),
            _cell(use.power_mean_w, _watts),
            _cell(use.energy_j, _joules),
            _cell(use.sm_clock_mean_mhz, _mhz),
            _throttling(use) or UNKNOWN if use.kind == "gpu" else UNKNOWN,
        )
        for use in report.devices
    ]


def device_facts(report: RunReport) -> list[tuple[str, str]]:
    """A line for the GPUs, one for the CPU, one for the energy; none for what is unknown."""
    facts = []
    for kind in ("gpu", "cpu"):
        uses = [use for use in report.devices if use.kind == kind]
        if sentence := _together(uses):
            facts.append((f"{kind.upper()} while scoring", sentence))
    if energy := energy_sentence(report):
        facts.append(("energy", energy))
    return facts


def energy_sentence(report: RunReport) -> str | None:
    """Joules per 1,000 rows, and what they are those of; None when unknown."""
    if report.joules_per_1000_rows is None:
        return None
    kinds = {use.kind for use in report.devices if use.energy_j is not None}
    of = {"gpu": "GPU alone", "cpu": "CPU packages alone"}
    whose = of[kinds.pop()] if len(kinds) == 1 else "GPU and CPU packages"
    return f"{words.amount(report.joules_per_1000_rows)} J per 1,000 rows ({whose})"


def _together(uses: Sequence[DeviceUse]) -> str:
    """Devices of one kind in one line: means of means, and the extremes."""
    if not uses:
        return ""
    means = [use.utilisation_mean for use in uses if use.utilisation_mean is not None]
    peaks = [use.utilisation_max for use in uses if use.utilisation_max is not None]
    memory = [use.memory_peak_bytes for use in uses if use.memory_peak_bytes is not None]
    clocks = [use.sm_clock_mean_mhz for use in uses if use.sm_clock_mean_mhz is not None]
    watts = {use.energy_meter: use.power_mean_w for use in uses if use.power_mean_w is not None}
    cpu_s = [use.cpu_s for use in uses if use.cpu_s is not None]
    lowered = [text for use in uses if (text := _throttling(use))]
    # Cores are busy with other people's work too; the run's own part is its CPU time.
    with_what = " with everything on it" if cpu_s else ""
    facts = [
        f"{words.percent(sum(means) / len(means))} busy{with_what}" if means else "",
        f"at most {words.percent(max(peaks))}" if peaks else "",
        f"{words.duration(sum(cpu_s))} of CPU time for this run" if cpu_s else "",
        f"{_gib(max(memory))} of memory" if memory else "",
        _watts(sum(watts.values())) if watts else "",
        _mhz(sum(clocks) / len(clocks)) if clocks else "",
        f"clocks lowered: {lowered[0]}" if lowered else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def _throttling(use: DeviceUse) -> str:
    """`sw_power_cap 12.0%`, the most frequent reason first."""
    return ", ".join(f"{name} {words.percent(share)}" for name, share in use.throttled.items())


def _cell(value: float | None, text: Callable[[float], str]) -> str:
    return UNKNOWN if value is None else text(value)


def _gib(num_bytes: float) -> str:
    return f"{words.amount(num_bytes / GIB)} GiB"


def _watts(power_w: float) -> str:
    return f"{words.amount(power_w)} W"


def _joules(energy_j: float) -> str:
    return f"{words.amount(energy_j)} J"


def _mhz(clock: float) -> str:
    return f"{clock:,.0f} MHz"
