"""The version log: which engine answers a request now, and which ones did before.

`requests/<request key>/<number>.json` is append-only; the highest number is current. Rolling back
appends a version too, so that nothing is ever overwritten and the history stays.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import socket
import uuid
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from engines.errors import EngineCorruptError
from engines.files import FileStore

log = logging.getLogger(__name__)

REQUESTS = "requests"
_ENTRY = re.compile(rf"{REQUESTS}/(?P<request>[^/]+)/(?P<number>\d+)\.json")

Why = Literal["built", "rolled back"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One entry: from here on, this engine answers the request."""

    number: int
    engine: str
    """Key of the engine."""
    manifest_sha256: str
    why: Why
    at: str
    """ISO 8601, UTC."""
    host: str
    writer: str
    """Unique to whoever appended it: after a lost reply it tells our entry from another's."""


class VersionLog:
    """The version logs of all requests of a store."""

    def __init__(self, files: FileStore) -> None:
        self._files = files

    def current(self, request_key: str) -> Version | None:
        """The newest version; None when there is none.

        Raises:
            EngineCorruptError: The newest entry cannot be read.
        """
        numbers = self._numbers(request_key)
        return self._read(request_key, numbers[-1]) if numbers else None

    def history(self, request_key: str) -> list[Version]:
        """All versions that can be read, oldest first."""
        return self._readable(request_key, self._numbers(request_key))

    def all(self) -> dict[str, list[Version]]:
        """Request key -> versions that can be read, oldest first."""
        numbers: dict[str, list[int]] = {}
        for file in self._files.list_files(REQUESTS):
            if found := _ENTRY.fullmatch(file.path):
                numbers.setdefault(found["request"], []).append(int(found["number"]))
        return {key: self._readable(key, sorted(found)) for key, found in numbers.items()}

    def append(self, request_key: str, engine: str, manifest_sha256: str, why: Why) -> Version:
        """Make an engine current."""
        number = max(self._numbers(request_key), default=0)
        while True:
            number += 1
            version = Version(
                number=number,
                engine=engine,
                manifest_sha256=manifest_sha256,
                why=why,
                at=datetime.datetime.now(datetime.UTC).isoformat(),
                host=socket.gethostname(),
                writer=uuid.uuid4().hex,
            )
            data = json.dumps(asdict(version)).encode()
            if self._files.create(_path(request_key, number), data):
                return version

    def _numbers(self, request_key: str) -> list[int]:
        files = self._files.list_files(f"{REQUESTS}/{request_key}")
        return sorted(int(m["number"]) for file in files if (m := _ENTRY.fullmatch(file.path)))

    def _readable(self, request_key: str, numbers: list[int]) -> list[Version]:
        versions = []
        for number in numbers:
            try:
                versions.append(self._read(request_key, number))
            except EngineCorruptError as error:
                log.warning("%s It is left out.", error)
        return versions

    def _read(self, request_key: str, number: int) -> Version:
        path = _path(request_key, number)
        try:
            version = TypeAdapter(Version).validate_json(self._files.read(path) or b"")
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise EngineCorruptError(f"{path}: {message}; expected a version entry.") from None
        if version.number != number:
            raise EngineCorruptError(f"{path}: version {version.number}; expected {number}.")
        return version


def _path(request_key: str, number: int) -> str:
    return f"{REQUESTS}/{request_key}/{number:04d}.json"
