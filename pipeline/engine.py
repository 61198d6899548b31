"""The job's engine: what is asked of the engine layer, with rows of the job's own input."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from engines.build import (
    CalibrationSpec,
    EngineRequest,
    ResolvedEngine,
    Sample,
    request_key,
    resolve_engine,
)
from engines.devices import Device
from engines.gate import GateSpec
from engines.load import open_runner
from engines.manifest import EngineManifest, StoredEngine
from engines.model import FeatureInput, ImageInput, ModelSpec
from engines.store import EngineStore, StoreOptions
from engines.tensorrt_build import BuilderSettings
from pipeline.blocks import Array
from pipeline.config import Job
from pipeline.errors import ConfigError, InputError
from pipeline.input_columns import check_order
from pipeline.plan import Plan
from pipeline.read import sample_rows
from pipeline.row_groups import max_group_bytes
from pipeline.storage import Storage, open_storage
from pipeline.watchdog import memory_share

Say = Callable[[str], None]


def request_for(job: Job, num_features: int, device: Device) -> EngineRequest:
    """The engine that a job asks for on a device."""
    model = job.model
    shape: ImageInput | FeatureInput
    if job.input.images is not None:
        height, width = model.size
        shape = ImageInput(height=height, width=width, mean=model.mean, std=model.std)
    else:
        shape = FeatureInput(num_features=num_features)
    calibration, gate = job.engine.calibration, job.engine.gate
    return EngineRequest(
        model=ModelSpec(source=model.source, input=shape, head=model.head, top_k=model.top_k),
        calibration=CalibrationSpec(
            num_rows=calibration.rows, seed=calibration.seed, method=calibration.method
        ),
        gate=GateSpec(
            num_rows=gate.rows,
            min_agreement=gate.min_agreement,
            min_cosine=gate.min_cosine,
            max_divergence=gate.max_divergence,
            max_metric_loss=gate.max_metric_loss,
            label=gate.label,
        ),
        device=device,
        builder=BuilderSettings(
            optimization_level=job.engine.tensorrt.optimization_level,
            workspace_bytes=job.engine.tensorrt.workspace_bytes,
        ),
        batch_size=job.engine.batch_size,
    )


def open_store(job: Job, say: Say | None = None) -> EngineStore:
    """The job's engine store, on a local disk or in a bucket.

    Args:
        job: The job.
        say: Told when another process's build is waited for.
    """
    options = StoreOptions(say=say) if say else StoreOptions()
    return EngineStore(open_storage(job.engine.store), options)


def stored_engine(
    job: Job, request: EngineRequest, fingerprint: str, say: Say | None = None
) -> ResolvedEngine | None:
    """The engine that would score tonight, or None when one must be built."""
    found = open_store(job, say).find(request_key(request, fingerprint))
    return ResolvedEngine(engine=found, built=False, build_s=0.0) if found else None


def get_engine(
    job: Job, plan: Plan, request: EngineRequest, fingerprint: str, say: Say, *, force: bool = False
) -> ResolvedEngine:
    """Take the job's engine from its store, or build it from rows of its input.

    Args:
        job: The job.
        plan: The date whose rows are taken.
        request: What is asked for.
        fingerprint: Of the request's model.
        say: Is told in a few words what takes long.
        force: Build a new version even when there is one.
    """
    arguments = (job, plan, request, fingerprint, force)
    if request.device.kind == "cpu":
        return build_engine(*arguments, say=say)
    # A process is worth its start only when there is something to build.
    if not force and (found := stored_engine(job, request, fingerprint, say)):
        return found
    from pipeline.engine_process import run_bound

    resolved: ResolvedEngine = run_bound(request.device, build_engine, arguments, say)
    return resolved


def try_engine(engine: StoredEngine, device: Device) -> None:
    """Open an engine once on a device of this machine, which runs its probe batch.

    Raises:
        EngineError: It is not what was published.
    """
    if device.kind == "gpu":
        from pipeline.engine_process import run_bound

        run_bound(device, open_and_close, (engine,), lambda _: None)
    else:
        open_and_close(engine)


def open_and_close(engine: StoredEngine, *, say: Say | None = None) -> None:
    """`try_engine` in this very process; it has nothing to say."""
    del say
    with open_runner(engine):
        pass


def build_engine(  # as `get_engine`; all is plain data but `say`
    job: Job, plan: Plan, request: EngineRequest, fingerprint: str, force: bool, *, say: Say
) -> ResolvedEngine:
    """`get_engine` in this very process."""
    source, num_threads = open_storage(job.input.uri), request.device.num_threads

    def rows(num_rows: int, seed: int) -> Sample:
        return decoded_sample(job, plan, source, num_rows, seed, num_threads)

    named = replace(request, columns=plan.feature_columns)
    return resolve_engine(named, open_store(job, say), rows, say, fingerprint, force)


def decoded_sample(
    job: Job, plan: Plan, source: Storage, num_rows: int, seed: int, num_threads: int
) -> Sample:
    """Engine inputs of up to `num_rows` good rows, decoded as at night, with their labels if any.

    Raises:
        InputError: No row of the sample can be decoded, or the label column does not fit.
    """
    from pipeline.lane_child import make_decoder  # most nights find their engine

    decoder = make_decoder(job, plan.feature_columns, plan.num_features, num_threads)
    label = job.engine.gate.label
    columns = (*decoder.columns, *([label] if label else []))
    most_bytes = max_group_bytes(job.limits.max_group_gib, memory_share(job.lanes.count))
    columns = tuple(dict.fromkeys(columns))
    table = sample_rows(plan, source, columns, num_rows, seed, most_bytes)
    good: list[Array] = []
    labels: list[Array] = []
    with decoder:
        for rows in table.combine_chunks().to_batches(max_chunksize=decoder.block_rows):
            inputs, bad_rows = decoder.decode(rows)
            good.append(np.delete(inputs, list(bad_rows), axis=0))
            if label:
                labels.append(np.delete(_labels(rows, label), list(bad_rows)))
    sample = np.concatenate(good)
    if len(sample) == 0:
        raise InputError(
            f"{source.uri}: none of {len(table)} sampled rows can be decoded; expected good rows "
            "to calibrate the engine with. Look at the data."
        )
    return Sample(rows=sample, labels=np.concatenate(labels) if labels else None)


def _labels(rows: pa.RecordBatch, label: str) -> Array:
    """float64, NaN for null."""
    column = rows.column(label)
    try:
        return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"column {label}: {error}; expected numbers. Check `engine.gate.label`."
        ) from None


def load_class_names(names: str | None) -> tuple[str, ...]:
    """Names of the classes, from a text file or a `module:callable`; empty for None.

    Raises:
        ConfigError: The file is missing or no text, or the callable is not there.
    """
    if names is None:
        return ()
    module, separator, function = names.partition(":")
    if not separator:
        try:
            text = Path(names).read_text(encoding="utf-8-sig").rstrip("\n")
            # Not splitlines: a name may have U+2028 or a form feed in it.
            return tuple(text.split("\n")) if text else ()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"model.class_names: {names}: not UTF-8 (byte {error.start}); expected a text file "
                "with one name a line. Save it as UTF-8."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"model.class_names: {names}: {error.strerror}; expected a text file with one "
                "name a line, or module:callable."
            ) from None
    try:
        return tuple(getattr(importlib.import_module(module), function)())
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.class_names: {names}: {error}; expected module:callable that returns names."
        ) from None


def check_class_names(job: Job, names: Sequence[str], engine: EngineManifest) -> None:
    """Raise ConfigError unless each class of an engine has one of the names that the job gives."""
    expected = engine.num_classes
    if job.model.class_names is not None and expected and len(names) != expected:
        raise ConfigError(
            f"model.class_names: {job.model.class_names}: {len(names):,} names; expected "
            f"{expected:,}, one for each class of the model."
        )


def check_columns(job: Job, plan: Plan, engine: EngineManifest) -> None:
    """Raise ConfigError where globs give other features, or another order, than an engine had."""
    patterns = job.input.features.columns if job.input.features else ()
    if engine.columns and plan.feature_columns != patterns:
        why = f"as in the rows that engine {engine.key[:12]} was built on"
        check_order(plan.feature_columns, engine.columns, job.input.uri, why)
