"""A bucket that fails: what passes is repeated, what lasts ends in time, and nothing is lost.

A real store behind a proxy that makes faults.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

from pipeline.errors import (
    ConfigError,
    InputChangedError,
    StorageError,
    StoreRefusedError,
    StoreUnavailableError,
)
from pipeline.footers import read_footers
from pipeline.object_storage import DEADLINE_VARIABLE, ObjectStorage
from pipeline.patient_s3 import PatientS3, is_passing, is_refusal
from pipeline.storage import MANIFEST, SUCCESS, Storage, open_storage, probe
from pipeline.store_errors import refused
from tests.s3_fault_proxy import ALWAYS, Fault, FaultProxy

DEADLINE_S = 1.5
CONTENT = b"content of some length"
ACCESS_POINT = "arn:aws:s3:us-west-2:123456789012:accesspoint/nights"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEADLINE_VARIABLE, str(DEADLINE_S))


@pytest.fixture
def storage(s3_proxy: FaultProxy, s3_folder: str) -> Storage:
    """It has answered before, so that its deadline is the usual one."""
    storage = open_storage(s3_folder)
    s3_proxy.log.clear()
    storage.create("there", CONTENT)
    return storage


READ_FAULTS = ["500", "503", "429", "slowdown", "reset_before", "truncated", "flipped", "slow"]
WRITE_FAULTS = [
    *("500", "503", "429", "slowdown", "409"),
    *("reset_before", "reset_after", "500_after", "slow"),
]


def times_of(kind: str) -> int:
    return 1 if kind == "slow" else 3  # which is no failure


@pytest.mark.parametrize("kind", READ_FAULTS)
def test_a_fault_that_passes_is_not_noticed_by_a_reader(
    s3_proxy: FaultProxy, storage: Storage, kind: str
) -> None:
    s3_proxy.faults = [Fault(kind=kind, method="GET", match="/there", times=times_of(kind))]
    assert storage.read("there") == CONTENT
    assert s3_proxy.faults[0].fired == times_of(kind)


@pytest.mark.parametrize("kind", WRITE_FAULTS)
def test_a_fault_that_passes_is_not_noticed_by_a_writer(
    s3_proxy: FaultProxy, storage: Storage, kind: str
) -> None:
    s3_proxy.faults = [Fault(kind=kind, method="PUT", match="/new", times=times_of(kind))]
    assert storage.create("new", b"ours")  # also where the store has applied it unheard
    assert not storage.create("new", b"another's")
    assert storage.read("new") == b"ours"


@pytest.mark.parametrize("kind", [*WRITE_FAULTS, "200_error"])
def test_a_fault_that_passes_does_not_stop_a_publication(
    s3_proxy: FaultProxy, storage: Storage, kind: str
) -> None:
    kind = "500" if kind == "409" else kind  # a copy has no condition
    s3_proxy.faults = [Fault(kind=kind, method="PUT", match="dt=1/part")]
    assert storage.publish({"part.parquet": "there"}, b"{}", "dt=1")
    assert s3_proxy.faults[0].fired == 1
    assert storage.read("dt=1/part.parquet") == CONTENT
    assert (storage.read(f"dt=1/{MANIFEST}"), storage.read(f"dt=1/{SUCCESS}")) == (b"{}", b"")


CALLS: dict[str, Callable[[Storage], Any]] = {
    "read": lambda storage: storage.read("there"),
    "read_many": lambda storage: storage.read_many(["there"]),
    "info": lambda storage: storage.info("there"),
    "open": lambda storage: storage.open("there").read(),
    "list": lambda storage: storage.list_files(""),
    "create": lambda storage: storage.create("new", b"ours"),
    "delete": lambda storage: storage.delete("nothing"),
    "publish": lambda storage: storage.publish({"part": "there"}, b"{}", "dt=1"),
}


@pytest.mark.parametrize(
    ("kind", "call"),
    [*(("500", call) for call in CALLS), ("reset_before", "read"), ("reset_before", "create")],
)
@pytest.mark.usefixtures("impatient")
def test_a_fault_that_lasts_ends_with_the_deadline(
    s3_proxy: FaultProxy, storage: Storage, kind: str, call: str
) -> None:
    s3_proxy.faults = [Fault(kind=kind, times=ALWAYS)]
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="the same command goes on"):
        CALLS[call](storage)
    assert DEADLINE_S - 1 < time.monotonic() - began < DEADLINE_S + 10  # and not after 60 s
    s3_proxy.faults = []
    CALLS[call](storage)
    assert storage.read("there") == CONTENT


@pytest.mark.parametrize("kind", ["503", "slowdown", "429", "truncated", "flipped"])
@pytest.mark.usefixtures("impatient")
def test_a_read_that_always_fails_ends_with_the_deadline(
    s3_proxy: FaultProxy, storage: Storage, kind: str
) -> None:
    s3_proxy.faults = [Fault(kind=kind, method="GET", times=ALWAYS)]
    with pytest.raises(StoreUnavailableError, match="/there: "):
        storage.read("there")
    assert s3_proxy.faults[0].fired > 3


@pytest.mark.usefixtures("impatient")
def test_writes_that_fail_while_reads_go_through_are_given_up(
    s3_proxy: FaultProxy, storage: Storage
) -> None:
    s3_proxy.faults = [Fault(kind="500", method="PUT", times=ALWAYS)]
    with pytest.raises(StoreUnavailableError, match="new: injected; expected"):
        storage.create("new", b"ours")


@pytest.mark.usefixtures("impatient")
def test_a_conflict_that_does_not_end_is_given_up(s3_proxy: FaultProxy, storage: Storage) -> None:
    s3_proxy.faults = [Fault(kind="409", method="PUT", times=ALWAYS)]
    with pytest.raises(StoreUnavailableError, match="injected"):
        storage.create("new", b"ours")
    assert s3_proxy.num_requests("PUT", "/new") > 3


@pytest.mark.parametrize("call", ["read", "list", "create", "publish"])
def test_what_is_forbidden_is_asked_for_once(
    s3_proxy: FaultProxy, storage: Storage, call: str
) -> None:
    s3_proxy.faults = [Fault(kind="403", times=ALWAYS)]
    s3_proxy.log.clear()
    with pytest.raises(StoreRefusedError, match="expected access to it"):
        CALLS[call](storage)
    assert len(s3_proxy.log) == 1


@pytest.mark.usefixtures("s3_proxy")
def test_a_bucket_that_is_not_there_is_named_at_once() -> None:
    storage = open_storage("s3://no-such-bucket/x")
    began = time.monotonic()
    with pytest.raises(StoreRefusedError, match="no-such-bucket"):
        storage.list_files("")
    assert time.monotonic() - began < 10  # no deadline is waited for


@pytest.mark.parametrize("code", ["InvalidToken", "ExpiredToken", "TokenRefreshRequired"])
def test_a_session_token_that_is_not_taken_is_a_refusal_that_names_it(code: str) -> None:
    reply = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    error = translate_boto_error(ClientError(reply, "ListObjectsV2"))
    assert (is_refusal(error), is_passing(error)) == (True, False)
    assert "AWS_SESSION_TOKEN" in str(refused("s3://night/x", error))


def test_a_store_without_conditional_writes_is_refused(
    s3_proxy: FaultProxy, storage: Storage
) -> None:
    s3_proxy.faults = [Fault(kind="overwrites", method="PUT", times=ALWAYS)]
    with pytest.raises(StorageError, match="does not honour create-if-absent"):
        probe(storage, "job")


def test_large_objects_go_in_parts_and_survive_faults_too(
    s3_proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:

    defaults = (5 << 20, None, "overwrite")  # chunks of 5 MiB, the smallest of S3, not of 50
    monkeypatch.setattr(S3FileSystem._pipe_file, "__defaults__", defaults)
    large = os.urandom(1 << 20) * 11
    s3_proxy.faults = [
        Fault(kind="500", method="PUT", match="partNumber=2"),
        Fault(kind="reset_after", method="PUT", match="partNumber=1"),
        Fault(kind="200_error", method="POST", match="uploadId="),
    ]
    assert storage.create("large", large)
    assert [fault.fired for fault in s3_proxy.faults] == [1, 1, 1]
    assert storage.read("large") == large
    assert not storage.create("large", large[:-1])


def test_a_wrong_deadline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEADLINE_VARIABLE, "a minute")
    with pytest.raises(ConfigError, match="NIGHTSCORE_STORE_DEADLINE_S: 'a minute'; expected sec"):
        open_storage("s3://bucket/x")


def test_an_address_that_is_none_and_missing_credentials_are_named_at_once(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    with pytest.raises(StoreRefusedError, match="no address"):
        open_storage(s3_folder).read("x")


@pytest.mark.parametrize(
    ("call", "asked"),
    [
        ("read", ["GET"]),
        ("info", ["HEAD"]),
        ("list", ["GET"]),
        ("create", ["PUT"]),
        ("missing", ["GET"]),
        ("no folder", ["GET"]),
        ("no info", ["HEAD"]),
    ],
)
def test_it_takes_one_request(
    s3_proxy: FaultProxy, storage: Storage, call: str, asked: list[str]
) -> None:
    calls = CALLS | {
        "missing": lambda storage: storage.read("missing"),
        "no folder": lambda storage: storage.list_folders("missing"),
        "no info": lambda storage: storage.info("missing"),
    }
    s3_proxy.log.clear()
    calls[call](storage)
    assert [method for method, *_ in s3_proxy.log] == asked


def test_an_upload_that_nobody_completed_is_asked_for_until_the_store_answers(
    s3_proxy: FaultProxy, storage: Storage
) -> None:
    s3_proxy.faults = [Fault(kind="500", times=3)]
    assert storage.unfinished_uploads("") == []
    assert s3_proxy.faults[0].fired == 3


def forget(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the store did not know an option of its requests."""
    call_s3 = PatientS3._call_s3

    async def careless(self: PatientS3, method: str, *arguments: Any, **options: Any) -> Any:
        options.pop(option, None)
        return await call_s3(self, method, *arguments, **options)

    monkeypatch.setattr(PatientS3, "_call_s3", careless)


