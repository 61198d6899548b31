"""Candidates: the model's graph in each precision, wrapped for the runtimes that run it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.calibrate import Feeds, Method, ScaleTable, calibrate, feeds_of
from engines.devices import Device, WeightBits
from engines.export import fixed_batch, load_core, name_nodes
from engines.gate import Answers, answered, say_unanswered
from engines.lone_rows import run_apart
from engines.model import ImageInput, ModelSpec, input_spec
from engines.probing import open_session
from engines.runner import LOGITS, Array, TensorSpec
from engines.tensorrt_build import BuilderSettings

if TYPE_CHECKING:
    import onnx

    from engines.onnxrt import OnnxrtRunner
    from engines.quantize import Placement
    from engines.round_weights import Rounding
    from engines.torch_program import TorchPrecision

log = logging.getLogger(__name__)

SCALES = "scales.json"
"""Attachment of int8 engines: the scale table."""
TIMING_CACHE = "timing.cache"
"""Attachment of TensorRT engines; the next build on such a device begins with it."""
GRAPH = "graph.onnx"
"""Attachment of TensorRT and OpenVINO engines: what the artifact was compiled from."""

CPU_BATCH_IMAGES = 8
"""Activations of a small batch stay in the cache, and decoding between two batches empties it: on
two cores with AVX512-VNNI, EfficientNet-Lite0 int8 on OpenVINO, a picture took 6.5 ms of a core
from JPEG to scores in batches of 4, 6.1 of 8, 6.0 of 16; the engine alone 4.2 ms of 4, 4.1 of 8. On
another such machine the engine alone scored 1,122 pictures/s in batches of 8 and 896 of 128."""
CPU_BATCH_FEATURES = 4096
"""A call costs as much as scoring hundreds of rows. With an MLP 32-256-128-1 and 10 million rows,
two cores scored 1.82 million rows/s from start to publication in batches of 2,048, 2.12 of 4,096,
2.14 of 8,192 and 2.02 of 16,384, where rows leave the cache before the engine reads them."""
GPU_BATCH_IMAGES = 256
"""Large enough to fill a GPU; MLPerf's Offline entries take 32 (L4) to 2,048 (H100)."""
GPU_BATCH_FEATURES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A graph and the runtime that would run it."""

    runtime: str
    precision: str
    graph: Path
    """What the runtime loads: an ONNX file, a TensorRT plan, OpenVINO's blob or a torch program."""
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    """Of the head, and `logits` for classes, which only the gate asks for."""
    float_layers: tuple[str, ...] = ()
    """Layers that stay in float, of `mixed`."""

    @property
    def name(self) -> str:
        """Such as `openvino int8`."""
        return f"{self.runtime} {self.precision}"

    @property
    def scoring_outputs(self) -> tuple[TensorSpec, ...]:
        """What a night needs of the outputs: logits are for the gate only."""
        return tuple(spec for spec in self.outputs if spec.name != LOGITS)


def batch_size_for(
    spec: ModelSpec, device: Device, wanted: int | None, core: onnx.ModelProto
) -> int:
    """Rows per call: what the graph is bound to, or the wish, or what suits the device."""
    is_image = isinstance(spec.input, ImageInput)
    if device.kind == "gpu":
        default = GPU_BATCH_IMAGES if is_image else GPU_BATCH_FEATURES
    else:
        default = CPU_BATCH_IMAGES if is_image else CPU_BATCH_FEATURES
    return fixed_batch(core) or wanted or default


@dataclass(frozen=True, kw_only=True, slots=True)
class _GraphKey:
    """What decides a graph of one model."""

    precision: str
    placement: Placement
    float_layers: tuple[str, ...]
    weight_bits: WeightBits


