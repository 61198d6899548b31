"""What the engine store needs of a storage; both storages of the pipeline have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StoredFile(Protocol):
    """One file below a store's root."""

    @property
    def path(self) -> str:
        """Relative to the root, with `/`."""

    @property
    def num_bytes(self) -> int:
        """Size."""

    @property
    def modified_at(self) -> float:
        """Unix time of the last change in s, by the store's clock."""


class FileStore(Protocol):
    """A tree of immutable files below one root. Paths are relative to the root, with `/`."""

    @property
    def uri(self) -> str:
        """A local path, or an address with `://`."""

    def list_files(self, prefix: str) -> Sequence[StoredFile]:
        """All files below the folder `prefix`, sorted by path; empty when there is none."""

    def read(self, path: str) -> bytes | None:
        """The whole content, or None when it does not exist."""

    def create(self, path: str, data: bytes) -> bool:
        """Make `path` hold `data`, whole and durable, unless it exists; say whether we made it.

        `data` must be unique to its writer: after a lost reply, what is there decides.
        """

    def delete(self, path: str) -> None:
        """Remove a file; missing is fine."""
