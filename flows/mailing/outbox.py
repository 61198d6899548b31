"""What was mailed, and what is being mailed: create-only notes beside a job's dates.

    <job>/_mail/<mail>/claim-000.json   somebody is sending it
                       claim-001.json   somebody else is: the first one has not been heard of since
                       sent.json        it is on its way; nobody sends it again

Two processes do not both send a mail: each claims it first, and the store lets only one. Who fails
gives its claim back, so that the next command may try at once. Who dies between handing the mail
over and noting it leaves a claim that expires; whoever takes it over sends the mail again. That
cannot be avoided, as no server and no store end as one. Both mails have one Message-ID, by which
many servers and mail programs drop the second. So: at least once if commands are run again, and
twice only after a crash in that moment (or while the store is out of reach).
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence

from pipeline.errors import MailError
from pipeline.ledger import utc_now
from pipeline.storage import Storage

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

    def is_sent(self) -> bool:
        """Whether it is on its way."""
        return self._output.info(f"{self._folder}/sent.json") is not None

    def claim(self) -> str:
        """Let nobody else send it meanwhile.

        Returns:
            The claim, for `release`.

        Raises:
            MailError: Somebody else is sending it.
        """
        claims = [info for info in self._output.list_files(self._folder) if "/claim-" in info.path]
        if claims and time.time() - claims[-1].modified_at < LEASE_S:
            raise self._taken(claims[-1].path)
        number = int(claims[-1].path[-8:-5]) + 1 if claims else 0
        path = f"{self._folder}/claim-{number:03}.json"
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "at": utc_now(),
            "token": uuid.uuid4().hex,
        }
        if not self._output.create(path, json.dumps(owner).encode()):
            raise self._taken(path)
        return path

    def _taken(self, path: str) -> MailError:
        try:
            owner = json.loads(self._output.read(path) or b"")
            process = f"process {owner['pid']} on {owner['host']}"
            who = f"{process} is sending this mail since {owner['at']}"
        except (ValueError, LookupError, TypeError):  # damaged, or given back a moment ago
            who = "somebody is sending this mail"
        return MailError(
            f"{self._output.uri}/{path}: {who}; expected nobody. If it has died, run the command "
            f"again {LEASE_S / 60:g} minutes after that."
        )

    def release(self, claim: str) -> None:
        """Give a claim back: the mail was not sent."""
        self._output.delete(claim)

    def note_sent(self, message_id: str, to: Sequence[str], refused: dict[str, str]) -> None:
        """Write down that the mail is on its way; again is fine."""
        note = {"message_id": message_id, "to": list(to), "refused": refused, "at": utc_now()}
        self._output.create(f"{self._folder}/sent.json", json.dumps(note, indent=1).encode())
