"""The engine for a job: found by what is asked for, or built from real rows, judged and stored."""

from __future__ import annotations

import datetime
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.devices import Device
from engines.errors import EngineError, ModelError
from engines.gate import GateSpec
from engines.keys import BUILDER_REVISION, KEYED_PACKAGES, digest, digest_bytes
from engines.keys import runtime_version as version_of
from engines.manifest import REFERENCE, EngineManifest, StoredEngine
from engines.model import ModelSpec, fingerprint_model
from engines.runner import LOGITS, Array
from engines.store import EngineStore
from engines.tensorrt_build import BuilderSettings

if TYPE_CHECKING:  # most nights build nothing
    from engines.calibrate import Method
    from engines.candidates import Candidate
    from engines.ladder import Choice, HeldOut

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Real rows of the job's input, in random order."""

    rows: Array
    """In the engine's input dtype."""
    labels: Array | None = None
    """float64 [rows], NaN where a row has none; None: the job names no label column."""


RowSource = Callable[[int, int], Sample]
"""rows(num_rows, seed) -> at most so many rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSpec:
    """Which rows the int8 scales are taken from, and how."""

    num_rows: int = 256
    seed: int = 0
    method: Method = "max"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """What a job asks for on a device."""

    model: ModelSpec
    calibration: CalibrationSpec
    gate: GateSpec
    device: Device
    batch_size: int | None = None
    """None: what suits the device."""
    builder: BuilderSettings = field(default_factory=BuilderSettings)
    """Of TensorRT; counts on a GPU only."""
    columns: tuple[str, ...] = ()
    """Names of the features, in their order: told in the manifest, and in no key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedEngine:
    """The engine for a request, and what it took to get it."""

    engine: StoredEngine
    built: bool
    build_s: float


def request_key(request: EngineRequest, model_fingerprint: str) -> str:
    """Names the question: model, gate, calibration settings, runtimes and device.

    Not the calibration rows: an engine serves from night to night. It has a key of its own.
    """
    return digest({**_asked(request, model_fingerprint), **_validity(request)})


def common_key(request: EngineRequest, model_fingerprint: str) -> str:
    """Names what engines for unlike devices have in common that answer the same question.

    That is what the job asks for: neither the device nor the runtimes' versions.
    """
    return digest({**_asked(request, model_fingerprint), "settings": request.builder})


def _asked(request: EngineRequest, model_fingerprint: str) -> dict[str, object]:
    return {
        "model": model_fingerprint,
        "calibration": request.calibration,
        "gate": request.gate,
        "batch_size": request.batch_size,
    }


def engine_key(request_key: str, candidate: Candidate, artifact: bytes, validity: object) -> str:
    """Names what was built.

    Args:
        request_key: Of the request that it answers; its gate and model are covered by it.
        candidate: Runtime, precision, inputs, outputs with the batch, layers in float.
        artifact: What the runtime loads, or compiles: it holds the weights and scales.
        validity: Versions, settings and device; see `_validity`.
    """
    return digest(
        {
            "request": request_key,
            "artifact": digest_bytes(artifact),
            "input": candidate.input,
            "outputs": candidate.outputs,
            "runtime": candidate.runtime,
            "precision": candidate.precision,
            "float_layers": candidate.float_layers,
            "validity": validity,
        }
    )


def _validity(request: EngineRequest) -> dict[str, object]:
    """What binds an engine to where it was built."""
    kind = request.device.kind
    return {
        "versions": {name: version_of(name) for name in KEYED_PACKAGES[kind]},
        "builder": BUILDER_REVISION,
        "settings": request.builder if kind == "gpu" else None,
        "device": request.device.identity,
    }


def resolve_engine(
    request: EngineRequest,
    store: EngineStore,
    rows: RowSource,
    say: Callable[[str], None],
    fingerprint: str | None = None,
    force: bool = False,
) -> ResolvedEngine:
    """Take the engine for a request from the store, or build it; several processes build once.

    Args:
        request: What is asked for.
        store: Where engines are kept.
        rows: Gives real rows; called only to build.
        say: Is told in a few words what takes long.
        fingerprint: Of the request's model; None: taken here.
        force: Build even when there is one.

    Raises:
        ModelError: The model is wrong, or changed meanwhile.
        AccuracyError: No candidate works, or none passes the gate.
    """
    fingerprint = fingerprint or fingerprint_model(request.model)
    key = request_key(request, fingerprint)
    if not force and (engine := store.find(key)):
        return ResolvedEngine(engine=engine, built=False, build_s=0.0)
    with store.lock(key):
        started = time.monotonic()
        # Another process may have built it meanwhile.
        if not force and (engine := store.find(key)):
            return ResolvedEngine(engine=engine, built=False, build_s=0.0)
        engine = _Build(request, key, fingerprint, say).run(rows, store)
    return ResolvedEngine(engine=engine, built=True, build_s=time.monotonic() - started)


