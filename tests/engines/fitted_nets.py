"""Small nets that tell labelled rows apart as a trained net does, with rows to judge them by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from engines.calibrate import Method, normalised
from engines.candidates import CandidateFactory
from engines.devices import this_cpu
from engines.gate import Accuracy, Answers, compare, run_rows
from engines.graph import output_specs, wrap
from engines.ladder import HeldOut
from engines.model import ModelSpec, input_spec
from engines.onnxrt import OnnxrtRunner
from tests.engines.residual_graphs import resnet
from tests.engines.small_graphs import conv_net, features, fit_last_layer, mlp, save
from tests.engines.small_models import IMAGES, feature_sample, labelled_pictures

BATCH = 8
NETS = ("conv", "resnet", "mlp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Net:
    """A net, what is made of it, and rows that it was not calibrated with."""

    spec: ModelSpec
    factory: CandidateFactory
    held_out: HeldOut
    folder: Path

    def answers(self, core: onnx.ModelProto, *, is_literal: bool = True) -> Answers:
        """What ONNX Runtime makes of the held-out rows with a graph of this net."""
        wrapped = wrap(core, self.spec, BATCH)
        path = save(wrapped, self.folder / "answering.onnx")
        source, outputs = input_spec(self.spec, BATCH), output_specs(wrapped, self.spec)
        with OnnxrtRunner(path, source, outputs, 2, is_literal=is_literal) as runner:
            return run_rows(runner, self.held_out.rows)

    def judge(self, found: Answers, reference: Answers | None = None) -> Accuracy:
        """Against another graph's answers; by default those of fp32."""
        expected = reference or self.answers(self.factory.core)
        return compare(self.spec.head, expected, found, self.held_out.labels)


def make_net(kind: str, folder: Path, method: Method = "max") -> Net:
    """`conv`, `resnet` (pictures, five classes) or `mlp` (features, one score)."""
    folder = folder / kind
    folder.mkdir()
    path = folder / "m.onnx"
    if kind == "mlp":
        spec = features(save(mlp(), path))
        calibration, held_out = feature_sample(128, seed=1), feature_sample(200, seed=2)
    else:
        spec = ModelSpec(source=str(path), input=IMAGES, head="classes")
        calibration, held_out = labelled_pictures(128, seed=1), labelled_pictures(200, seed=2)
        net = resnet() if kind == "resnet" else conv_net()
        assert calibration.labels is not None
        save(fit_last_layer(net, normalised(spec, calibration.rows), calibration.labels), path)
    bits = this_cpu(1).weight_bits  # or this machine's int8 kernels answer apart from the graph
    factory = CandidateFactory(
        spec, calibration.rows, method, folder, lambda _: None, weight_bits=bits
    )
    return Net(
        spec=spec,
        factory=factory,
        held_out=HeldOut(rows=held_out.rows, labels=held_out.labels),
        folder=folder,
    )


def kinds_of(model: onnx.ModelProto) -> list[str]:
    """Operators in the graph's order."""
    return [node.op_type for node in model.graph.node]


def num_classes_seen(answers: Answers) -> int:
    """A net with one answer to all would prove nothing."""
    return len(np.unique(answers["class_id"][:, 0]))
