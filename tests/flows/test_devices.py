"""Which lanes a job gets on which machine."""

from __future__ import annotations

import importlib.metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from engines.devices import Gpu
from engines.gpu_runtimes import torch_cuda, torch_problem
from engines.nvml import discover
from flows.devices import lane_devices, no_torch_because, share_cores, usable_gpus
from flows.doctor import doctor_facts, render_doctor
from pipeline.config import Job
from pipeline.errors import ConfigError
from tests.engines.fake_nvml import a_gpu, a_slice, use_nvml

CORES = frozenset(range(8))


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(CORES))


@pytest.fixture(autouse=True)
def no_siblings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flows.devices.CPUS", tmp_path / "cpu")


def a_job(device: str, threads: int | None = None, source: str = "m.onnx") -> Job:
    return Job.model_validate(
        {
            "name": "j",
            "input": {"uri": "in", "passthrough": ["id"], "images": {"column": "image"}},
            "model": {"source": source},
            "output": {"uri": "out"},
            "cost": {"instance": "c6i.large"},
            "lanes": {"device": device, "threads": threads},
        }
    )


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that distributions have these versions, or are missing."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"), "real")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name) if found == "real" else found

    monkeypatch.setattr("importlib.metadata.version", version)


def torch_built_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None) -> None:
    """Pretend that torch was built for a CUDA; its file has the form of torch 2.13's."""
    line = f"cuda: Optional[str] = {cuda!r}"
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\n{line}\n")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.4.0.106", cuda_bindings="13.5.0")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_there_is_one_lane_over_all_cores(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    use_nvml(monkeypatch, driver=False)
    (lane,) = lane_devices(a_job(device))
    assert (lane.name, lane.num_threads, lane.gpu, lane.cores) == ("cpu", 8, None, frozenset())
    assert caplog.text == ""


def test_a_cpu_job_leaves_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use_nvml(monkeypatch, a_gpu())
    monkeypatch.setattr(fake, "nvmlInit", lambda: pytest.fail("NVML was asked"))
    (lane,) = lane_devices(a_job("cpu", threads=3))
    assert (lane.gpu, lane.num_threads) == (None, 3)


def test_several_lanes_of_a_cpu_share_its_cores_and_one_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_nvml(monkeypatch, driver=False)
    job = a_job("cpu")
    lanes = job.lanes.model_copy(update={"count": 3})
    found = lane_devices(job.model_copy(update={"lanes": lanes}))
    assert [(lane.name, lane.num_threads, sorted(lane.cores)) for lane in found] == [
        ("cpu0", 2, [0, 1]),
        ("cpu1", 3, [2, 3, 4]),
        ("cpu2", 3, [5, 6, 7]),
    ]
    assert {lane.engine_device for lane in found} == {lane_devices(job)[0].engine_device}


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_each_gpu_gets_a_lane_and_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    use_nvml(monkeypatch, a_gpu(0), a_gpu(1))
    lanes = lane_devices(a_job(device))
    assert [(lane.name, lane.num_threads, sorted(lane.cores)) for lane in lanes] == [
        ("gpu0", 4, [0, 1, 2, 3]),
        ("gpu1", 4, [4, 5, 6, 7]),
    ]
    assert [lane.engine_device.num_threads for lane in lanes] == [4, 4]
    assert lanes[1].gpu is not None
    assert lanes[1].gpu.uuid == "GPU-00000001-aaaa"


@pytest.mark.usefixtures("tensorrt")
def test_the_jobs_threads_go_before_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu(0), a_gpu(1))
    assert [lane.num_threads for lane in lane_devices(a_job("gpu", threads=2))] == [2, 2]


@pytest.mark.usefixtures("tensorrt")
def test_each_slice_gets_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu(slices={0: a_slice(0), 4: a_slice(4)}))
    lanes = lane_devices(a_job("auto"))
    assert [lane.name for lane in lanes] == ["gpu0-slice0", "gpu0-slice4"]
    assert [lane.gpu.uuid for lane in lanes if lane.gpu] == [
        "MIG-00000000-bbbb",
        "MIG-00000004-bbbb",
    ]