class _Build:
    """One build: rows in, a published engine out."""

    def __init__(
        self, request: EngineRequest, key: str, fingerprint: str, say: Callable[[str], None]
    ) -> None:
        self._request = request
        self._key = key
        self._fingerprint = fingerprint
        self._say = say
        self._started = time.monotonic()

    def run(self, rows: RowSource, store: EngineStore) -> StoredEngine:
        from engines.candidates import CandidateFactory
        from engines.ladder import Ladder

        request = self._request
        calibration, held_out = self._split(rows)
        with (
            tempfile.TemporaryDirectory(prefix="nightscore-build-") as folder,
            ExitStack() as opened,
        ):
            factory = CandidateFactory(
                request.model,
                calibration,
                request.calibration.method,
                Path(folder),
                self._say,
                timing_cache=_timing_cache(request, store),
                settings=request.builder,
                weight_bits=request.device.weight_bits,
            )
            ladder = Ladder(request.model, factory, request.gate, held_out, request.device, opened)
            choice = ladder.climb(request.batch_size)
            artifact = choice.candidate.graph.read_bytes()
            attachments = factory.attachments_of(choice.candidate)
            attachments[REFERENCE] = choice.reference.graph.read_bytes()
            manifest = self._manifest(choice, artifact, attachments, calibration)
        self._check_model()
        self._say(f"engine {manifest.key[:12]}: {manifest.reason}")
        return store.publish(manifest, artifact, attachments)

    def _check_model(self) -> None:
        """It was read again after its fingerprint was taken, minutes later maybe.

        Raises:
            ModelError: It may have been another one by then.
        """
        if fingerprint_model(self._request.model) != self._fingerprint:
            raise ModelError(
                f"model {self._request.model.source}: changed while its engine was built; expected "
                "the one that the build began with. Run again."
            )

    def _split(self, source: RowSource) -> tuple[Array, HeldOut]:
        """Calibration rows, and others that are held out for the gate."""
        from engines.ladder import HeldOut

        wanted, held_out = self._request.calibration.num_rows, self._request.gate.num_rows
        self._say(f"building an engine: decoding {wanted + held_out:,} rows of the input")
        sample = source(wanted + held_out, self._request.calibration.seed)
        rows, expected = sample.rows, self._request.model.input
        if len(rows) == 0 or rows.shape[1:] != expected.row_shape or rows.dtype != expected.dtype:
            raise EngineError(
                f"rows to calibrate with: {rows.dtype} {rows.shape}; expected {expected.dtype} "
                f"{('rows', *expected.row_shape)}. Check that the input has rows that can be read."
            )
        # Too few rows are shared as asked, but the gate gets its own or half of them: it decides.
        shared = len(rows) * wanted // (wanted + held_out)
        first = max(1, min(shared, len(rows) - min(held_out, len(rows) // 2)))
        if first == len(rows):  # one row: it has to do for both
            return rows, HeldOut(rows=rows, labels=sample.labels)
        labels = None if sample.labels is None else sample.labels[first:]
        return rows[:first], HeldOut(rows=rows[first:], labels=labels)

    def _manifest(
        self, choice: Choice, artifact: bytes, attachments: dict[str, bytes], calibration: Array
    ) -> EngineManifest:
        from engines.candidates import GRAPH

        request, candidate = self._request, choice.candidate
        assert choice.rung.accuracy is not None
        # OpenVINO names layers differently each time that a process compiles the same graph.
        named = attachments[GRAPH] if candidate.runtime == "openvino" else artifact
        return EngineManifest(
            key=engine_key(self._key, candidate, named, _validity(request)),
            request_key=self._key,
            model_source=request.model.source,
            model_fingerprint=self._fingerprint,
            runtime=candidate.runtime,
            runtime_version=version_of(candidate.runtime),
            precision=candidate.precision,
            batch_size=candidate.input.shape[0],
            input=candidate.input,
            outputs=candidate.scoring_outputs,
            artifact=candidate.graph.name,
            # Of the files: `EngineStore.publish` fills them in.
            artifact_sha256="",
            artifact_bytes=0,
            attachments={},
            device=request.device,
            calibration_rows=len(calibration),
            calibration_seed=request.calibration.seed,
            calibration_sha256=digest_bytes(np.ascontiguousarray(calibration).data),
            calibration_method=request.calibration.method,
            gate=request.gate,
            accuracy=choice.rung.accuracy,
            rungs=choice.rungs,
            reason=choice.reason,
            build_s=time.monotonic() - self._started,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(),
            probe=choice.probe,
            reference_batch=choice.reference.input.shape[0],
            num_classes=next((s.shape[-1] for s in candidate.outputs if s.name == LOGITS), 0),
            columns=request.columns,
        )


def _timing_cache(request: EngineRequest, store: EngineStore) -> bytes | None:
    """Timings of the newest TensorRT engine of such a device: its kernels need no new race."""
    if request.device.kind != "gpu":
        return None
    from engines.candidates import TIMING_CACHE

    for engine in store.list():
        same = engine.manifest.device.identity == request.device.identity
        if same and TIMING_CACHE in engine.manifest.attachments:
            try:
                return store.fetch(engine).attachment(TIMING_CACHE).read_bytes()
            except (EngineError, OSError) as error:
                log.warning("timing cache of engine %s: %s", engine.key[:12], error)
    return None
