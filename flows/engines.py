"""Facts for the `score engine` commands, and what these do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from engines.build import request_key
from engines.devices import Device
from engines.errors import EngineCorruptError, EngineError, RollbackError
from engines.manifest import EngineManifest
from engines.model import fingerprint_model, shown
from engines.store import EngineStore
from engines.upkeep import collect_garbage, roll_back
from engines.versions import Version
from flows.devices import lane_devices
from pipeline.config import Job
from pipeline.engine import get_engine, open_store, request_for, try_engine
from pipeline.plan import make_plan
from pipeline.storage import open_storage
from pipeline.tuning import tuned

Facts = dict[str, Any]


def list_facts(job: Job) -> Facts:
    """The engines in the job's store, newest first, under `engines`."""
    store = open_store(job)
    log = store.versions.all()
    engines = [_facts(e.manifest, log.get(e.manifest.request_key, [])) for e in store.list()]
    return {"engines": engines}


def show_facts(job: Job, key: str) -> Facts:
    """One engine by the first characters of its key."""
    store = open_store(job)
    manifest = store.get(key).manifest
    return _facts(manifest, store.versions.history(manifest.request_key))


def _facts(manifest: EngineManifest, history: list[Version]) -> Facts:
    numbers = [version.number for version in history if version.engine == manifest.key]
    return {
        **asdict(manifest),
        "version": numbers[-1] if numbers else None,
        "current": bool(history) and history[-1].engine == manifest.key,
    }


def build_facts(job: Job, date: str, say: Callable[[str], None], *, force: bool) -> Facts:
    """Find or build the job's engine for this machine, from the rows of `date`."""
    plan = make_plan(job, date, open_storage(job.input.uri))
    device = _device(job)
    job = tuned(job, device)
    request = request_for(job, plan.num_features, device)
    fingerprint = fingerprint_model(request.model)
    resolved = get_engine(job, plan, request, fingerprint, say, force=force)
    store = open_store(job)
    manifest = resolved.engine.manifest
    history = store.versions.history(manifest.request_key)
    before = [v.number for v in history[:-1] if v.engine == manifest.key]
    return {
        **_facts(manifest, history),
        "built": resolved.built,
        "took_s": resolved.build_s,
        "version_before": before[-1] if before else None,
    }


def verify_facts(job: Job, key: str | None) -> Facts:
    """Check one engine, or all: every file's hash, and the probe batch where this device can."""
    store, device = open_store(job), _device(job)
    keys = store.keys() if key is None else [store.full_key(key)]
    engines = [_verify(store, full, device) for full in keys]
    damaged = [engine["key"] for engine in engines if engine["damage"] is not None]
    return {"store": store.files.uri, "engines": engines, "damaged": damaged}


def _verify(store: EngineStore, key: str, device: Device) -> Facts:
    facts: Facts = {"key": key, "files": 0, "damage": None, "opened": False, "not_opened": None}
    try:
        engine = store.check(key)
    except EngineCorruptError as error:
        return {**facts, "damage": str(error)}
    facts["files"] = 1 + len(engine.manifest.files)
    if engine.manifest.device.identity != device.identity:
        return {**facts, "not_opened": "built for another device"}
    try:
        engine.check_runtime()
    except EngineCorruptError:
        built_with = f"{engine.manifest.runtime} {engine.manifest.runtime_version}"
        return {**facts, "not_opened": f"built with {built_with}, which is not installed here"}
    try:
        try_engine(store.fetch(engine), device)
        return {**facts, "opened": True}
    except EngineCorruptError as error:
        return {**facts, "damage": str(error)}
    except EngineError as error:  # no memory left on the device, a process that was killed
        return {**facts, "not_opened": str(error)}
    except Exception as error:  # a runtime may refuse a file in its own way
        return {**facts, "damage": f"engine {key[:12]}: {shown(error)}; expected it to open."}


def rollback_facts(job: Job, to: str | None) -> Facts:
    """Make the earlier engine, or the engine `to`, current again for what the job asks for.

    Raises:
        RollbackError: There is no such engine, or it answers another request.
    """
    store = open_store(job)
    if to is None:
        request, key = _request_here(job, store), None
    else:
        engine = store.get(to)
        request, key = _request_of(job, engine.manifest), engine.key
    version = roll_back(store, request, key)
    before = [v for v in store.versions.history(request) if v.number < version.number]
    return {"request_key": request, "replaced": before[-1].engine, **asdict(version)}


def _request_here(job: Job, store: EngineStore) -> str:
    """The request that the job makes on this device, among those that the store answers."""
    device = _device(job)
    job = tuned(job, device)
    answered = store.versions.all()
    widths = {engine.manifest.input.shape[-1] for engine in store.list()}
    for num_features in [0] if job.input.images else sorted(widths):
        request = request_for(job, num_features, device)
        key = request_key(request, fingerprint_model(request.model))
        if answered.get(key):
            return key
    raise RollbackError(
        f"{store.files.uri}: no engine for what this job asks for on this device; expected at "
        "least two. An engine of another model comes back with its model file; for another "
        "device name it: `--to KEY`."
    )


def _request_of(job: Job, manifest: EngineManifest) -> str:
    """The request that an engine answers, if the job makes it on the engine's device."""
    here = _device(job)
    is_here = here.identity == manifest.device.identity
    job = tuned(job, here if is_here else manifest.device)
    request = request_for(job, manifest.input.shape[-1], manifest.device)
    fingerprint = fingerprint_model(request.model)
    if manifest.model_fingerprint != fingerprint:
        raise RollbackError(
            f"engine {manifest.key[:12]}: made of another model, {manifest.model_fingerprint[:12]}"
            f"; expected the job's model as it is now, {fingerprint[:12]}. Put the earlier model "
            f"file back at {job.model.source}: its engine is then used again."
        )
    if manifest.request_key != request_key(request, fingerprint):
        raise RollbackError(
            f"engine {manifest.key[:12]}: answers another request; expected the job's gate, "
            "calibration, batch size and versions of runtimes to be those that it was built for."
        )
    return manifest.request_key


def gc_facts(job: Job, num_versions: int, *, dry_run: bool) -> Facts:
    """Remove what nobody needs from the job's store."""
    garbage = collect_garbage(open_store(job), num_versions, dry_run=dry_run)
    return {"store": job.engine.store, "dry_run": dry_run, **asdict(garbage)}


def _device(job: Job) -> Device:
    return lane_devices(job)[0].engine_device
