"""The report says what the devices did, and nothing of what is unknown."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from pipeline.report import DeviceUse, RunReport
from pipeline.report_devices import COLUMNS, device_facts, device_rows, energy_sentence
from pipeline.report_html import render_html
from pipeline.report_text import render_markdown, render_text

Build = Callable[..., RunReport]


def a_gpu_use(number: int, meter: str, utilisation: float | None) -> DeviceUse:
    return DeviceUse(
        name="NVIDIA H200",
        kind="gpu",
        num_samples=9,
        duration_s=8.0,
        uuid=f"GPU-{number}",
        utilisation_mean=utilisation,
        utilisation_max=utilisation,
        memory_peak_bytes=(10 + number) * 1024**3,
        power_mean_w=500.0,
        energy_j=4000.0,
        energy_meter=meter,
        sm_clock_mean_mhz=1900.0,
        sm_clock_min_mhz=1500.0,
        throttled={"sw_power_cap": 0.125} if number else {},
    )


CPU = DeviceUse(
    name="Xeon",
    kind="cpu",
    num_samples=9,
    duration_s=8.0,
    utilisation_mean=0.5,
    utilisation_max=0.75,
    cpu_s=12.0,
)
GPUS = (a_gpu_use(0, "GPU-0", 0.9), a_gpu_use(1, "GPU-1", 0.8))


def test_devices_of_a_kind_share_a_line(a_report: Build) -> None:
    report = a_report(devices=(*GPUS, CPU), joules_per_1000_rows=2.0)
    assert device_facts(report) == [
        (
            "GPU while scoring",
            "85.0% busy, at most 90.0%, 11.0 GiB of memory, 1,000 W, 1,900 MHz, "
            "clocks lowered: sw_power_cap 12.5%",
        ),
        (
            "CPU while scoring",
            "50.0% busy with everything on it, at most 75.0%, 12.0 s of CPU time for this run",
        ),
        ("energy", "2.00 J per 1,000 rows (GPU alone)"),
    ]


def test_the_power_of_a_gpu_counts_once_for_all_its_slices(a_report: Build) -> None:
    slices = (a_gpu_use(0, "GPU-0", None), a_gpu_use(1, "GPU-0", None))
    ((_, line),) = device_facts(a_report(devices=slices))
    assert line.startswith("11.0 GiB of memory, 500 W")
    assert "busy" not in line


def test_the_table_has_a_row_for_each_device(a_report: Build) -> None:
    rows = device_rows(a_report(devices=(*GPUS, CPU)))
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert rows[1] == (
        "NVIDIA H200",
        "80.0%",
        "80.0%",
        "11.0 GiB",
        "500 W",
        "4,000 J",
        "1,900 MHz",
        "sw_power_cap 12.5%",
    )
    assert rows[2] == ("Xeon", "50.0%", "75.0%", "-", "-", "-", "-", "-")


@pytest.mark.parametrize(
    ("cpu_energy_j", "gpus", "expected"),
    [
        (10.0, (), "CPU packages alone"),
        (10.0, GPUS, "GPU and CPU packages"),
        (None, GPUS, "GPU alone"),
    ],
)
def test_energy_says_whose_it_is(
    a_report: Build, cpu_energy_j: float | None, gpus: tuple[DeviceUse, ...], expected: str
) -> None:
    cpu = DeviceUse(name="x", kind="cpu", num_samples=2, duration_s=1.0, energy_j=cpu_energy_j)
    sentence = energy_sentence(a_report(devices=(*gpus, cpu), joules_per_1000_rows=3.0))
    assert sentence == f"3.00 J per 1,000 rows ({expected})"


def printed(report: RunReport) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(render_text(report))
    return stream.getvalue()


@pytest.mark.parametrize("render", [printed, render_markdown, render_html])
def test_every_form_of_the_report_has_the_devices(
    a_report: Build, render: Callable[[RunReport], str]
) -> None:
    text = render(a_report(devices=(*GPUS, CPU), joules_per_1000_rows=2.0))
    for fact in ("2.00 J per 1,000 rows", "50.0%", "sw_power_cap 12.5%"):
        assert fact in text.replace("\\_", "_")  # as Markdown escapes it


@pytest.mark.parametrize("render", [printed, render_markdown, render_html])
def test_without_samples_the_report_says_nothing_of_devices(
    a_report: Build, render: Callable[[RunReport], str]
) -> None:
    text = render(a_report(devices=()))
    for word in ("while scoring:", "GPU", "energy", "What the devices did"):
        assert word not in text


@pytest.mark.parametrize("render", [printed, render_markdown, render_html])
def test_a_device_that_tells_nothing_gets_no_numbers(
    a_report: Build, render: Callable[[RunReport], str]
) -> None:
    silent = DeviceUse(name="NVIDIA H200", kind="gpu", num_samples=2, duration_s=1.0, uuid="GPU-0")
    text = render(a_report(devices=(silent,)))
    assert "GPU while scoring" not in text
    assert " J per" not in text
    assert "0 W" not in text
