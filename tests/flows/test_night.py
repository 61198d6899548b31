"""A night, composed in this process: what it does when its engine turns out not to open."""

from __future__ import annotations

import dataclasses
import io
import logging
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from engines.build import ResolvedEngine
from engines.model import fingerprint_model
from flows.devices import lane_devices
from flows.night import run_night
from flows.planning.plan import plan_facts, render_plan
from flows.progress import LineProgress
from pipeline.config import Job
from pipeline.engine import build_engine, open_store, request_for
from pipeline.errors import InputChangedError, VerifyError
from pipeline.job_file import load_job
from pipeline.plan import make_plan
from pipeline.run import Night
from pipeline.storage import open_storage
from pipeline.verify import verify_published
from pipeline.versions import published_folder
from tests.conftest import DATE


def built(job: Job) -> ResolvedEngine:
    plan = make_plan(job, DATE, open_storage(job.input.uri))
    request = request_for(job, plan.num_features, lane_devices(job)[0].engine_device)
    fingerprint = fingerprint_model(request.model)
    return build_engine(job, plan, request, fingerprint, False, say=lambda _: None)


@pytest.mark.timeout(300)
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


@pytest.fixture
def torn_job(features_job: Path, features_folder: Path, tmp_path: Path) -> Job:
    """The users of a night, and one more file that was cut off."""
    shutil.copytree(features_folder / "users", tmp_path / "users")
    folder = tmp_path / "users" / f"dt={DATE}"
    (folder / "users-9.parquet").write_bytes((folder / "users-0.parquet").read_bytes()[:5_000])
    sets = [f"input.uri={tmp_path / 'users'}", "lanes.device=cpu", "limits.max_quarantined=0.5"]
    return load_job(str(features_job), sets)


@pytest.mark.timeout(300)
def test_a_file_that_cannot_be_read_leaves_the_night_degraded_until_it_is_repaired(
    torn_job: Job, tmp_path: Path
) -> None:
    report = run_night(Night(job=torn_job, date=DATE), LineProgress(lambda _: None))
    assert (report.rows, report.degraded) == (40_000, True)
    (file,) = report.unreadable_files
    assert (file.path, file.num_bytes) == (f"dt={DATE}/users-9.parquet", 5_000)
    assert file.message == "no Parquet magic bytes at its end"
    verdict = verify_published(torn_job.output.uri, torn_job.name, DATE)
    assert (verdict["rows"], verdict["unreadable_files"]) == (40_000, 1)

    torn = tmp_path / "users" / file.path
    torn.write_bytes(torn.with_name("users-0.parquet").read_bytes())
    with pytest.raises(VerifyError, match=r"can be read, but none of its rows was scored"):
        verify_published(torn_job.output.uri, torn_job.name, DATE)


@pytest.mark.timeout(300)
def test_a_file_that_was_only_being_written_is_not_left_out(torn_job: Job, tmp_path: Path) -> None:
    torn = tmp_path / "users" / f"dt={DATE}" / "users-9.parquet"

    class Writes(LineProgress):
        def start(self, num_rows: int, num_done: int) -> None:
            torn.write_bytes(torn.with_name("users-0.parquet").read_bytes())
            super().start(num_rows, num_done)

    with pytest.raises(InputChangedError, match=r"users-9\.parquet: .* Run again to score"):
        run_night(Night(job=torn_job, date=DATE), Writes(lambda _: None))
    folder = Path(torn_job.output.uri, published_folder(torn_job.name, DATE))
    assert not folder.exists()
    report = run_night(Night(job=torn_job, date=DATE), LineProgress(lambda _: None))
    assert (report.rows > 40_000, report.degraded, report.unreadable_files) == (True, False, ())


def test_a_plan_names_files_that_cannot_be_read(torn_job: Job) -> None:
    facts = plan_facts(torn_job, DATE)
    (file,) = facts["unreadable_files"]
    assert file["path"] == f"dt={DATE}/users-9.parquet"
    console = Console(file=io.StringIO(), width=200)
    console.print(render_plan(facts))
    assert "users-9.parquet: no Parquet magic bytes" in console.file.getvalue()  # type: ignore[attr-defined]
