"""A night, composed in this process: what it does when its engine turns out not to open."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from engines.build import ResolvedEngine
from engines.model import fingerprint_model
from flows.devices import lane_devices
from flows.night import run_night
from flows.progress import LineProgress
from pipeline.config import Job, load_job
from pipeline.engine import build_engine, open_store, request_for
from pipeline.plan import make_plan
from pipeline.run import Night
from pipeline.storage import open_storage
from tests.conftest import DATE


def built(job: Job) -> ResolvedEngine:
    plan = make_plan(job, DATE, open_storage(job.input.uri))
    request = request_for(job, plan.num_features, lane_devices(job)[0].engine_device)
    fingerprint = fingerprint_model(request.model)
    return build_engine(job, plan, request, fingerprint, False, say=lambda _: None)


@pytest.mark.timeout(120)
def test_a_stored_engine_that_does_not_open_is_built_anew_once(
    features_job: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [f"engine.store={tmp_path / 'engines'}", "lanes.device=cpu"]
    job = load_job(str(features_job), sets)
    store, manifest = open_store(job), built(job).engine.manifest
    (path,) = (tmp_path / "engines").rglob(f"*-{manifest.artifact}")
    wrong = tuple(value + 1.0 for value in manifest.probe)
    store.publish(dataclasses.replace(manifest, probe=wrong), path.read_bytes(), {})
    found = store.find(manifest.request_key)
    assert found is not None, "its hashes are right"
    assert found.manifest.probe == wrong

    with caplog.at_level(logging.WARNING):
        report = run_night(Night(job=job, date=DATE), LineProgress(lambda _: None))
    assert (report.status, report.engine.built) == ("published", True)
    assert report.phases.engine_s > report.engine.build_s
    (warning,) = [r.getMessage() for r in caplog.records if "probe batch" in r.getMessage()]
    assert warning.endswith("`score engine build --force`. This run builds a new one.")
    found = store.find(manifest.request_key)
    assert found is not None
    assert found.manifest.probe == pytest.approx(manifest.probe)
