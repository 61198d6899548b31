"""Weights of 7 bits: where kernels add products of int8 in 16 bits, sums of 8 are cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.candidates import CandidateFactory, _GraphKey
from engines.devices import Cpu, WeightBits, this_cpu
from engines.gate import GateSpec, run_rows
from engines.load import make_runner
from engines.round_weights import LARGEST_WEIGHT
from tests.engines.fitted_nets import Net, make_net
from tests.engines.small_devices import H200
from tests.engines.small_graphs import constants_of

XEON = Cpu(name="Xeon", architecture="Linux-x86_64", instructions=("avx2",), num_threads=2)
BITS: list[WeightBits] = [7, 8]
GATE = GateSpec(min_agreement=0.99)
WITHOUT_VNNI = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
"""For OpenVINO alone, and only before it is used: so it is set for a process of its own."""


def factory_of(net: Net, weight_bits: WeightBits) -> CandidateFactory:
    return CandidateFactory(
        net.spec,
        net.factory.calibration,
        "max",
        net.folder,
        lambda _: None,
        weight_bits=weight_bits,
    )


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return make_net("mlp", tmp_path_factory.mktemp("net"))


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ((), 7),
        (("avx2",), 7),
        (("avx2", "avx512f"), 7),
        (("avx2", "avx512f", "avx512_vnni"), 8),
        (("avx2", "avx_vnni"), 8),
        (("avx2", "avx512f", "amx_int8"), 8),
    ],
)
def test_x86_without_vnni_takes_weights_of_7_bits(
    instructions: tuple[str, ...], expected: int
) -> None:
    assert replace(XEON, instructions=instructions).weight_bits == expected


def test_arm_and_gpus_take_weights_of_8_bits() -> None:
    arm = replace(XEON, architecture="Linux-aarch64", instructions=("asimddp",))
    assert arm.weight_bits == H200.weight_bits == 8


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core", "SSE41"])
def test_a_limit_that_hides_vnni_counts_as_none(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    cpu = replace(this_cpu(1), architecture="Linux-x86_64")
    assert cpu.weight_bits == 7
    assert not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(cpu.instructions)


@pytest.mark.parametrize("bits", BITS)
def test_no_weight_is_larger_than_its_bits_allow(net: Net, bits: WeightBits) -> None:
    weights = [
        array
        for array in constants_of(factory_of(net, bits).graph("int8", "cpu")).values()
        if array.dtype == np.int8 and array.ndim == 2
    ]
    assert weights
    assert {int(np.abs(each.astype(int)).max()) for each in weights} == {LARGEST_WEIGHT[bits]}


def test_tensorrts_graph_has_weights_of_8_bits_whatever_the_cpu(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[WeightBits] = []
    factory = factory_of(net, 7)

    def noted(wanted: _GraphKey) -> None:
        asked.append(wanted.weight_bits)
        raise RuntimeError("enough")

    monkeypatch.setattr(factory, "_make_graph", noted)
    for runtime in ("tensorrt", "openvino"):
        with pytest.raises(RuntimeError, match="enough"):
            factory.make(runtime, "int8", 16)
    assert asked == [8, 7]


def main(folder: str, bits: str) -> None:
    """Whether OpenVINO answers as the graph says, node by node."""
    net = make_net("mlp", Path(folder))
    factory = factory_of(net, 7 if bits == "7" else 8)
    found = factory.make("openvino", "int8", 16)
    with make_runner("openvino", found.graph, found.input, found.outputs, this_cpu(2)) as runner:
        answers = run_rows(runner, net.held_out.rows)
    literal = net.answers(factory.graph("int8", "cpu"), is_literal=True)
    sys.stdout.write("alike" if not net.judge(answers, literal).failures(GATE) else "apart")


@pytest.mark.skipif(this_cpu(1).architecture != "Linux-x86_64", reason="it is about x86")
@pytest.mark.parametrize(("bits", "expected"), [(7, "alike"), (8, "apart")])
def test_without_vnni_weights_of_7_bits_give_the_graphs_answers_and_those_of_8_do_not(
    bits: int, expected: str, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.engines.test_weight_bits", str(tmp_path), str(bits)],
        env=os.environ | WITHOUT_VNNI,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ended.stdout == expected


if __name__ == "__main__":
    main(*sys.argv[1:])