class CandidateFactory:
    """Makes candidates of one model; what they share is made once, and only when it is needed.

    Args:
        spec: The model.
        calibration: Real rows in the engine's input dtype.
        method: How the int8 scales are taken from them.
        folder: Gets what runtimes load.
        say: Is told what takes long.
        timing_cache: Of an earlier TensorRT build on this kind of device.
        settings: What is asked of TensorRT.
        weight_bits: Of int8 weights for a CPU; TensorRT's always have 8.
    """

    def __init__(  # noqa: PLR0913  # the last three count on some devices only
        self,
        spec: ModelSpec,
        calibration: Array,
        method: Method,
        folder: Path,
        say: Callable[[str], None],
        timing_cache: bytes | None = None,
        settings: BuilderSettings = BuilderSettings(),  # noqa: B008  # a frozen value
        weight_bits: WeightBits = 8,
    ) -> None:
        self.spec = spec
        self._rows = calibration
        self._method = method
        self._folder = folder
        self.say = say
        self._timing_cache = timing_cache
        self._by_products: dict[str, dict[str, bytes]] = {}
        self._graphs: dict[_GraphKey, onnx.ModelProto] = {}
        self._roundings: dict[WeightBits, Rounding] = {}
        self._settings = settings
        self._weight_bits = weight_bits

    @cached_property
    def core(self) -> onnx.ModelProto:
        """The model's float graph, without preprocessing and head."""
        self.say(f"exporting {self.spec.source}")
        core = load_core(self.spec)
        name_nodes(core)
        return core

    @cached_property
    def calibration(self) -> Array:
        """The calibration rows that fp32 has an answer to: one without would leave no range.

        Raises:
            AccuracyError: There is no such row.
        """
        session, score = open_session(self.core), self.core.graph.output[0].name

        def run(rows: Array) -> Answers:
            feeds = feeds_of(self.core, self.spec, rows)
            answers = np.concatenate([session.run([score], feed)[0] for feed in feeds()])
            if self.spec.head == "classes":  # others than the best may be masked: -inf
                answers = answers.max(axis=1, keepdims=True)
            return {"best": answers[: len(rows)]}

        answers, ran = run_apart(run, self._rows)
        known = answered(answers)
        say_unanswered(known, "calibration")
        return self._rows[ran][known]

    @cached_property
    def feeds(self) -> Feeds:
        """Those rows as `core` takes them."""
        return feeds_of(self.core, self.spec, self.calibration)

    def _rounding(self, weight_bits: WeightBits) -> Rounding:
        """Of all layers' weights."""
        from engines.round_weights import round_layers

        if weight_bits not in self._roundings:
            self.say(f"rounding weights to {weight_bits} bits")
            self._roundings[weight_bits] = round_layers(self.core, self.feeds, weight_bits)
        return self._roundings[weight_bits]

    @cached_property
    def scales(self) -> ScaleTable:
        """Ranges of all tensors: the source of every int8 graph's scales."""
        self.say(f"calibrating int8 ({self._method}) with {len(self.calibration):,} rows")
        return calibrate(self.core, self.feeds, self._method)

    def make(
        self, runtime: str, precision: str, batch_size: int, float_layers: Sequence[str] = ()
    ) -> Candidate:
        """What a runtime loads for a precision and a batch size.

        Args:
            runtime: `openvino`, `onnxruntime`, `tensorrt` or `torch`.
            precision: `fp32`, `fp16`, `int8`, or `mixed`: int8 but for `float_layers`.
            batch_size: Rows of every batch.
            float_layers: Names of layers that stay in float.

        Raises:
            ModelError: The model cannot be exported, or does not fit its description.
            Exception: Whatever a quantiser, exporter or builder raises.
        """
        folder = self._folder / runtime
        folder.mkdir(exist_ok=True)
        if runtime == "torch":
            return self._torch(precision, batch_size, folder / f"{precision}-{batch_size}.pt2")
        # The symmetric graph for `mixed` on a CPU too: the other rounds what a layer gives to the
        # next one, so that a tensor that cannot be rounded would cost all its neighbours.
        is_symmetric = runtime == "tensorrt" or precision == "mixed"
        wanted = self._key(precision, "tensorrt" if is_symmetric else "cpu", float_layers)
        if runtime == "tensorrt":
            wanted = replace(wanted, weight_bits=8)
        graph = self._graph(wanted)
        wrapped = _wrapped(graph, self.spec, runtime, precision, batch_size, folder)
        candidate = replace(wrapped, float_layers=tuple(float_layers))
        if runtime == "tensorrt":
            return self._planned(candidate)
        return self._compiled(candidate) if runtime == "openvino" else candidate

    def simulation(
        self, device: Device, batch_size: int, float_layers: Sequence[str]
    ) -> OnnxrtRunner:
        """Runs the mixed graph on the CPU of a device, node by node as it is written."""
        from engines.onnxrt import OnnxrtRunner

        folder = self._folder / "simulated"
        folder.mkdir(exist_ok=True)
        graph = self._make_graph(self._key("mixed", "tensorrt", float_layers))
        found = _wrapped(graph, self.spec, "onnxruntime", "mixed", batch_size, folder)
        return OnnxrtRunner(
            found.graph, found.input, found.outputs, device.num_threads, is_literal=True
        )

    def graph(
        self, precision: str, placement: Placement, float_layers: Sequence[str] = ()
    ) -> onnx.ModelProto:
        """The model in a precision, without preprocessing and head; each is made once."""
        return self._graph(self._key(precision, placement, float_layers))

    def ranked_layers(self, num_rows: int) -> list[str]:
        """Layers by what int8 of each costs so many calibration rows, worst first."""
        from engines.sensitivity import rank_layers

        bits = self._weight_bits
        feeds = feeds_of(self.core, self.spec, self.calibration[:num_rows])
        ranked = rank_layers(self.core, self._rounding(bits), self.scales, feeds, bits)
        return [name for name, _ in ranked]

    def _key(self, precision: str, placement: Placement, float_layers: Sequence[str]) -> _GraphKey:
        return _GraphKey(
            precision=precision,
            placement=placement,
            float_layers=tuple(float_layers),
            weight_bits=self._weight_bits,
        )

    def _graph(self, wanted: _GraphKey) -> onnx.ModelProto:
        if wanted not in self._graphs:
            self._graphs[wanted] = self._make_graph(wanted)
        return self._graphs[wanted]

    def _make_graph(self, wanted: _GraphKey) -> onnx.ModelProto:
        if wanted.precision == "fp32":
            return self.core
        if wanted.precision == "fp16":
            from engines.half import to_half

            return to_half(self.core)
        from engines.quantize import quantize

        scales = self.scales  # first: it says which tensor is not finite
        return quantize(
            self.core,
            self._rounding(wanted.weight_bits),
            scales,
            wanted.placement,
            wanted.float_layers,
            wanted.weight_bits,
        )

    def attachments_of(self, candidate: Candidate) -> dict[str, bytes]:
        """Files to keep beside an engine: the scales that it was made from, what a build left."""
        files = dict(self._by_products.get(candidate.name, {}))
        if candidate.precision in ("int8", "mixed"):
            files[SCALES] = self.scales.to_json()
        return files

    def _torch(self, precision: str, batch_size: int, path: Path) -> Candidate:
        from engines.torch_program import save_program

        kind: TorchPrecision = "fp16" if precision == "fp16" else "fp32"
        return Candidate(
            runtime="torch",
            precision=precision,
            graph=path,
            input=input_spec(self.spec, batch_size),
            outputs=save_program(self.spec, batch_size, path, kind),
        )

    def _compiled(self, candidate: Candidate) -> Candidate:
        """Compile the graph of a candidate with OpenVINO, once for all nights: a second."""
        from engines.ovino import BLOB
        from engines.ovino_compile import compile_graph

        self._by_products[candidate.name] = {GRAPH: candidate.graph.read_bytes()}
        blob = candidate.graph.with_suffix(BLOB)
        blob.write_bytes(compile_graph(candidate.graph))
        return replace(candidate, graph=blob)

    def _planned(self, candidate: Candidate) -> Candidate:
        """Compile the graph of a candidate with TensorRT: minutes."""
        from engines.tensorrt_build import build_plan

        self.say(f"building {candidate.name} in batches of {candidate.input.shape[0]}")
        settings = self._settings
        if candidate.precision == "fp32":  # TF32 has no more digits than fp16
            settings = replace(settings, tf32=False)
        built = build_plan(
            candidate.graph.read_bytes(),
            settings,
            timing_cache=self._timing_cache,
            say=self.say,
        )
        self._timing_cache = built.timing_cache or self._timing_cache
        for warning in built.warnings:
            log.warning("%s: %s", candidate.name, warning)
        files = {TIMING_CACHE: built.timing_cache, GRAPH: candidate.graph.read_bytes()}
        if built.inspector is not None:
            files["layers.json"] = built.inspector.encode()
        self._by_products[candidate.name] = files
        plan = candidate.graph.with_suffix(".plan")
        plan.write_bytes(built.plan)
        return replace(candidate, graph=plan)


def _wrapped(
    core: onnx.ModelProto,
    spec: ModelSpec,
    runtime: str,
    precision: str,
    batch_size: int,
    folder: Path,
) -> Candidate:
    from engines.graph import output_specs, wrap

    wrapped = wrap(core, spec, batch_size)
    path = folder / f"{precision}-{batch_size}.onnx"
    path.write_bytes(wrapped.SerializeToString())
    return Candidate(
        runtime=runtime,
        precision=precision,
        graph=path,
        input=input_spec(spec, batch_size),
        outputs=output_specs(wrapped, spec),
    )
