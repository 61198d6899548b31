"""What NVML tells becomes GPUs, slices and readings; what it does not tell is None."""

from __future__ import annotations

import inspect

import pynvml
import pytest

from engines.nvml import THROTTLE_REASONS, GpuReading, GpuSensors, discover
from tests.engines.fake_nvml import (
    GIB,
    NOT_SUPPORTED,
    FakeGpu,
    FakeNvml,
    a_gpu,
    a_slice,
    use_nvml,
)


def test_the_stand_in_has_the_signatures_of_the_installed_pynvml() -> None:
    names = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(names) > 20
    for name in names:
        ours = list(inspect.signature(getattr(FakeNvml, name)).parameters.values())[1:]
        real = list(inspect.signature(getattr(pynvml, name)).parameters.values())
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in real):
            real = list(
                inspect.signature(inspect.unwrap(getattr(pynvml, name))).parameters.values()
            )
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in real], name


def test_the_throttle_bits_are_those_of_nvml() -> None:
    bits = {
        value
        for name, value in vars(pynvml).items()
        if name.startswith("nvmlClocksThrottleReason") and not name.endswith("All")
    }
    assert set(THROTTLE_REASONS) == bits - {
        pynvml.nvmlClocksEventReasonNone,
        pynvml.nvmlClocksEventReasonGpuIdle,
    }


def test_without_a_driver_there_is_no_gpu_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, driver=False)
    found = discover()
    assert found.gpus == ()
    assert found.problem == "no NVIDIA driver: NVML Shared Library Not Found"


def test_a_driver_without_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch)
    assert discover().problem == "the NVIDIA driver sees no usable GPU"


def test_a_driver_that_does_not_fit_its_library_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = use_nvml(monkeypatch, a_gpu())
    mismatch = pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    monkeypatch.setattr(fake, "nvmlDeviceGetCount", lambda: (_ for _ in ()).throw(mismatch))
    assert discover().gpus == ()
    assert "NVML/RM version mismatch" in caplog.text
    assert fake.num_open == 0


def test_a_whole_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use_nvml(monkeypatch, a_gpu(cores=(0, 1, 70)))
    (found,) = discover().gpus
    gpu = found.gpu
    assert (gpu.uuid, gpu.name) == ("GPU-00000000-aaaa", "NVIDIA H200")
    assert (gpu.compute_capability, gpu.num_sms) == ((9, 0), 132)
    assert gpu.memory_bytes == 140 * GIB
    assert gpu.mig_profile is None
    assert (gpu.driver, gpu.cuda) == ("580.159.04", (13, 0))
    assert found.cores == {0, 1, 70}
    assert fake.num_open == 0, "NVML stays open"


def test_cores_of_older_gpus_are_counted_in_their_own_multiprocessors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a100 = a_gpu(values={"CudaComputeCapability": (8, 0), "NumGpuCores": 6912})
    use_nvml(monkeypatch, a100)
    assert discover().gpus[0].gpu.num_sms == 108


def test_two_gpus_are_found_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu(0), a_gpu(1))
    assert [(f.index, f.gpu.uuid) for f in discover().gpus] == [
        (0, "GPU-00000000-aaaa"),
        (1, "GPU-00000001-aaaa"),
    ]


def test_what_a_gpu_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, FakeGpu("GPU-1", values={"CudaComputeCapability": (12, 1)}))
    (found,) = discover().gpus
    assert (found.gpu.num_sms, found.gpu.memory_bytes) == (0, 0)
    assert found.cores == frozenset()


def test_a_lost_gpu_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    use_nvml(monkeypatch, a_gpu(0, values={"CudaComputeCapability": lost}), a_gpu(1))
    assert [found.index for found in discover().gpus] == [1]
    assert "GPU 0: GPU is lost; it is not used." in caplog.text


def test_slices_are_found_across_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
    slices = {1: a_slice(1), 2: forbidden, 5: a_slice(5, "3g.71gb", num_sms=60)}
    use_nvml(monkeypatch, a_gpu(0, slices=slices, cores=(0, 1)), a_gpu(1))
    first, second, whole = discover().gpus
    assert (first.index, first.slice, first.gpu.uuid) == (0, 1, "MIG-00000001-bbbb")
    assert (first.gpu.mig_profile, first.gpu.num_sms) == ("1g.18gb", 16)
    assert first.gpu.memory_bytes == 16 * GIB
    assert (first.gpu.name, first.physical_uuid) == ("NVIDIA H200", "GPU-00000000-aaaa")
    assert first.cores == {0, 1}
    assert (second.slice, second.gpu.mig_profile, second.gpu.num_sms) == (5, "3g.71gb", 60)
    assert (whole.slice, whole.gpu.mig_profile) == (None, None)


def test_a_slice_whose_name_has_no_profile_is_called_by_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nameless = a_slice(1)
    nameless.name = "Graphics Device"
    use_nvml(monkeypatch, a_gpu(slices={0: nameless}))
    assert discover().gpus[0].gpu.mig_profile == "1g"


def test_a_gpu_with_mig_and_no_slice_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_nvml(monkeypatch, a_gpu(slices={}))
    assert discover().gpus == ()
    assert "MIG is on and it has no slice" in caplog.text


def test_a_gpu_is_read_in_units_of_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    fake = use_nvml(monkeypatch, a_gpu(values={"CurrentClocksEventReasons": reasons}))
    with GpuSensors("GPU-00000000-aaaa") as sensors:
        assert sensors.physical_uuid == "GPU-00000000-aaaa"
        assert sensors.read() == GpuReading(
            utilisation=0.5,
            memory_used_bytes=GIB,
            power_w=400.0,
            energy_j=1000.0,
            sm_clock_mhz=1980,
            memory_clock_mhz=3201,
            temperature_c=55,
            throttle_reasons=("sw_power_cap",),
            jpeg_utilisation=0.2,
        )
    assert fake.num_open == 0


def test_what_a_reading_lacks_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"PowerUsage": NOT_SUPPORTED, "UtilizationRates": NOT_SUPPORTED}
    use_nvml(monkeypatch, a_gpu(values=lacking))
    with GpuSensors("GPU-00000000-aaaa") as sensors:
        reading = sensors.read()
    assert (reading.power_w, reading.utilisation) == (None, None)
    assert reading.energy_j == 1000.0


def test_a_slice_is_read_with_the_power_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu(slices={3: a_slice(3)}))
    with GpuSensors("MIG-00000003-bbbb") as sensors:
        reading = sensors.read()
        assert sensors.physical_uuid == "GPU-00000000-aaaa"
    assert reading.utilisation is None
    assert reading.memory_used_bytes == 2 * GIB
    assert (reading.power_w, reading.sm_clock_mhz) == (400.0, 1980)


@pytest.mark.parametrize("driver", [True, False])
def test_a_gpu_that_is_gone_reads_as_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, driver: bool
) -> None:
    fake = use_nvml(monkeypatch, driver=driver)
    with GpuSensors("GPU-other") as sensors:
        assert sensors.read() == GpuReading()
        assert sensors.physical_uuid is None
    assert fake.num_open == 0
    assert "GPU-other" in caplog.text
