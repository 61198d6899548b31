"""A published date, published again: the version before is kept, and can be had back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_cases import (
    DATE,
    SumRunner,
    a_job,
    a_plan,
    job_data,
    scoring_tools,
    users,
    write_input,
)
from version_cases import Dated

from pipeline.engine_pin import EnginePin
from pipeline.errors import InputError, StorageError
from pipeline.gc import Garbage, GcRules, collect, find_garbage, summary
from pipeline.ledger import Ledger
from pipeline.published_names import version_of
from pipeline.report import RunReport
from pipeline.requeue import requeue
from pipeline.score_shards import ShardScoring
from pipeline.storage import SUCCESS, Storage, open_storage
from pipeline.versions import (
    REPORT_HTML,
    REPORT_JSON,
    find_kept,
    kept_versions,
    replace,
    roll_back,
    settle,
)

ONE_ENGINE = EnginePin(engine="another", common="", has_several=False)
NAMES = [f"{DATE}-one", f"{DATE}-two", f"{DATE}-three"]


@pytest.fixture(params=["local", "object"])
def dated(
    request: pytest.FixtureRequest, tmp_path: Path, a_report: Callable[[], RunReport]
) -> Dated:
    table = users(100)
    f1 = [None if row in (5, 50) else 1.0 for row in range(100)]
    write_input(tmp_path / "in", table.set_column(2, "f1", pa.array(f1, pa.float32())))
    is_object = request.param == "object"
    uri = str(request.getfixturevalue("s3_folder")) if is_object else str(tmp_path / "out")
    job = a_job(job_data(tmp_path), output={"uri": uri})
    return Dated(job=job, output=open_storage(uri), report=a_report())


def test_a_version_takes_the_place_of_the_one_before_which_is_kept(dated: Dated) -> None:
    for run_id in NAMES:
        assert dated.score(run_id)
        assert dated.verify()["run_id"] == run_id
    assert dated.now.version == 3
    assert dated.now.manifest["replaces"] == NAMES[1]
    assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None
    for run_id, version in zip(NAMES, (1, 2), strict=False):
        kept = find_kept(dated.output, dated.job.name, DATE, run_id)
        assert kept is not None
        assert kept.version == version


def test_readers_see_the_files_of_one_version_only(dated: Dated) -> None:
    for run_id in NAMES[:2]:
        dated.score(run_id)
    parts = [path for path in dated.files() if path.endswith(".parquet")]
    assert sorted(parts) == sorted(f"{dated.now.folder}/{path}" for path, _ in dated.now.files())
    assert all("-v2.parquet" in path for path in parts)


def test_rolling_back_publishes_the_version_before_as_a_new_one(dated: Dated) -> None:
    dated.score(NAMES[0])
    first = {path: table_of(data) for path, data in dated.files().items() if "part-" in path}
    dated.score(NAMES[1])
    for version, run_id in ((3, NAMES[0]), (4, NAMES[1]), (5, NAMES[0])):  # there and back
        now = roll_back(dated.output, dated.job.name, DATE)
        assert (now.version, now.run_id) == (version, run_id)
        assert dated.verify()["run_id"] == run_id
    again = {path: table_of(data) for path, data in dated.files().items() if "part-" in path}
    assert list(again.values()) == list(first.values())


def test_any_kept_version_can_be_named(dated: Dated) -> None:
    for run_id in NAMES:
        dated.score(run_id)
    assert roll_back(dated.output, dated.job.name, DATE, to=NAMES[0]).run_id == NAMES[0]
    assert dated.verify()["run_id"] == NAMES[0]


def test_without_an_earlier_version_there_is_no_way_back(dated: Dated) -> None:
    with pytest.raises(InputError, match=r"dt=2026-11-20: not published"):
        roll_back(dated.output, dated.job.name, DATE)
    dated.score(NAMES[0])
    with pytest.raises(InputError, match=r"there is only one version"):
        roll_back(dated.output, dated.job.name, DATE)
    dated.score(NAMES[1])
    for wrong in (NAMES[1], "2026-11-20-nonsense", "../../etc"):
        with pytest.raises(InputError, match=rf"no earlier version .*: {NAMES[0]}\."):
            roll_back(dated.output, dated.job.name, DATE, to=wrong)


def test_who_expected_another_version_changes_nothing(dated: Dated) -> None:
    dated.score(NAMES[0])
    expected = dated.now
    dated.score(NAMES[1])
    before = dated.files()
    assert not dated.publish(NAMES[2], expected)
    assert dated.files() == before
    assert dated.verify()["run_id"] == NAMES[1]


def test_a_swap_that_was_cut_short_is_finished_by_whoever_comes_next(
    dated: Dated, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated.score(NAMES[0])
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.versions.settle", lambda *_: None)  # killed right after the swap
        dated.score(NAMES[1])
    settle(dated.output, dated.now)
    assert dated.verify()["run_id"] == NAMES[1]
    settle(dated.output, dated.now)
    assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None
    assert roll_back(dated.output, dated.job.name, DATE).run_id == NAMES[0]


def test_rolling_back_loses_against_a_newer_version(
    dated: Dated, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated.score(NAMES[0])
    dated.score(NAMES[1])
    seen = dated.now
    dated.score(NAMES[2])
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.versions.find_published", lambda *_: seen)
        with pytest.raises(StorageError, match=r"another version was published meanwhile"):
            roll_back(dated.output, dated.job.name, DATE)
    assert dated.verify()["run_id"] == NAMES[2]


def test_a_version_that_has_lost_a_file_is_replaced_and_cannot_be_had_back(
    dated: Dated, caplog: pytest.LogCaptureFixture
) -> None:
    dated.score(NAMES[0])
    dated.output.delete_many([info.path for info in dated.output.list_files("users/_runs")])
    lost = next(path for path in sorted(dated.files()) if path.endswith(".parquet"))
    dated.output.delete(lost)
    assert dated.score(NAMES[1])
    assert f"{lost}: lost, one of 1 such files of version 1" in caplog.text
    assert dated.verify()["run_id"] == NAMES[1]
    assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None
    assert len([path for path in dated.files() if path.endswith(".parquet")]) == len(
        list(dated.now.files())
    )
    with pytest.raises(InputError, match=r"no earlier version .*; expected one of: none"):
        roll_back(dated.output, dated.job.name, DATE)


def test_while_another_versions_files_appear_nobody_says_that_a_date_is_whole(
    dated: Dated, s3_folder: str
) -> None:
    if not dated.output.uri.startswith(s3_folder):
        pytest.skip("on a disk a version appears at once")
    dated.score(NAMES[0])
    dated.output.delete(f"{dated.now.folder}/{SUCCESS}")
    stray = f"{dated.now.folder}/part-00000-0123456789ab-v2.parquet"
    dated.output.create(stray, b"of a run that copies, or has died")
    settle(dated.output, dated.now)
    assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is None
    collect(dated.output, garbage(dated))
    assert dated.output.info(stray) is None
    assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None


def copied_by_one_that_died(dated: Dated, version: int) -> str:
    """A part that a run copied which meant to publish that version, and took `_SUCCESS` away."""
    suffix = f"-v{version}" if version > 1 else ""
    path = f"{dated.now.folder}/part-00000-0123456789ab{suffix}.parquet"
    dated.output.create(path, b"its manifest never came")
    dated.output.delete(f"{dated.now.folder}/{SUCCESS}")
    return path


class TestAfterADeadCopier:
    """Of a bucket: on a disk a version appears at once."""

    @pytest.fixture(autouse=True)
    def _published(self, dated: Dated, s3_folder: str) -> None:
        if not dated.output.uri.startswith(s3_folder):
            pytest.skip("on a disk a version appears at once")
        dated.score(NAMES[0])

    def test_the_next_version_removes_what_it_copied(self, dated: Dated) -> None:
        stray = copied_by_one_that_died(dated, 2)
        assert dated.score(NAMES[1])
        assert dated.output.info(stray) is None
        assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None
        assert dated.verify()["run_id"] == NAMES[1]

    def test_so_does_going_back(self, dated: Dated) -> None:
        dated.score(NAMES[1])
        stray = copied_by_one_that_died(dated, 3)
        roll_back(dated.output, dated.job.name, DATE)
        assert dated.output.info(stray) is None
        assert dated.verify()["run_id"] == NAMES[0]

    def test_what_is_of_an_earlier_version_goes_whenever_somebody_looks(self, dated: Dated) -> None:
        dated.score(NAMES[1])
        before = dated.files().keys()
        strays = [copied_by_one_that_died(dated, version) for version in (1, 2)]
        settle(dated.output, dated.now)
        assert not dated.files().keys() & set(strays)
        reports = {f"{dated.now.folder}/{name}" for name in (REPORT_JSON, REPORT_HTML)}
        assert dated.files().keys() == before - reports  # written again by whoever published

    def test_what_may_be_of_the_next_version_stays_and_is_told(
        self, dated: Dated, caplog: pytest.LogCaptureFixture
    ) -> None:
        stray = copied_by_one_that_died(dated, 2)
        settle(dated.output, dated.now)
        assert dated.output.info(stray) is not None
        assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is None
        assert (
            f"no {SUCCESS} yet, as `{stray.rpartition('/')[2]}` is not of version 1" in caplog.text
        )

    def test_what_a_loser_copies_meanwhile_goes_before_the_date_is_said_to_be_whole(
        self, dated: Dated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = copied_by_one_that_died(dated, 1)
        delete_many = type(dated.output).delete_many

        def one_more(output: Storage, paths: Sequence[str]) -> None:
            delete_many(output, paths)
            if first in paths:
                output.create(first.replace("00000", "00001"), b"copied by one that is at work")

        monkeypatch.setattr(type(dated.output), "delete_many", one_more)
        settle(dated.output, dated.now)
        assert dated.verify()["run_id"] == NAMES[0]
        assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None

    def test_a_note_of_a_colleague_is_in_nobodys_way(self, dated: Dated) -> None:
        note = f"{dated.now.folder}/NOTES.md"
        dated.output.create(note, b"looked at by Ann, fine")
        dated.score(NAMES[1])
        assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None
        roll_back(dated.output, dated.job.name, DATE)
        assert dated.output.info(f"{dated.now.folder}/{SUCCESS}") is not None
        assert dated.output.read(note) == b"looked at by Ann, fine"


@pytest.mark.parametrize("name", NAMES[:2])
def test_every_published_part_has_a_name_of_its_version(dated: Dated, name: str) -> None:
    for run_id in dict.fromkeys((NAMES[0], name)):
        dated.score(run_id)
    paths = [path for path, _ in dated.now.files()]
    assert {path.partition("/")[0] for path in paths} > {"_quarantine"}
    assert {version_of(path) for path in paths} == {dated.now.version}


@pytest.mark.parametrize(
    "path",
    [
        "NOTES.md",
        "part-00000-spark.snappy.parquet",
        "part-00000-0b0ad0a5-6ad5-4b43-9a2f-2a3c5e9bd1c1-c000.snappy.parquet",
        "sub/part-00000-0123456789ab.parquet",
        "part-00000-0123456789ab-v.parquet",
        "quarantine-00000-0123456789ab.parquet",
    ],
)
def test_other_names_are_of_no_version(path: str) -> None:
    assert version_of(path) is None


def table_of(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


class TestRequeue:
    """Rows in quarantine, tried again."""

    def test_where_nothing_is_published_their_shards_are_scored_again(self, dated: Dated) -> None:
        plan = a_plan(dated.job)
        ledger = Ledger(dated.output, dated.job.name, NAMES[0])
        tools = scoring_tools(dated.job, plan, SumRunner(), ledger=ledger)
        with ShardScoring(plan.shards, tools) as scoring:
            list(scoring)
        requeue(ledger, plan, ONE_ENGINE, None, dated.output)
        assert sorted(ledger.records()) == [1, 3, 4]  # rows 5 and 50 were in shards 0 and 2
        assert dated.score(NAMES[0])
        assert dated.verify()["quarantined"] == 2

    def test_a_published_dates_new_version_takes_over_all_other_shards(self, dated: Dated) -> None:
        dated.score(NAMES[0])
        before = dated.now
        ledger = Ledger(dated.output, dated.job.name, NAMES[1])
        pin = dataclasses.replace(ONE_ENGINE, engine=before.engine_key)
        requeue(ledger, a_plan(dated.job), pin, before, dated.output)
        assert sorted(ledger.records()) == [1, 3, 4]
        assert dated.score(NAMES[1])
        assert dated.verify()["rows"] == 100

    def test_what_a_new_version_that_a_guard_stopped_has_in_quarantine_is_tried_again(
        self, dated: Dated
    ) -> None:
        dated.score(NAMES[0])
        before, plan = dated.now, a_plan(dated.job)
        ledger = Ledger(dated.output, dated.job.name, NAMES[1])
        tools = scoring_tools(dated.job, plan, SumRunner(), ledger=ledger)
        with ShardScoring(plan.shards, tools) as scoring:
            list(scoring)
        requeue(ledger, plan, ONE_ENGINE, before, dated.output)
        assert sorted(ledger.records()) == [1, 3, 4]

    def test_scores_of_another_engine_are_not_taken_over(self, dated: Dated) -> None:
        dated.score(NAMES[0])
        ledger = Ledger(dated.output, dated.job.name, NAMES[1])
        requeue(ledger, a_plan(dated.job), ONE_ENGINE, dated.now, dated.output)
        assert ledger.records() == {}

    def test_of_a_version_of_several_engines_those_rows_stay_that_may(self, dated: Dated) -> None:
        engines = {1: "one", 3: "other", 4: "one"}
        dated.score(NAMES[0])
        before = dated.now
        for part in before.manifest["parts"]:
            part["engine"] = engines.get(part["shard"], "one")
        before.manifest["report"]["engine"]["common"] = "question"
        for info in dated.output.list_files(f"{dated.job.name}/_runs/{NAMES[0]}/commits"):
            dated.output.delete(info.path)  # as if its ledger were gone
        taken = []
        for has_several, common in ((False, "question"), (True, "question"), (True, "else")):
            pin = EnginePin(engine="one", common=common, has_several=has_several)
            ledger = Ledger(dated.output, dated.job.name, f"{NAMES[1]}{len(taken)}")
            requeue(ledger, a_plan(dated.job), pin, before, dated.output)
            records = ledger.records().values()
            taken.append({record.shard: record.engine for record in records})
        assert taken == [{1: "one", 4: "one"}, engines, {1: "one", 4: "one"}]


ALL = GcRules(before=float("inf"), keep_versions=1, unfinished=False)


def garbage(dated: Dated, **changes: Any) -> Garbage:
    return find_garbage(dated.output, dated.job.name, dataclasses.replace(ALL, **changes))


def reasons(found: Garbage) -> dict[str, int]:
    return {why: entry["num_files"] for why, entry in summary(found)["by_reason"].items()}


class TestGarbage:
    """What nobody needs goes, and nothing else."""

    def test_a_published_run_stands_by_itself(self, dated: Dated) -> None:
        dated.score(NAMES[0])
        before = dated.files()
        found = garbage(dated)
        assert list(reasons(found)) == ["ledgers of published runs"]
        collect(dated.output, found)
        assert dated.files() == before
        assert dated.output.list_files(f"{dated.job.name}/_runs") == []
        assert reasons(garbage(dated)) == {}
        dated.score(NAMES[1])  # the version that is replaced is kept, although its ledger is gone
        assert roll_back(dated.output, dated.job.name, DATE).run_id == NAMES[0]
        assert dated.verify()["rows"] == 100

    def test_what_is_young_stays(self, dated: Dated) -> None:
        dated.score(NAMES[0])
        assert garbage(dated, before=time.time() - 3600) == Garbage(files=(), uploads=())

    def test_the_last_replaced_version_is_kept_and_older_ones_go(self, dated: Dated) -> None:
        for run_id in NAMES:
            dated.score(run_id)
        collect(dated.output, garbage(dated))
        assert kept_versions(dated.output, dated.job.name, DATE, besides="") == [NAMES[1]]
        assert roll_back(dated.output, dated.job.name, DATE).run_id == NAMES[1]
        collect(dated.output, garbage(dated, keep_versions=0))
        assert kept_versions(dated.output, dated.job.name, DATE, besides="") == []
        assert dated.verify()["run_id"] == NAMES[1]

    def test_of_an_unfinished_run_only_orphans_go(self, dated: Dated) -> None:
        plan = a_plan(dated.job)
        ledger = Ledger(dated.output, dated.job.name, NAMES[0])
        tools = scoring_tools(dated.job, plan, SumRunner(), ledger=ledger)
        with ShardScoring(plan.shards[:2], tools) as scoring:
            list(scoring)
        dated.output.create(f"{ledger.folder}/parts/part-00002-dead.parquet", b"never committed")
        found = garbage(dated)
        assert [(info.path.rpartition("/")[2], why) for info, why in found.files] == [
            ("part-00002-dead.parquet", "parts that no record names")
        ]
        collect(dated.output, found)
        assert dated.score(NAMES[0])
        assert dated.verify()["rows"] == 100

    def test_an_unfinished_run_goes_when_it_is_asked_for(self, dated: Dated) -> None:
        dated.output.create(f"{dated.job.name}/_runs/{NAMES[0]}/run.json", b"{}")
        assert reasons(garbage(dated)) == {}
        assert reasons(garbage(dated, unfinished=True)) == {"runs that were never published": 1}

    def test_a_run_that_another_one_overtook_goes(self, dated: Dated) -> None:
        dated.output.create(f"{dated.job.name}/_runs/{NAMES[1]}/run.json", b"{}")
        dated.score(NAMES[0])
        assert reasons(garbage(dated))["runs of dates that another run published"] == 1

    def test_leftovers_of_processes_that_died_go(self, dated: Dated) -> None:
        name = dated.job.name
        dated.score(NAMES[0])
        for path in ("_runs/_probe-1", "_publishing-1/part", "_publishing-1/.x.1.tmp"):
            dated.output.create(f"{name}/{path}", b"x")
        lost = "part-00000-0123456789ab.parquet"
        dated.output.create(f"{name}/dt={DATE}/{lost}", b"of a version that lost")
        dated.output.create(f"{name}/dt={DATE}/NOTES.md", b"of a colleague")
        assert reasons(garbage(dated)) | {"ledgers of published runs": 0} == {
            "ledgers of published runs": 0,
            "temporary files and folders": 3,
            "files in published folders that no manifest names": 1,
        }
        collect(dated.output, garbage(dated))
        assert f"{name}/dt={DATE}/NOTES.md" in dated.files()
        assert dated.verify()["rows"] == 100

    def test_records_go_before_the_parts_that_they_name(
        self, dated: Dated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dated.score(NAMES[0])
        calls: list[list[str]] = []
        found = garbage(dated)
        monkeypatch.setattr(type(dated.output), "delete_many", lambda _, paths: calls.append(paths))
        collect(dated.output, found)
        assert all("/commits/" in path for path in calls[0])
        assert not any("/commits/" in path for path in calls[1])

    def test_it_is_told_how_many_bytes_come_back(self, dated: Dated) -> None:
        def inodes() -> dict[int, int]:
            paths = Path(dated.output.uri).rglob("*")
            return {path.stat().st_ino: path.stat().st_size for path in paths if path.is_file()}

        if dated.output.uri.startswith("s3://"):
            pytest.skip("an object has one name")
        for name in NAMES:
            dated.score(name)
        for keep_versions in (9, 0):
            before, found = inodes(), garbage(dated, keep_versions=keep_versions)
            collect(dated.output, found)
            gone = before.keys() - inodes().keys()
            assert summary(found)["num_bytes"] == sum(before[inode] for inode in gone) > 0


def test_a_folder_that_is_being_published_is_left_alone(dated: Dated) -> None:
    path = f"{dated.job.name}/dt={DATE}/part-00000-x.parquet"
    dated.output.create(path, b"its manifest comes last")
    assert reasons(garbage(dated)) == {}


def test_replacing_never_uses_a_name_twice(dated: Dated) -> None:
    dated.score(NAMES[0])
    names: set[str] = set()
    for _ in range(3):
        now = dated.now
        found = {path for path, _ in now.files()}
        assert not names & found
        names |= found
        files = {path: f"{now.folder}/{path}" for path in found}
        assert replace(dated.output, now, now.manifest, files)
    dated.verify()
