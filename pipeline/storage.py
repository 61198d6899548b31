"""Create-only storage: what a run needs of a disk or a bucket.

One promise matters: `create` makes an object whole or not at all, and never replaces one. Commit
records and manifests rest on it; see ARCHITECTURE.md, "Commit protocol".
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from pipeline.errors import ConfigError, StorageError, StoreRefusedError
from pipeline.store_errors import why


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """One file or object below a storage's root."""

    path: str
    """Relative to the root, with `/`."""
    num_bytes: int
    version: str
    """ETag of an object, modification time in ns of a file: changes when the content does."""
    modified_at: float = field(compare=False)
    """Unix time of the last change in s, by the store's clock; objects may have whole seconds."""
    shared: tuple[int, int] | None = field(default=None, compare=False)
    """Inode of a file that has several names on its disk, and how many; its bytes are there until
    the last of them goes."""


class Known(Protocol):
    """What tells the version of a file."""

    @property
    def num_bytes(self) -> int:
        """Its size."""

    @property
    def version(self) -> str:
        """See `FileInfo`."""


class Storage(Protocol):
    """A tree of immutable files below one root. Paths are relative to the root, with `/`.

    Raises:
        StoreUnavailableError: By any method: full, broken or out of reach; nothing is torn.
        StoreRefusedError: By any method: no permission, read-only, no such bucket.
    """

    uri: str
    is_far: bool
    """Whether each request waits for a network: several at once then take no longer than one."""

    def list_files(self, prefix: str) -> list[FileInfo]:
        """All files below the folder `prefix`, sorted by path; empty when there is none."""

    def list_folders(self, prefix: str) -> list[str]:
        """Names of the folders directly in the folder `prefix`, sorted; looks into none of them."""

    def info(self, path: str) -> FileInfo | None:
        """What `path` is now, or None when it does not exist."""

    def open(self, path: str, known: Known | None = None) -> BinaryIO:
        """A seekable file, for readers that need parts of it.

        Args:
            path: Which.
            known: What it was when it was listed. Far away it is not looked at again, and reads
                raise InputChangedError if it is another version by now: its bytes never come. On
                a disk whoever reads looks before and after.
        """

    def read(self, path: str) -> bytes | None:
        """The whole content, or None when it does not exist."""

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """The contents of files in order, None for each that does not exist (any more)."""

    def create(self, path: str, data: bytes) -> bool:
        """Make `path` hold `data`, whole and durable, unless it exists; say whether we made it.

        An outcome that the store leaves unknown is resolved by reading back, so `data` must be
        unique to its writer (R8).
        """

    def delete(self, path: str) -> None:
        """Remove a file that we know nobody needs; missing is fine."""

    def delete_many(self, paths: Sequence[str]) -> None:
        """The same for many files, and for the folders that this leaves empty."""

    def copy(self, files: Mapping[str, str]) -> None:
        """Make files appear under more paths (new path -> existing one), as links or copies.

        A path that exists is left as it is: whoever made it copied the same file.
        """

    def unfinished_uploads(self, prefix: str) -> list[UnfinishedUpload]:
        """Uploads below the folder `prefix` that were begun and neither completed nor aborted.

        They are invisible and cost money. A local disk has none.
        """

    def abort_upload(self, upload: UnfinishedUpload) -> None:
        """Drop what was uploaded; gone is fine."""

    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        """Make the folder `target` appear: links or copies of `files`, then `_MANIFEST.json`.

        Args:
            files: Name inside `target` -> existing path.
            manifest: Content of `_MANIFEST.json`, unique to its writer.
            target: Folder that must not exist yet.

        Returns:
            False when somebody else has published `target`.
        """

    def check_free(self, target: str) -> None:
        """See that `publish` can make the folder `target`, where nobody else has published it.

        Raises:
            StorageError: Something lies there that no run has put there, and none may remove.
        """

    def swap(self, files: dict[str, str], manifest: bytes, target: str, expected: bytes) -> bool:
        """Like `publish`, but in the place of the version whose manifest is `expected`.

        On a local disk one folder takes the other's place at once. On an object store `_SUCCESS`
        goes first, then files are copied, then the manifest is replaced on condition that nobody
        else has (If-Match); what the old version leaves behind is the caller's to remove.

        Returns:
            False when `target` has another manifest by now.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedUpload:
    """A multipart upload that nobody completed."""

    path: str
    upload_id: str
    started_at: float
    """Unix time in s, by the store's clock."""


MANIFEST = "_MANIFEST.json"
SUCCESS = "_SUCCESS"
STAGING_PREFIX = "_publishing-"
"""Of folders that are being made, and of versions that have just been replaced."""
PROBE_PREFIX = "_probe-"


def open_storage(uri: str) -> Storage:
    """The storage for a local path or an `s3://` address.

    Credentials and endpoint of an object store come from the environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`).
    """
    from pipeline.local_storage import LocalStorage

    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStorage(uri)
    if scheme == "file":
        return LocalStorage(rest)
    if scheme == "s3" and rest.strip("/"):
        from pipeline.object_storage import ObjectStorage

        return ObjectStorage(uri)
    raise ConfigError(f"{uri}: unknown kind of storage; expected a path or s3://bucket/prefix.")


def s3_endpoint() -> str | None:
    """Address of the object store that the environment names; None: the provider's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def occupied(where: str, name: str) -> StorageError:
    """For a folder that is to be published, with something in it that no run has put there."""
    return StorageError(
        f"{where}: has `{name}` and no {MANIFEST}; expected a published date, an empty folder or "
        "none. Move it away, and run the same command again."
    )


def probe(storage: Storage, folder: str) -> None:
    """Prove create-if-absent and read-after-write on `folder`, or refuse the store (R14).

    Raises:
        StorageError: The store replaces existing objects or does not show what was written.
        StoreUnavailableError: It is full or out of reach.
        ConfigError: The folder cannot be written at all.
    """
    path = f"{folder}/{PROBE_PREFIX}{uuid.uuid4().hex}"
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    where = f"{storage.uri}/{folder}"
    try:
        created = storage.create(path, first)
    except (OSError, StoreRefusedError) as error:
        raise ConfigError(
            f"{where}: cannot be written ({why(error)}); expected a writable output. "
            "Check `output.uri` and its permissions."
        ) from None
    try:
        replaced = storage.create(path, second)
        if not created or replaced or storage.read(path) != first:
            raise StorageError(
                f"{where}: the store does not honour create-if-absent; expected conditional "
                "writes (If-None-Match). Two runs could overwrite each other: use another store."
            )
    finally:
        storage.delete(path)