def test_a_store_that_does_not_look_at_conditions_gives_no_other_version_either(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget("IfMatch", monkeypatch)
    storage = open_storage(s3_folder)
    storage.create("file", b"one")
    (listed,) = storage.list_files("")
    storage.delete("file")
    storage.create("file", b"two")
    with (
        storage.open("file", listed) as file,
        pytest.raises(InputChangedError, match="another version"),
    ):
        file.read()


def test_an_object_that_is_written_again_after_it_was_listed_stops_the_plan(s3_folder: str) -> None:
    storage = open_storage(s3_folder)
    storage.create("a.parquet", b"x" * 100)
    listed = storage.list_files("")
    storage.delete("a.parquet")
    with pytest.raises(InputChangedError, match=r"gone, or another version.*Run again"):
        read_footers(storage, listed)
    storage.create("a.parquet", b"y" * 100)
    with pytest.raises(InputChangedError, match=r"gone, or another version.*Run again"):
        read_footers(storage, listed)


def test_a_store_that_answers_with_other_bytes_than_were_asked_for_is_not_believed(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(s3_folder)
    storage.create("file", CONTENT)
    forget("Range", monkeypatch)
    with storage.open("file") as file:
        file.seek(4)
        with pytest.raises(OSError, match="22 bytes instead of 18"):
            file.read()


@pytest.mark.parametrize("root", ["s3://bucket", "s3://bucket/a/b", f"s3://{ACCESS_POINT}/a"])
def test_an_address_is_a_bucket_and_a_key(root: str) -> None:
    storage = ObjectStorage(root)
    bucket, key = storage._place("dt=1/x?versionId=3")
    assert bucket == (ACCESS_POINT if ACCESS_POINT in root else "bucket")
    assert f"s3://{bucket}/{key}" == f"{root}/dt=1/x?versionId=3"
    assert storage._path_of(key) == "dt=1/x?versionId=3"
    listed = storage._folder("")
    assert f"s3://{listed['Bucket']}/{listed['Prefix']}" == f"{root}/"
