"""Build a job's engine: calibrate, race the candidates, keep the fastest that passes."""

from __future__ import annotations

import datetime
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.candidates import Candidate, batch_size_for, onnx_candidates
from engines.devices import Device
from engines.errors import AccuracyError, EngineCorruptError, EngineError
from engines.gate import Accuracy, GateSpec, compare, race, run_rows
from engines.keys import BUILDER_REVISION, RUNTIME_PACKAGES, digest, digest_bytes
from engines.keys import runtime_version as version_of
from engines.load import make_runner, probe_answer
from engines.manifest import EngineManifest, Rung, StoredEngine
from engines.model import ModelSpec, fingerprint_model, shown
from engines.runner import Array, Outputs, Runner
from engines.store import EngineStore

log = logging.getLogger(__name__)

RowSource = Callable[[int, int], Array]
"""rows(num_rows, seed) -> at most so many real rows, in the engine's input dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSpec:
    """Which rows the int8 scales are taken from."""

    num_rows: int = 256
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """What a job asks for on a device."""

    model: ModelSpec
    calibration: CalibrationSpec
    gate: GateSpec
    device: Device
    batch_size: int | None = None
    """None: what suits the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedEngine:
    """The engine for a request, and what it took to get it."""

    engine: StoredEngine
    built: bool
    build_s: float


REFERENCE = "onnxruntime fp32"
"""What the others are compared with; a candidate itself."""


