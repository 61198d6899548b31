"""What was mailed, and what is being mailed: create-only notes beside a job's dates.

    <job>/_mail/<mail>/claim-000.json   somebody is sending it
                       claim-001.json   somebody else is: the first one has not been heard of since
                       sent.json        it is on its way; nobody sends it again
                       sent-001.json    so it is to those whom the server had refused until then

Two processes do not both send a mail: each claims it first, and the store lets only one. Who fails
gives its claim back, so that the next command may try at once, and so does who was refused for some
of the recipients. Who dies between handing the mail over and noting it leaves a claim that expires,
on the same machine at once; whoever takes it over sends the mail again. That cannot be avoided, as
no server and no store end as one. Both mails have one Message-ID, by which many servers and mail
programs drop the second. So: at least once if commands are run again, and
twice only after a crash in that moment (or while the store is out of reach).
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pipeline.errors import MailError
from pipeline.ledger import utc_now
from pipeline.process_start import process_name
from pipeline.storage import FileInfo, Storage

FOLDER = "_mail"
LEASE_S = 180.0
"""A claim that is older is nobody's: whoever sends gives up long before."""


class Outbox:
    """The notes about one mail.

    Args:
        output: Of the job.
        job: Its name.
        mail: Id of the mail, a file name.
    """

    def __init__(self, output: Storage, job: str, mail: str) -> None:
        self._output = output
        self._folder = f"{job}/{FOLDER}/{mail}"

    def waiting(self, to: Sequence[str]) -> tuple[str, ...]:
        """Of these addresses, those that it must go to: all, or those without it after a refusal.

        Once it has gone to all who were to get it, nobody waits, and no address that is new.
        """
        notes = self._files("sent")
        have, refused = set[str](), set[str]()
        for info in notes:
            try:
                note = json.loads(self._output.read(info.path) or b"")
                have |= {*note["to"]} - {*note["refused"]}
                refused |= {*note["refused"]}
            except (ValueError, LookupError, TypeError):  # damaged: somebody sent it
                return ()
        if notes and refused <= have:
            return ()
        return tuple(address for address in to if address not in have)

    def claim(self) -> str:
        """Let nobody else send it meanwhile.

        Returns:
            The claim, for `release`.

        Raises:
            MailError: Somebody else is sending it.
        """
        claims = self._files("claim-")
        if claims and self._is_held(claims[-1]):
            raise self._taken(claims[-1].path, claims[-1].modified_at)
        number = int(claims[-1].path[-8:-5]) + 1 if claims else 0
        path = f"{self._folder}/claim-{number:03}.json"
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": process_name(os.getpid()),
            "at": utc_now(),
            "token": uuid.uuid4().hex,
        }
        if not self._output.create(path, json.dumps(owner).encode()):
            raise self._taken(path, time.time())
        return path

    def _files(self, kind: str) -> list[FileInfo]:
        found = self._output.list_files(self._folder)
        return [info for info in found if info.path.startswith(f"{self._folder}/{kind}")]

    def _owner(self, claim: str) -> dict[str, Any]:
        """Who claimed it; raises when the claim is damaged, or was given back a moment ago."""
        owner: dict[str, Any] = json.loads(self._output.read(claim) or b"")
        return owner

    def _is_held(self, claim: FileInfo) -> bool:
        if time.time() - claim.modified_at >= LEASE_S:
            return False
        try:
            owner = self._owner(claim.path)
            is_here = owner["host"] == socket.gethostname() and owner["process"]
            return not is_here or process_name(owner["pid"]) == owner["process"]
        except (ValueError, LookupError, TypeError):
            return True

    def _taken(self, path: str, since: float) -> MailError:
        try:
            owner = self._owner(path)
            process = f"process {owner['pid']} on {owner['host']}"
            who = f"{process} is sending this mail since {owner['at']}"
        except (ValueError, LookupError, TypeError):
            who = "somebody is sending this mail"
        end = datetime.datetime.fromtimestamp(since + LEASE_S, datetime.UTC)
        return MailError(
            f"{self._output.uri}/{path}: {who}; expected nobody. If it has ended, run the command "
            f"again after {end:%H:%M:%S} UTC."
        )

    def release(self, claim: str) -> None:
        """Give a claim back: the mail was not sent."""
        self._output.delete(claim)

    def note_sent(self, message_id: str, to: Sequence[str], refused: dict[str, str]) -> None:
        """Write down that the mail is on its way to all but who was refused; again is fine."""
        note = {"message_id": message_id, "to": list(to), "refused": refused, "at": utc_now()}
        number = len(self._files("sent"))
        name = f"sent-{number:03}" if number else "sent"
        self._output.create(f"{self._folder}/{name}.json", json.dumps(note, indent=1).encode())
