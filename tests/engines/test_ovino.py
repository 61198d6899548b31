"""OpenVINO's compiled graphs: what they answer, on how many threads, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.devices import this_cpu
from engines.errors import EngineCorruptError
from engines.load import make_runner, probe_batch
from engines.ovino import BLOB, OpenVinoRunner
from engines.ovino_compile import compile_graph
from tests.engines.small_stores import INPUT, OUTPUT, linear_graph


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "graph.onnx"
    path.write_bytes(linear_graph())
    return path


@pytest.fixture
def blob(graph: Path) -> Path:
    path = graph.with_suffix(BLOB)
    path.write_bytes(compile_graph(graph))
    return path


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_compiled_graph_answers_as_its_source_on_any_number_of_threads(
    graph: Path, blob: Path, num_threads: int
) -> None:
    batch = probe_batch(INPUT)
    answers = []
    for path in (graph, blob):
        with OpenVinoRunner(path, INPUT, (OUTPUT,), num_threads) as runner:
            answers.append([answer for (answer,) in runner.infer([batch] * 5)])
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_streams_and_precision_are_those_asked_for_when_it_is_opened(
    blob: Path, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that the blob was compiled with: it goes to lanes of any width."""
    import openvino

    opened = []
    import_model = openvino.Core.import_model

    def spy(*arguments: object) -> object:
        opened.append(import_model(*arguments))  # type: ignore[arg-type, call-overload]
        return opened[0]

    monkeypatch.setattr(openvino.Core, "import_model", spy)
    with OpenVinoRunner(blob, INPUT, (OUTPUT,), num_threads):
        (model,) = opened
    assert model.get_property("NUM_STREAMS") == num_threads
    assert model.get_property("INFERENCE_NUM_THREADS") == num_threads
    assert model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert model.get_property("ENABLE_CPU_PINNING") is False


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "[a-z]"),
        (lambda _: b"", "header"),
        (lambda data: data.replace(b"ov=20", b"ov=19"), "version/isa mismatch"),
    ],
    ids=["half", "empty", "other-version"],
)
def test_a_graph_that_openvino_cannot_read_is_corrupt(
    blob: Path, damage: object, reason: str
) -> None:
    blob.write_bytes(damage(blob.read_bytes()))  # type: ignore[operator]
    runner = make_runner("openvino", blob, INPUT, (OUTPUT,), this_cpu(1))
    with pytest.raises(EngineCorruptError, match=rf"(?s)^engine graph\.blob:.*{reason}") as raised:
        runner.__enter__()
    assert "engine build --force" in str(raised.value)
    assert "src/" not in str(raised.value)


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_two_processes_compile_the_same_bytes(graph: Path) -> None:
    code = (
        "import sys, hashlib, pathlib, engines.ovino_compile as o\n"
        "print(hashlib.sha256(o.compile_graph(pathlib.Path(sys.argv[1]))).hexdigest())"
    )
    assert run(code, str(graph)) == run(code, str(graph))


def test_neither_converter_nor_telemetry_is_loaded_and_the_converter_stays_usable(
    blob: Path,
) -> None:
    code = (
        "import sys, pathlib, engines.load as l, tests.engines.small_stores as s\n"
        "from engines.devices import this_cpu\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with l.make_runner('openvino', path, s.INPUT, (s.OUTPUT,), this_cpu(1)) as runner:\n"
        "    assert len(l.probe_answer(runner)) == 4\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print('openvino' in loaded, 'openvino_telemetry' in loaded)\n"
        "print('openvino.tools.ovc' in sys.modules)\n"
        "from openvino.tools.ovc import convert_model\n"
        "print(callable(convert_model))"
    )
    assert run(code, str(blob)).split() == ["True", "False", "False", "True"]


def test_a_signal_is_handled_after_graphs_were_closed_in_the_order_of_their_opening(
    blob: Path,
) -> None:
    """Two of OpenVINO's cores would leave an unmapped signal stack: SIGTERM were a segfault."""
    code = (
        "import os, signal, sys, pathlib, engines.ovino as o, tests.engines.small_stores as s\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "first, second = (o.OpenVinoRunner(path, s.INPUT, (s.OUTPUT,), 1) for _ in range(2))\n"
        "first.__enter__(), second.__enter__()\n"
        "first.__exit__(None, None, None), second.__exit__(None, None, None)\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert run(code, str(blob)) == "handled\n"
