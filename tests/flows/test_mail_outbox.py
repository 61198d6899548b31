"""Of all who want to send a mail one does; a claim that nobody holds any more is taken over."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.mailing.outbox import FOLDER, LEASE_S, Outbox
from pipeline.errors import MailError
from pipeline.gc import GcRules, find_garbage
from pipeline.process_start import process_name
from pipeline.storage import open_storage


def an_outbox(root: Path) -> Outbox:
    return Outbox(open_storage(str(root)), "users", "2026-11-20-published-1")


def expire(root: Path, claim: str) -> None:
    long_ago = time.time() - LEASE_S - 1
    os.utime(root / claim, (long_ago, long_ago))


def test_a_mail_is_claimed_once(tmp_path: Path) -> None:
    an_outbox(tmp_path).claim()
    with pytest.raises(MailError, match=rf"process {os.getpid()} on \S+ is sending this mail"):
        an_outbox(tmp_path).claim()


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_claim_is_one_all_the_same(tmp_path: Path, note: bytes) -> None:
    claim = tmp_path / an_outbox(tmp_path).claim()
    claim.chmod(0o644)
    claim.write_bytes(note)
    with pytest.raises(MailError, match="somebody is sending this mail; expected nobody"):
        an_outbox(tmp_path).claim()


def owned_by(claim: Path, **owner: object) -> None:
    """Let it be the claim of another process."""
    claim.chmod(0o644)
    claim.write_text(json.dumps({**json.loads(claim.read_text()), **owner}))


def test_a_process_of_this_machine_that_has_ended_holds_no_claim(tmp_path: Path) -> None:
    ended = subprocess.Popen(["sleep", "60"])
    name = process_name(ended.pid)
    ended.kill()
    ended.wait()
    claim = tmp_path / an_outbox(tmp_path).claim()
    owned_by(claim, pid=ended.pid, process=name)
    assert an_outbox(tmp_path).claim().endswith("claim-001.json")


def test_one_of_another_machine_is_waited_for_until_a_moment_that_is_said(tmp_path: Path) -> None:
    claim = tmp_path / an_outbox(tmp_path).claim()
    owned_by(claim, host="elsewhere", process="no-boot/1/1")
    end = datetime.datetime.fromtimestamp(claim.stat().st_mtime + LEASE_S, datetime.UTC)
    with pytest.raises(MailError, match=rf"on elsewhere .* again after {end:%H:%M:%S} UTC"):
        an_outbox(tmp_path).claim()


def test_of_many_who_claim_at_once_one_does(tmp_path: Path) -> None:
    def try_it(_: int) -> bool:
        try:
            an_outbox(tmp_path).claim()
        except MailError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_it, range(32))) == 1


def test_a_claim_that_is_given_back_is_free(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path)
    claim = outbox.claim()
    outbox.release(claim)
    assert an_outbox(tmp_path).claim() == claim


def test_a_claim_whose_owner_died_is_taken_over_by_one(tmp_path: Path) -> None:
    expire(tmp_path, an_outbox(tmp_path).claim())
    assert an_outbox(tmp_path).claim().endswith("claim-001.json")
    with pytest.raises(MailError, match="is sending this mail"):
        an_outbox(tmp_path).claim()


def test_what_is_sent_is_known_to_others_with_who_was_refused(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path)
    to = ["a@example.com", "b@example.com"]
    assert outbox.waiting(to) == tuple(to)
    outbox.note_sent("<1@example.com>", to, {"b@example.com": "no"})
    assert an_outbox(tmp_path).waiting(to) == ("b@example.com",)
    (note,) = tmp_path.glob(f"users/{FOLDER}/*/sent.json")
    assert json.loads(note.read_text())["refused"] == {"b@example.com": "no"}


def test_an_address_that_is_corrected_after_a_refusal_waits(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path)
    outbox.note_sent("<1@x.com>", ["a@x.com", "wrong@x.com"], {"wrong@x.com": "unknown"})
    assert outbox.waiting(["a@x.com", "right@x.com"]) == ("right@x.com",)
    outbox.note_sent("<1@x.com>", ["right@x.com"], {})
    assert outbox.waiting(["a@x.com", "right@x.com"]) == ()


def test_an_address_that_is_new_gets_no_old_mail(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path)
    outbox.note_sent("<1@x.com>", ["a@x.com", "b@x.com"], {"b@x.com": "later"})
    outbox.note_sent("<1@x.com>", ["b@x.com"], {})
    assert outbox.waiting(["a@x.com", "b@x.com", "new@x.com"]) == ()


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_note_is_one_all_the_same(tmp_path: Path, note: bytes) -> None:
    an_outbox(tmp_path).note_sent("<1@x.com>", ["a@x.com"], {})
    (path,) = tmp_path.glob(f"users/{FOLDER}/*/sent.json")
    path.chmod(0o644)
    path.write_bytes(note)
    assert an_outbox(tmp_path).waiting(["a@x.com"]) == ()


def test_gc_leaves_the_notes_alone_however_old(tmp_path: Path) -> None:
    outbox = an_outbox(tmp_path)
    expire(tmp_path, outbox.claim())
    outbox.note_sent("<1@example.com>", ["a@example.com"], {})
    rules = GcRules(before=time.time() + 1, keep_versions=0, unfinished=True)
    assert find_garbage(open_storage(str(tmp_path)), "users", rules).files == ()


def test_an_object_store_keeps_the_same_notes(s3_folder: str) -> None:
    outbox = Outbox(open_storage(s3_folder), "users", "2026-11-20-published-1")
    claim = outbox.claim()
    with pytest.raises(MailError, match="is sending this mail"):
        outbox.claim()
    outbox.release(claim)
    assert outbox.claim() == claim
    outbox.note_sent("<1@example.com>", ["a@example.com"], {})
    assert outbox.waiting(["a@example.com"]) == ()
