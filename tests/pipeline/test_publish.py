"""Publication: only what is complete, and only within the job's limits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pytest
from pipeline_cases import (
    DATE,
    SumRunner,
    a_job,
    a_plan,
    job_data,
    publish_night,
    scoring_tools,
    users,
    write_input,
)

from pipeline.config import Job
from pipeline.errors import InputError, VerifyError
from pipeline.ledger import CommitRecord
from pipeline.plan import Plan
from pipeline.publish import (
    Draft,
    check_complete,
    count_reasons,
    draft_of,
    find_report,
    publish,
    read_report,
    write_reports,
)
from pipeline.report import RunReport
from pipeline.score_shards import ShardScoring
from pipeline.storage import open_storage
from pipeline.versions import find_published

Records = dict[int, CommitRecord]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    table = users(100)
    f1 = [None if row in (5, 50) else 1.0 for row in range(100)]
    write_input(tmp_path / "in", table.set_column(2, "f1", pa.array(f1, pa.float32())))
    return a_job(job_data(tmp_path), limits={"max_quarantined": 0.02})


@pytest.fixture
def plan(job: Job) -> Plan:
    return a_plan(job)


@pytest.fixture
def records(job: Job, plan: Plan) -> Records:
    with ShardScoring(plan.shards, scoring_tools(job, plan, SumRunner())) as scoring:
        return {record.shard: record for record in scoring}


def test_a_complete_run_passes(plan: Plan, records: Records) -> None:
    check_complete(plan, records)
    assert count_reasons(records) == {"feature_missing": 2}


def test_a_shard_without_a_record_stops_publication(plan: Plan, records: Records) -> None:
    del records[2]
    with pytest.raises(VerifyError, match=r"1 of 5 shards have no commit record \(first: 00002\)"):
        check_complete(plan, records)


@pytest.mark.parametrize("change", [{"num_scored": 19}, {"num_scored": 21}, {"file": "other"}])
def test_a_record_that_does_not_add_up_stops_publication(
    plan: Plan, records: Records, change: dict[str, object]
) -> None:
    records[1] = dataclasses.replace(records[1], **change)  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match="shard 00001"):
        check_complete(plan, records)


def test_the_manifest_names_every_part_and_pins_the_input(
    job: Job, plan: Plan, a_report: Callable[..., RunReport]
) -> None:
    folder = publish_night(job, a_report())
    manifest = json.loads((folder / "_MANIFEST.json").read_text())
    assert (manifest["rows"], manifest["scored"], manifest["quarantined"]) == (100, 98, 2)
    assert len(manifest["parts"]) == len(plan.shards) == 5
    assert manifest["input"]["files"] == [dataclasses.asdict(file) for file in plan.files]
    assert manifest["input"]["unreadable"] == []
    for part in manifest["parts"]:
        assert (folder / part["part"]["path"]).stat().st_size == part["part"]["num_bytes"]
        if part["quarantine"]:
            assert (folder / part["quarantine"]["path"]).exists()
    assert (folder / "_SUCCESS").read_bytes() == b""
    assert not [path for path in folder.parent.iterdir() if path.name.startswith("_publishing")]


def test_only_scored_parts_meet_a_readers_glob(
    job: Job, a_report: Callable[..., RunReport]
) -> None:
    folder = publish_night(job, a_report())
    found = list(Path(job.output.uri).glob("*/dt=*/*.parquet"))
    assert len(found) == 5
    assert all(path.parent == folder for path in found)


def test_a_second_publication_changes_nothing(
    job: Job, plan: Plan, records: Records, a_report: Callable[..., RunReport]
) -> None:
    folder = publish_night(job, a_report())
    before = {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    tools = scoring_tools(job, plan, SumRunner())
    output = open_storage(job.output.uri)
    assert not publish(draft_of(job, plan, tools.ledger, records, a_report()), output)
    assert before == {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def test_the_report_comes_back_from_the_manifest(
    job: Job, a_report: Callable[..., RunReport]
) -> None:
    publish_night(job, a_report(wall_s=12.5))
    report = read_report(open_storage(job.output.uri), job.name, DATE)
    assert (report.wall_s, report.rows, report.scored) == (12.5, 100, 98)


def test_reports_are_written_once(job: Job, a_report: Callable[..., RunReport]) -> None:
    folder = publish_night(job, a_report())
    output = open_storage(job.output.uri)
    report = read_report(output, job.name, DATE)
    write_reports(output, report)
    first = (folder / "_report.html").read_bytes()
    write_reports(output, dataclasses.replace(report, rows=1))
    assert (folder / "_report.html").read_bytes() == first
    assert json.loads((folder / "_report.json").read_text())["rows"] == 100


def test_what_is_not_published_has_no_manifest_and_no_report(job: Job) -> None:
    output = open_storage(job.output.uri)
    assert find_published(output, job.name, DATE) is None
    with pytest.raises(InputError, match="not published; expected a finished run"):
        read_report(output, job.name, DATE)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"{}", b'{"run_id": 1}', b"\xff"])
def test_a_damaged_manifest_is_an_error_and_a_damaged_report_is_none(
    job: Job, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    output = open_storage(job.output.uri)
    for name in ("_MANIFEST.json", "_report.json"):
        output.create(f"{job.name}/dt={DATE}/{name}", damage)
    with pytest.raises(VerifyError, match=r"_MANIFEST\.json: damaged .* Move its folder away"):
        find_published(output, job.name, DATE)
    assert find_report(output, job.name, DATE) is None
    assert "_report.json: cannot be read" in caplog.text


def test_of_two_runs_that_publish_in_a_bucket_at_once_the_loser_takes_its_copies_back(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that lists the folder would see rows twice otherwise: names differ from run to run.

    The loser has begun before the winner's manifest is there, and copies after it.
    """
    output = open_storage(s3_folder)
    for name in ("winner", "loser"):
        output.create(f"users/_runs/{name}/parts/{name}.parquet", name.encode())

    def draft(name: str) -> Draft:
        file = {"path": f"{name}.parquet", "name": f"{name}.parquet"}
        manifest = {
            "job": "users",
            "date": DATE,
            "run_id": name,
            "parts": [{"part": file, "quarantine": None}],
        }
        return Draft(
            manifest=manifest,
            files={file["path"]: f"users/_runs/{name}/parts/{file['name']}"},
        )

    slow = open_storage(s3_folder)
    copy = slow.copy

    def overtaken(files: Mapping[str, str]) -> None:
        if output.read(f"users/dt={DATE}/_MANIFEST.json") is None:
            assert publish(draft("winner"), output)
        copy(files)

    monkeypatch.setattr(slow, "copy", overtaken)
    assert not publish(draft("loser"), slow)
    found = [info.path.rpartition("/")[2] for info in output.list_files(f"users/dt={DATE}")]
    assert found == ["_MANIFEST.json", "_SUCCESS", "winner.parquet"]