def request_key(request: EngineRequest, model_fingerprint: str) -> str:
    """Names the question: model, gate, calibration settings, runtimes and device.

    Not the calibration rows: an engine serves from night to night. It has a key of its own.
    """
    return digest(
        {
            "model": model_fingerprint,
            "calibration": request.calibration,
            "gate": request.gate,
            "batch_size": request.batch_size,
            "runtimes": {runtime: version_of(runtime) for runtime in RUNTIME_PACKAGES},
            "builder": BUILDER_REVISION,
            "device": request.device.identity,
        }
    )


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
        ModelError: The model is wrong.
        AccuracyError: No candidate works, or none passes the gate.
    """
    fingerprint = fingerprint or fingerprint_model(request.model)
    key = request_key(request, fingerprint)
    if not force and (engine := _find_intact(store, key)):
        return ResolvedEngine(engine=engine, built=False, build_s=0.0)
    with store.lock(key):
        started = time.monotonic()
        # Another process may have built it meanwhile.
        if not force and (engine := _find_intact(store, key)):
            return ResolvedEngine(engine=engine, built=False, build_s=0.0)
        build = _Build(request, rows, say)
        manifest, graph = build.run(key, fingerprint, started)
        engine = store.publish(manifest, graph, {})
    return ResolvedEngine(engine=engine, built=True, build_s=time.monotonic() - started)


def _find_intact(store: EngineStore, key: str) -> StoredEngine | None:
    engine = store.find(key)
    if engine is None:
        return None
    try:
        engine.check()
    except EngineCorruptError as error:
        log.warning("%s It is built again.", error)
        return None
    return engine


class _Build:
    """One build: the rows, the candidates and what they reached."""

    def __init__(self, request: EngineRequest, rows: RowSource, say: Callable[[str], None]) -> None:
        self._request = request
        self._rows = rows
        self._say = say
        self._unquantized: str | None = None

    def run(
        self, request_key: str, fingerprint: str, started: float
    ) -> tuple[EngineManifest, bytes]:
        request = self._request
        calibration, held_out = self._split_rows()
        with (
            tempfile.TemporaryDirectory(prefix="nightscore-build-") as folder,
            ExitStack() as open_,
        ):
            candidates = self._candidates(calibration, Path(folder))
            rungs, runners = self._measure(candidates, held_out, open_)
            chosen = self._choose(rungs)
            candidate = next(
                c for c in candidates if c.name == f"{chosen.runtime} {chosen.precision}"
            )
            graph = candidate.graph.read_bytes()
            assert chosen.accuracy is not None
            manifest = EngineManifest(
                key=self._engine_key(candidate, graph, request_key),
                request_key=request_key,
                model_source=request.model.source,
                model_fingerprint=fingerprint,
                runtime=candidate.runtime,
                runtime_version=version_of(candidate.runtime),
                precision=candidate.precision,
                batch_size=candidate.input.shape[0],
                input=candidate.input,
                outputs=candidate.outputs,
                artifact=candidate.graph.name,
                artifact_sha256=digest_bytes(graph),
                artifact_bytes=len(graph),
                attachments={},
                device=request.device,
                calibration_rows=len(calibration),
                calibration_sha256=digest_bytes(np.ascontiguousarray(calibration).data),
                min_agreement=request.gate.min_agreement,
                accuracy=chosen.accuracy,
                rungs=tuple(rungs),
                reason=_reason(chosen, rungs, request.gate),
                build_s=time.monotonic() - started,
                created_at=datetime.datetime.now(datetime.UTC).isoformat(),
                probe=probe_answer(runners[candidate.name]),
            )
        self._say(f"engine {manifest.key[:12]}: {manifest.reason}")
        return manifest, graph

    def _engine_key(self, candidate: Candidate, graph: bytes, request_key: str) -> str:
        """Covers weights and scales (both are in the graph), I/O, runtime, settings and device."""
        return digest(
            {
                "request": request_key,  # its gate and reason stand in the manifest
                "graph": digest_bytes(graph),
                "input": candidate.input,
                "outputs": candidate.outputs,
                "runtime": candidate.runtime,
                "version": version_of(candidate.runtime),
                "precision": candidate.precision,
                "builder": BUILDER_REVISION,
                "device": self._request.device.identity,
            }
        )

    def _split_rows(self) -> tuple[Array, Array]:
        """Calibration rows, and others that are held out for the gate."""
        wanted, held_out = self._request.calibration.num_rows, self._request.gate.num_rows
        self._say(f"building an engine: decoding {wanted + held_out:,} rows of the input")
        rows = self._rows(wanted + held_out, self._request.calibration.seed)
        expected = self._request.model.input
        if len(rows) == 0 or rows.shape[1:] != expected.row_shape or rows.dtype != expected.dtype:
            raise EngineError(
                f"rows to calibrate with: {rows.dtype} {rows.shape}; expected {expected.dtype} "
                f"{('rows', *expected.row_shape)}. Check that the input has rows that can be read."
            )
        num_calibration = max(1, len(rows) * wanted // (wanted + held_out))
        calibration = rows[:num_calibration]
        return calibration, rows[num_calibration:] if len(rows) > num_calibration else calibration

    def _candidates(self, calibration: Array, folder: Path) -> list[Candidate]:
        from engines.export import fixed_batch, load_core
        from engines.quantize import quantize_for_cpu

        spec = self._request.model
        self._say(f"exporting {spec.source}")
        core = load_core(spec)
        batch_size = batch_size_for(spec, self._request.device, self._request.batch_size, core)
        self._say(f"calibrating int8 with {len(calibration):,} rows")
        graphs = {"fp32": core}
        try:
            graphs = {
                "int8": quantize_for_cpu(core, spec, calibration, fixed_batch(core)),
                **graphs,
            }
        except Exception as error:  # the quantiser may fail in its own way: fp32 is left
            self._unquantized = shown(error)
            log.warning("model %s: int8 is left out: %s", spec.source, self._unquantized)
        return [
            candidate
            for precision, graph in graphs.items()
            for candidate in onnx_candidates(
                graph,
                spec,
                runtimes=tuple(RUNTIME_PACKAGES),
                precision=precision,
                batch_size=batch_size,
                folder=folder,
            )
        ]

    def _measure(
        self, candidates: list[Candidate], held_out: Array, open_: ExitStack
    ) -> tuple[list[Rung], dict[str, Runner]]:
        self._say(f"measuring {len(candidates)} candidates on {len(held_out):,} held-out rows")
        runners: dict[str, Runner] = {}
        answers: dict[str, Outputs] = {}
        errors: dict[str, str] = {}
        for candidate in candidates:
            runner = make_runner(
                candidate.runtime,
                candidate.graph,
                candidate.input,
                candidate.outputs,
                self._request.device,
            )
            try:
                runners[candidate.name] = open_.enter_context(runner)
                answers[candidate.name] = run_rows(runner, held_out)
            except Exception as error:  # a runtime may refuse a graph in its own way
                runners.pop(candidate.name, None)
                errors[candidate.name] = shown(error)
        if REFERENCE not in answers:
            raise AccuracyError(
                f"{REFERENCE}: {errors[REFERENCE]}; expected it to run, to compare with."
            )
        speeds = race(runners, held_out)
        rungs = [
            _failed_rung(runtime, "int8", self._unquantized)
            for runtime in RUNTIME_PACKAGES
            if self._unquantized
        ]
        for candidate in candidates:
            accuracy: Accuracy | None = None
            if candidate.name in answers:
                head = self._request.model.head
                accuracy = compare(head, answers[REFERENCE], answers[candidate.name])
            rungs.append(
                Rung(
                    runtime=candidate.runtime,
                    precision=candidate.precision,
                    rows_per_s=speeds.get(candidate.name, 0.0),
                    accuracy=accuracy,
                    passed=accuracy is not None and accuracy.passes(self._request.gate),
                    error=errors.get(candidate.name),
                )
            )
        return rungs, runners

    def _choose(self, rungs: list[Rung]) -> Rung:
        passed = [rung for rung in rungs if rung.passed]
        if not passed:
            raise AccuracyError(
                "no candidate passes the gate; expected fp32 to agree with itself. Its answers are "
                "not all finite, or `engine.gate.min_agreement` is above 1."
            )
        return max(passed, key=lambda rung: rung.rows_per_s)


def _failed_rung(runtime: str, precision: str, error: str) -> Rung:
    return Rung(
        runtime=runtime,
        precision=precision,
        rows_per_s=0.0,
        accuracy=None,
        passed=False,
        error=error,
    )


def _reason(chosen: Rung, rungs: list[Rung], gate: GateSpec) -> str:
    assert chosen.accuracy is not None
    num_passed = sum(rung.passed for rung in rungs)
    failed = [
        f"{r.runtime} {r.precision} {r.accuracy.agreement:.4f}"
        for r in rungs
        if not r.passed and r.accuracy is not None
    ]
    refused = f"; missed the gate: {', '.join(failed)}" if failed else ""
    broken = [f"{r.runtime} {r.precision}" for r in rungs if r.error is not None]
    refused += f"; failed: {', '.join(broken)}" if broken else ""
    return (
        f"{chosen.runtime} {chosen.precision}, the fastest of {num_passed} that pass "
        f"({chosen.rows_per_s:,.0f} rows/s), agreement {chosen.accuracy.agreement:.4f} >= "
        f"{gate.min_agreement} on {chosen.accuracy.num_rows} held-out rows{refused}"
    )