@pytest.mark.usefixtures("tensorrt")
def test_a_run_uses_gpus_of_one_kind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slices = {0: a_slice(0, "3g.71gb", num_sms=60), 1: a_slice(1)}
    use_nvml(monkeypatch, a_gpu(0, slices=slices), a_gpu(1))
    assert [lane.name for lane in lane_devices(a_job("auto"))] == ["gpu1"]
    assert "GPUs of 3 kinds: a run uses one kind, here 1 x NVIDIA H200" in caplog.text


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        (" 1 , 1 ", [1]),
        ("GPU-00000001", [1]),
        ("0,9,1", [0]),
        ("GPU-00000001-aaaa,-1", [1]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_respected(
    monkeypatch: pytest.MonkeyPatch, setting: str, expected: list[int]
) -> None:
    use_nvml(monkeypatch, a_gpu(0), a_gpu(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    gpus, problem = usable_gpus()
    assert [found.index for found in gpus] == expected
    assert (problem is None) == bool(expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("0", [0, 4]), ("MIG-00000004-bbbb", [4]), ("GPU-00000000-aaaa", [0, 4])],
)
def test_slices_are_named_by_themselves_or_by_their_gpu(
    monkeypatch: pytest.MonkeyPatch, setting: str, expected: list[int]
) -> None:
    use_nvml(monkeypatch, a_gpu(slices={0: a_slice(0), 4: a_slice(4)}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert [found.slice for found in usable_gpus()[0]] == expected


def refusal(device: str = "gpu") -> str:
    with pytest.raises(ConfigError) as refused:
        lane_devices(a_job(device))
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.mark.usefixtures("tensorrt")
def test_a_gpu_job_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, driver=False)
    assert refusal() == (
        "lanes.device: gpu, but no GPU can be used (no NVIDIA driver: NVML Shared Library Not "
        "Found); expected a GPU with TensorRT. On a machine with a GPU: set `lanes.device: auto` "
        "to use what is there."
    )


def test_a_gpu_job_without_gpu_and_tensorrt_is_told_both(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, driver=False)
    install(monkeypatch, tensorrt=None)
    text = refusal()
    assert "no GPU can be used" in text
    assert "and TensorRT is not installed" in text
    assert "pip install 'nightscore[gpu]'" in text
    assert text.count("expected") == 1


@pytest.mark.usefixtures("tensorrt")
def test_a_gpu_job_whose_gpus_are_hidden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is '' and hides all 1" in refusal()


@pytest.mark.parametrize(
    ("versions", "changes", "expected"),
    [
        ({"tensorrt": None}, {}, "TensorRT is not installed"),
        ({"cuda_bindings": None}, {}, "TensorRT is installed without cuda-bindings"),
        ({}, {"cuda_version": 12_040}, "driver 580.159.04 knows CUDA 12.4 at most"),
    ],
)
def test_a_gpu_job_without_usable_tensorrt_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str | None],
    changes: dict[str, int],
    expected: str,
) -> None:
    fake = use_nvml(monkeypatch, a_gpu())
    vars(fake).update(changes)
    install(monkeypatch, **{"tensorrt": "11.4.0", "cuda_bindings": "13.5.0", **versions})
    text = refusal()
    assert expected in text
    assert ("pip install" in text) == bool(versions)


@pytest.mark.usefixtures("tensorrt")
def test_a_gpu_that_is_too_old_for_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(monkeypatch, a_gpu(values={"CudaComputeCapability": (7, 0)}))
    assert "needs compute capability 7.5 or later and NVIDIA H200 has 7.0" in refusal()


def test_auto_without_tensorrt_falls_back_to_torch_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use_nvml(monkeypatch, a_gpu())
    install(monkeypatch, tensorrt=None, cuda_bindings="13.5.0")
    torch_built_for(monkeypatch, tmp_path, "13.0")
    job = a_job("auto", source="my_package:model")
    assert [lane.name for lane in lane_devices(job)] == ["gpu0"]
    assert "TensorRT is not installed; torch in fp16 is used." in caplog.text


def test_auto_without_tensorrt_and_cuda_torch_uses_the_cpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use_nvml(monkeypatch, a_gpu())
    install(monkeypatch, tensorrt=None)
    torch_built_for(monkeypatch, tmp_path, None)
    job = a_job("auto", source="my_package:model")
    assert [lane.name for lane in lane_devices(job)] == ["cpu"]
    assert (
        "NVIDIA H200: TensorRT is not installed, and the installed torch has no CUDA; "
        "the CPU is used." in caplog.text
    )


def test_auto_without_tensorrt_scores_an_onnx_model_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use_nvml(monkeypatch, a_gpu())
    install(monkeypatch, tensorrt=None, cuda_bindings="13.5.0")
    torch_built_for(monkeypatch, tmp_path, "13.0")
    assert [lane.name for lane in lane_devices(a_job("auto"))] == ["cpu"]
    because = "TensorRT is not installed, and torch runs no ONNX model"
    assert f"NVIDIA H200: {because}; the CPU is used. pip install" in caplog.text
    assert no_torch_because(a_job("auto"), a_gpu_of_this_machine()) == "torch runs no ONNX model"
    assert no_torch_because(None, a_gpu_of_this_machine()) is None


def a_gpu_of_this_machine() -> Gpu:
    (found,) = discover().gpus
    return found.gpu


def test_torch_on_a_gpu_needs_the_bindings_of_a_cuda_that_the_driver_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_nvml(monkeypatch, a_gpu())
    (found,) = discover().gpus
    torch_built_for(monkeypatch, tmp_path, "12.8")
    for version, problem in (
        ("13.5.0", None),
        (None, "torch is installed without cuda-bindings"),
        ("14.0.1", "cuda-bindings is for CUDA 14 and driver 580.159.04 knows CUDA 13.0 at most"),
    ):
        install(monkeypatch, cuda_bindings=version)
        assert torch_problem(found.gpu) == problem


def test_torchs_cuda_is_read_from_the_installed_torch() -> None:
    import torch

    assert torch_cuda() == torch.version.cuda


def test_a_missing_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert torch_cuda() is None


@pytest.mark.parametrize(
    ("near", "expected"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1], [2, 3]]),
        ([[], []], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([[100, 101]], [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([[6, 7, 8, 9]], [[6, 7]]),
        ([[5], [5]], [[5], [5]]),
    ],
)
def test_cores_are_shared_among_the_gpus_near_to_them(
    near: list[list[int]], expected: list[list[int]]
) -> None:
    assert [sorted(share) for share in share_cores(near, CORES)] == expected


def test_threads_of_one_core_stay_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flows.devices.CPUS", tmp_path)
    for core in CORES:
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    assert [sorted(share) for share in share_cores([[], []], CORES)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def doctor_text(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    from rich.console import Console

    facts = doctor_facts()
    Console(width=300, color_system=None).print(render_doctor(facts))
    return facts, capsys.readouterr().out


@pytest.mark.usefixtures("tensorrt")
def test_the_doctor_describes_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_nvml(monkeypatch, a_gpu(0, cores=(0, 1)), a_gpu(1, slices={0: a_slice(0)}))
    facts, text = doctor_text(capsys)
    assert [gpu["mig_profile"] for gpu in facts["gpus"]] == [None, "1g.18gb"]
    assert (
        "0: NVIDIA H200, 140.0 GiB, 132 SMs, compute capability 9.0, driver 580.159.04 "
        "(CUDA 13.0), 2 cores near it" in text
    )
    assert "1: NVIDIA H200, MIG slice 1g.18gb, 16.0 GiB, 16 SMs" in text
    assert facts["no_tensorrt_because"] is None


def test_the_doctor_says_why_gpus_and_tensorrt_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_nvml(monkeypatch, driver=False)
    facts, text = doctor_text(capsys)
    assert "none, CPU engines are used: no NVIDIA driver" in text
    assert facts["gpus"] == []

    use_nvml(monkeypatch, a_gpu())
    install(monkeypatch, tensorrt=None)
    torch_built_for(monkeypatch, tmp_path, None)
    facts, text = doctor_text(capsys)
    assert facts["no_tensorrt_because"] == "TensorRT is not installed"
    assert "none: TensorRT is not installed, and the installed torch has no CUDA" in text


def test_the_doctor_lists_numa_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_nvml(monkeypatch, driver=False)
    monkeypatch.setattr("flows.doctor.NUMA_NODES", tmp_path)
    for node, cores in enumerate(("0-3", "4-7")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{cores}\n")
    _, text = doctor_text(capsys)
    assert "node0: cores 0-3, node1: cores 4-7" in text
