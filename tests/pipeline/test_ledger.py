"""The ledger: what is committed counts once, whoever commits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.footers import PinnedFile
from pipeline.lane_messages import PoisonRow
from pipeline.ledger import Attempt, AttemptEnd, Ledger
from pipeline.local_storage import LocalStorage
from pipeline.part import ShardParts
from pipeline.plan import Shard

FILE = PinnedFile(path="a.parquet", num_bytes=1, version="v", footer_sha256="f", num_rows=99)


def shard(index: int) -> Shard:
    return Shard(index=index, file=FILE, row_groups=(index,), first_row=10 * index, num_rows=10)


def parts(content: bytes = b"part", *, bad: bool = False) -> ShardParts:
    return ShardParts(
        part=content,
        quarantine=b"bad " + content if bad else None,
        num_scored=9 if bad else 10,
        num_quarantined=int(bad),
        reasons={"empty": 1} if bad else {},
    )


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


@pytest.fixture
def ledger(storage: LocalStorage) -> Ledger:
    return Ledger(storage, "job", "run-1")


def stored_parts(storage: LocalStorage) -> set[str]:
    return {info.path for info in storage.list_files("job/_runs/run-1/parts")}


def test_an_empty_ledger_has_no_records(ledger: Ledger) -> None:
    assert ledger.records() == {}
    assert ledger.attempts() == []


def test_a_record_reads_back_as_it_was_written(ledger: Ledger, storage: LocalStorage) -> None:
    written = [ledger.commit(shard(index), parts(bad=index == 1), "me") for index in range(3)]
    assert ledger.records() == dict(enumerate(written))
    assert written[1].quarantine is not None
    assert storage.read(ledger.part_path(written[1].part)) == b"part"
    assert storage.read(ledger.part_path(written[1].quarantine)) == b"bad part"
    assert written[1].part.num_rows == 9
    assert (written[1].owner, written[1].first_row, written[1].row_groups) == ("me", 10, (1,))


def test_the_second_commit_of_a_shard_loses_and_leaves_no_orphan(
    ledger: Ledger, storage: LocalStorage
) -> None:
    first = ledger.commit(shard(0), parts(b"first", bad=True), "a")
    second = ledger.commit(shard(0), parts(b"second", bad=True), "b")
    assert second == first
    assert first.quarantine is not None
    assert stored_parts(storage) == {
        ledger.part_path(first.part),
        ledger.part_path(first.quarantine),
    }


def test_of_many_commits_at_once_one_wins_and_all_agree(
    ledger: Ledger, storage: LocalStorage
) -> None:
    for index in range(5):
        start = threading.Barrier(8)

        def commit(owner: int, index: int = index, start: threading.Barrier = start) -> object:
            start.wait(10)
            return ledger.commit(shard(index), parts(b"%d" % owner), str(owner))

        with ThreadPoolExecutor(8) as pool:
            records = list(pool.map(commit, range(8)))
        assert len({repr(record) for record in records}) == 1
    records = ledger.records()
    assert stored_parts(storage) == {ledger.part_path(r.part) for r in records.values()}


def test_parts_without_a_record_do_not_count(ledger: Ledger, storage: LocalStorage) -> None:
    storage.create("job/_runs/run-1/parts/part-00007-dead.parquet", b"orphan")
    storage.create("job/_runs/run-1/commits/.00007.json.abc.tmp", b"{half")
    assert ledger.records() == {}


def test_runs_do_not_see_each_other(ledger: Ledger, storage: LocalStorage) -> None:
    ledger.commit(shard(0), parts(), "me")
    assert Ledger(storage, "job", "run-2").records() == {}
    assert Ledger(storage, "other", "run-1").records() == {}


def test_attempts_are_listed_oldest_first(ledger: Ledger) -> None:
    for day in (3, 1, 2):
        attempt = Attempt(id=str(day), started_at=f"2026-11-0{day}", host="h", pid=day)
        ledger.open({"run_id": "run-1"}, attempt)
    assert [attempt.pid for attempt in ledger.attempts()] == [1, 2, 3]


def record_files(storage: LocalStorage) -> list[str]:
    return [info.path for info in storage.list_files("job/_runs/run-1/commits")]


def overwrite(storage: LocalStorage, path: str, data: bytes) -> None:
    (Path(storage.uri) / path).write_bytes(data)


def test_any_flipped_byte_of_a_record_is_noticed(ledger: Ledger, storage: LocalStorage) -> None:
    record = ledger.commit(shard(0), parts(bad=True), "me")
    (path,) = record_files(storage)
    data = storage.read(path)
    assert data is not None
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        overwrite(storage, path, bytes(flipped))
        assert ledger.records() == {}, position
        assert ledger.record_of(shard(0)) is None
    overwrite(storage, path, data)
    assert ledger.records() == {0: record}


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"7", b"{}", b'"text"', b"\xff\xfe"])
def test_a_shard_whose_record_is_damaged_is_committed_again_and_nothing_is_replaced(
    ledger: Ledger, storage: LocalStorage, damaged: bytes
) -> None:
    ledger.commit(shard(0), parts(b"lost"), "a")
    (path,) = record_files(storage)
    overwrite(storage, path, damaged)
    assert ledger.sound_records() == {}
    again = ledger.commit(shard(0), parts(b"again"), "b")
    assert ledger.record_of(shard(0)) == again
    assert ledger.sound_records() == ledger.records() == {0: again}
    assert storage.read(path) == damaged
    assert ledger.commit(shard(0), parts(b"late"), "c") == again


@pytest.mark.parametrize("which", ["part", "quarantine"])
@pytest.mark.parametrize("how", ["cut off", "gone"])
def test_a_record_whose_parts_are_not_whole_makes_nothing_count(
    ledger: Ledger,
    storage: LocalStorage,
    caplog: pytest.LogCaptureFixture,
    which: str,
    how: str,
) -> None:
    first = ledger.commit(shard(0), parts(bad=True), "a")
    other = ledger.commit(shard(1), parts(), "a")
    path = ledger.part_path(getattr(first, which))
    if how == "gone":
        storage.delete(path)
    else:
        overwrite(storage, path, b"p")
    assert ledger.sound_records() == {1: other}
    assert ledger.record_of(shard(0)) is None
    assert ledger.record_of(shard(1)) == other
    assert f"{path}: {0 if how == 'gone' else 1} of" in caplog.text
    again = ledger.commit(shard(0), parts(bad=True), "b")
    assert ledger.sound_records() == {0: again, 1: other}


def test_of_many_commits_over_a_damaged_record_one_wins_and_all_agree(
    ledger: Ledger, storage: LocalStorage
) -> None:
    ledger.commit(shard(0), parts(b"lost"), "a")
    overwrite(storage, record_files(storage)[0], b"")
    start = threading.Barrier(8)

    def commit(owner: int) -> object:
        start.wait(10)
        return ledger.commit(shard(0), parts(b"%d" % owner), str(owner))

    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(commit, range(8)))
    assert len({repr(record) for record in records}) == 1
    assert ledger.sound_records() == {0: records[0]}


def test_a_shard_without_a_record_has_none(ledger: Ledger) -> None:
    assert ledger.record_of(shard(0)) is None
    record = ledger.commit(shard(0), parts(), "me")
    assert ledger.record_of(shard(0)) == record
    assert ledger.record_of(shard(1)) is None


DAMAGES = (b"", b"{", b'{"id": "a"}', b"[]", b"\xff\x00", b"null")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_note_that_is_damaged_is_left_out_with_a_warning(
    ledger: Ledger, storage: LocalStorage, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    whole = Attempt(id="whole", started_at="2026-11-20T02:00:00+00:00", host="here", pid=1)
    ledger.open({}, whole)
    end = AttemptEnd(ended_at="2026-11-20T02:00:01+00:00", why="Stop", rows_begun=3)
    ledger.end(whole, end)
    row = PoisonRow(shard=1, row=2, reason="crashed", message="signal 11")
    ledger.note_poison(row)
    for path in ("attempts/other.json", "attempts/other.end.json", "poison/00001-00000003.json"):
        storage.create(f"{ledger.folder}/{path}", damage)
    assert ledger.attempts() == [whole]
    assert ledger.num_attempts() == 2
    assert ledger.ends() == {"whole": end}
    assert ledger.poison() == (row,)
    assert len(caplog.records) == 3
    assert all("damaged; it is left out" in record.message for record in caplog.records)


def test_what_is_removed_while_it_is_read_is_left_out(storage: LocalStorage) -> None:
    """As by `score requeue` of the same date elsewhere."""

    class Shared(LocalStorage):
        def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
            for path in paths:
                if "00001" in path:
                    storage.delete(path)
            return super().read_many(paths)

    ledger = Ledger(Shared(storage.uri), "job", "run-1")
    for index in range(3):
        ledger.commit(shard(index), parts(b"%d" % index, bad=True), "me")
        ledger.note_poison(PoisonRow(shard=index, row=5, reason="crashed", message="SIGSEGV"))
    assert sorted(ledger.records()) == [0, 2]
    assert [row.shard for row in ledger.poison()] == [0, 2]
