"""What the devices did while something ran: sampled, summed, and None where nobody tells."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pynvml
import pytest

from engines.devices import Gpu, this_cpu
from engines.nvml import discover
from pipeline.cpu_meter import CpuMeter, tree_cpu_s
from pipeline.report import DeviceUse
from pipeline.telemetry import GpuMeter, Sampler, joules_per_1000
from tests.engines.fake_nvml import GIB, NOT_SUPPORTED, a_gpu, a_slice, memory, use_nvml

SPIN = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


def found() -> list[Gpu]:
    return [each.gpu for each in discover().gpus]


def sampled(gpu: Gpu, num_samples: int = 3) -> DeviceUse:
    with GpuMeter(gpu) as meter:
        for _ in range(num_samples):
            meter.read()
    return meter.use()


def percent(value: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(gpu=value, memory=0)


def test_a_gpus_samples_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    capped, hot = (
        pynvml.nvmlClocksEventReasonSwPowerCap,
        pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    )
    values = {
        "UtilizationRates": [percent(0), percent(90), percent(100)],
        "MemoryInfo": [memory(GIB), memory(GIB), memory(5 * GIB), memory(2 * GIB)],
        "PowerUsage": [100_000, 500_000, 700_000],
        "TotalEnergyConsumption": [10_000, 400_000, 1_210_000],
        f"ClockInfo {pynvml.NVML_CLOCK_SM}": [345, 1980, 1500],
        "TemperatureV": [40, 60, 71],
        "CurrentClocksEventReasons": [0, capped, capped | hot],
    }
    use_nvml(monkeypatch, a_gpu(values=values))
    use = sampled(*found())
    assert (use.name, use.kind, use.uuid) == ("NVIDIA H200", "gpu", "GPU-00000000-aaaa")
    assert use.num_samples == 3
    # The first sample says what was before: it counts for the energy and the memory only.
    assert (use.utilisation_mean, use.utilisation_max) == (pytest.approx(0.95), 1.0)
    assert use.power_mean_w == 600
    assert (use.energy_j, use.energy_meter) == (1200.0, "GPU-00000000-aaaa")
    assert (use.sm_clock_mean_mhz, use.sm_clock_min_mhz) == (1740, 1500)
    assert use.memory_clock_mean_mhz == 3201
    assert use.temperature_max_c == 71
    assert use.memory_peak_bytes == 5 * GIB
    assert use.throttled == {"sw_power_cap": 1.0, "sw_thermal_slowdown": 0.5}
    assert use.jpeg_utilisation_mean == pytest.approx(0.2)


@pytest.mark.parametrize("counter", [NOT_SUPPORTED, [5_000_000, 7_000]])
def test_an_energy_counter_that_is_absent_or_began_anew_is_unknown(
    monkeypatch: pytest.MonkeyPatch, counter: object
) -> None:
    use_nvml(monkeypatch, a_gpu(values={"TotalEnergyConsumption": counter}))
    use = sampled(*found())
    assert use.energy_j is None
    assert use.power_mean_w == 400


def test_a_gpu_that_tells_nothing_has_a_use_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_nvml(monkeypatch, a_gpu())
    (gpu,) = found()
    use_nvml(monkeypatch, driver=False)
    use = sampled(gpu)
    assert use == DeviceUse(
        name="NVIDIA H200", kind="gpu", num_samples=3, duration_s=use.duration_s, uuid=gpu.uuid
    )


def test_slices_share_the_meter_of_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = [0, 0, 9_000]
    slices = {0: a_slice(0), 1: a_slice(1)}
    use_nvml(monkeypatch, a_gpu(slices=slices, values={"TotalEnergyConsumption": counter}))
    first, second = found()
    uses = [sampled(first), sampled(second)]
    assert [use.name for use in uses] == ["NVIDIA H200 MIG 1g.18gb"] * 2
    assert {use.energy_meter for use in uses} == {"GPU-00000000-aaaa"}
    assert [use.utilisation_mean for use in uses] == [None, None]


def a_use(kind: str, meter: str | None, energy_j: float | None) -> DeviceUse:
    return DeviceUse(
        name="d", kind=kind, num_samples=2, duration_s=1.0, energy_j=energy_j, energy_meter=meter
    )


@pytest.mark.parametrize(
    ("uses", "num_rows", "expected"),
    [
        ([a_use("gpu", "a", 100.0), a_use("gpu", "a", 100.0)], 500, 200.0),
        ([a_use("gpu", "a", 100.0), a_use("gpu", "b", 50.0), a_use("cpu", "c", 50.0)], 1000, 200.0),
        ([a_use("gpu", "a", 100.0), a_use("cpu", None, None)], 1000, 100.0),
        ([a_use("gpu", "a", None), a_use("cpu", "c", 50.0)], 1000, None),
        ([a_use("cpu", None, None)], 1000, None),
        ([a_use("gpu", "a", 100.0)], 0, None),
        ([], 1000, None),
    ],
)
def test_energy_for_each_thousand_rows_counts_every_meter_once(
    uses: list[DeviceUse], num_rows: int, expected: float | None
) -> None:
    assert joules_per_1000(uses, num_rows) == expected


def test_the_sampler_samples_gpus_and_the_cpu_round_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = [500_000, 600_000, 700_000, 800_000, 1_000_000]
    fake = use_nvml(monkeypatch, a_gpu(0, values={"TotalEnergyConsumption": counter}), a_gpu(1))
    gpu, other = found()
    deadline = time.monotonic() + 20
    with Sampler([gpu, this_cpu(1), gpu], period_s=0.01) as sampler:
        while len(counter) > 1:
            assert time.monotonic() < deadline, "it takes no samples"
            time.sleep(0.01)
    first, cpu = sampler.use()
    assert (first.uuid, cpu.kind) == (gpu.uuid, "cpu")
    assert first.uuid != other.uuid
    assert first.energy_j == 500.0
    assert first.num_samples >= 5
    assert first.duration_s > 0
    assert fake.num_open == 0
    assert "sampler" not in [thread.name for thread in threading.enumerate()]


def test_work_that_fails_ends_the_sampler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu())
    sampler = Sampler(found())
    with pytest.raises(ZeroDivisionError), sampler:
        _ = 1 / 0
    assert [use.kind for use in sampler.use()] == ["gpu", "cpu"]


def test_a_driver_that_hangs_holds_up_neither_the_work_nor_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = use_nvml(monkeypatch, a_gpu())
    gpus = found()
    answer = threading.Event()
    monkeypatch.setattr(fake, "nvmlInit", lambda: answer.wait(20) and None)
    monkeypatch.setattr("pipeline.telemetry.PATIENCE_S", 0.05)
    began = time.monotonic()
    with Sampler(gpus) as sampler:
        pass
    assert time.monotonic() - began < 5
    assert sampler.use() == ()
    answer.set()
    sampler._thread.join(5)


def test_a_sampler_that_fails_leaves_the_work_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: CpuMeter) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(CpuMeter, "read", fail)
    with Sampler([]) as sampler:
        pass
    assert sampler.use() == ()
    assert "could not be sampled" in caplog.text


def test_cpu_time_counts_processes_that_have_ended_and_those_that_run() -> None:
    with CpuMeter() as meter:
        meter.read()
        subprocess.run([sys.executable, "-c", SPIN], check=True)
        running = subprocess.Popen(
            [sys.executable, "-c", f"{SPIN}\nprint(flush=True)\ntime.sleep(60)"],
            stdout=subprocess.PIPE,
        )
        assert running.stdout is not None
        running.stdout.readline()
        meter.read()
    running.kill()
    running.communicate()
    use = meter.use()
    assert use.cpu_s is not None
    assert 0.75 <= use.cpu_s < 5
    assert use.utilisation_mean is not None
    assert 0 < use.utilisation_mean <= 1
    assert use.utilisation_max is not None
    assert use.utilisation_max >= use.utilisation_mean
    assert (use.power_mean_w, use.memory_peak_bytes, use.throttled) == (None, None, {})


def test_a_process_that_is_not_there_has_no_cpu_time() -> None:
    assert tree_cpu_s(2**30) is None


def rapl(root: Path, **energies: int) -> None:
    """The zones of a machine with two packages, one of which has a part, and a whole-board zone."""
    names = {"0": "package-0", "0:0": "core", "1": "package-1", "2": "psys"}
    for zone, name in names.items():
        folder = root / f"intel-rapl:{zone}"
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
        (folder / "energy_uj").write_text(f"{energies.get(name.replace('-', '_'), 5)}\n")


def test_package_energy_is_added_up_across_wraps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.cpu_meter.POWERCAP", tmp_path)
    rapl(tmp_path, package_0=9_000_000, package_1=1_000_000)
    with CpuMeter() as meter:
        meter.read()
        rapl(tmp_path, package_0=1_000_000, package_1=2_000_000, psys=9_999_999)
        meter.read()
        rapl(tmp_path, package_0=500_000, package_1=2_000_000)
        time.sleep(0.01)
        meter.read()
    use = meter.use()
    assert use.energy_j == pytest.approx(2.0 + 9.5 + 1.0)
    assert use.energy_meter == "CPU packages"
    assert use.power_mean_w == pytest.approx(12.5 / use.duration_s)


def test_energy_that_may_not_be_read_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.cpu_meter.POWERCAP", tmp_path)
    rapl(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    with CpuMeter() as meter:
        meter.read()
        meter.read()
    use = meter.use()
    assert (use.energy_j, use.energy_meter, use.power_mean_w) == (None, None, None)


def test_a_machine_without_proc_has_no_cpu_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.cpu_meter.PROC", tmp_path / "proc")
    with CpuMeter() as meter:
        meter.read()
        meter.read()
    use = meter.use()
    assert (use.utilisation_mean, use.utilisation_max, use.cpu_s) == (None, None, None)
