"""Create-only storage: its protocol, and a local disk. See object_storage.py for S3.

One promise matters: `create` makes an object whole or not at all, and never replaces one. Commit
records and manifests rest on it; see ARCHITECTURE.md, "Commit protocol".
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Concatenate, ParamSpec, Protocol, TypeVar, cast

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError, StoreRefusedError
from pipeline.store_errors import named, why


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


class Storage(Protocol):
    """A tree of immutable files below one root. Paths are relative to the root, with `/`.

    Raises:
        StoreUnavailableError: By any method: full, broken or out of reach; nothing is torn.
        StoreRefusedError: By any method: no permission, read-only, no such bucket.
    """

    uri: str

    def list_files(self, prefix: str) -> list[FileInfo]:
        """All files below the folder `prefix`, sorted by path; empty when there is none."""

    def info(self, path: str) -> FileInfo | None:
        """What `path` is now, or None when it does not exist."""

    def open(self, path: str) -> BinaryIO:
        """A seekable file, for readers that need parts of it."""

    def read(self, path: str) -> bytes | None:
        """The whole content, or None when it does not exist."""

    def read_many(self, paths: Sequence[str]) -> list[bytes]:
        """The contents of files that must exist, in order."""

    def create(self, path: str, data: bytes) -> bool:
        """Make `path` hold `data`, whole and durable, unless it exists; say whether we made it.

        An outcome that the store leaves unknown is resolved by reading back, so `data` must be
        unique to its writer (R8).
        """

    def delete(self, path: str) -> None:
        """Remove a file that we know nobody needs; missing is fine."""

    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        """Make the folder `target` appear: links or copies of `files`, then `_MANIFEST.json`.

        Args:
            files: Name inside `target` -> existing path.
            manifest: Content of `_MANIFEST.json`, unique to its writer.
            target: Folder that must not exist yet.

        Returns:
            False when somebody else has published `target`.
        """


MANIFEST = "_MANIFEST.json"
SUCCESS = "_SUCCESS"


def open_storage(uri: str) -> Storage:
    """The storage for a local path or an `s3://` address.

    Credentials and endpoint of an object store come from the environment (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`).
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStorage(uri)
    if scheme == "file":
        return LocalStorage(rest)
    if scheme == "s3" and rest.strip("/"):
        from pipeline.object_storage import ObjectStorage

        return ObjectStorage(uri)
    raise ConfigError(f"{uri}: unknown kind of storage; expected a path or s3://bucket/prefix.")


def probe(storage: Storage, folder: str) -> None:
    """Prove create-if-absent and read-after-write on `folder`, or refuse the store (R14).

    Raises:
        StorageError: The store replaces existing objects or does not show what was written.
        StoreUnavailableError: It is full or out of reach.
        ConfigError: The folder cannot be written at all.
    """
    path = f"{folder}/_probe-{uuid.uuid4().hex}"
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


Params = ParamSpec("Params")
Result = TypeVar("Result")


def _named(
    method: Callable[Concatenate[LocalStorage, Params], Result],
) -> Callable[Concatenate[LocalStorage, Params], Result]:
    """Let a method say what errors of the disk mean, and at which path."""

    @functools.wraps(method)
    def call(self: LocalStorage, /, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        paths = [argument for argument in args if isinstance(argument, str)]
        with named("/".join((self.uri, *paths[:1]))):
            return method(self, *args, **kwargs)

    return call


class LocalStorage:
    """A folder of a local file system that supports hard links."""

    def __init__(self, root: str) -> None:
        self.uri = root.rstrip("/") or "/"
        self._root = Path(os.path.abspath(root))

    @_named
    def list_files(self, prefix: str) -> list[FileInfo]:
        # Plain strings: with a Path for each file a ledger of 100,000 takes seconds to list.
        found = []
        for parent, _, names in os.walk(self._root / prefix, onerror=_unless_missing):
            for name in names:
                path = os.path.join(parent, name)
                with suppress(FileNotFoundError):  # somebody's temporary file, gone since
                    found.append(self._info(path, os.stat(path)))
        return sorted(found, key=lambda info: info.path)

    @_named
    def info(self, path: str) -> FileInfo | None:
        full = self._root / path
        try:
            status = full.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self._info(str(full), status) if stat.S_ISREG(status.st_mode) else None

    def _info(self, path: str, status: os.stat_result) -> FileInfo:
        return FileInfo(
            path=path.removeprefix(os.path.join(self._root, "")),
            num_bytes=status.st_size,
            version=str(status.st_mtime_ns),
            modified_at=status.st_mtime,
        )

    @_named
    def open(self, path: str) -> BinaryIO:
        # Arrow's own file: its readers then need no Python, and no lock, for each column chunk.
        return cast("BinaryIO", pa.OSFile(str(self._root / path)))

    @_named
    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    @_named
    def read_many(self, paths: Sequence[str]) -> list[bytes]:
        return [(self._root / path).read_bytes() for path in paths]

    @_named
    def create(self, path: str, data: bytes) -> bool:
        # Not open("xb"): a full disk leaves a torn file. Not rename: it replaces silently.
        final = self._root / path
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, final)
            except FileExistsError:
                return False
            return True
        finally:
            temporary.unlink(missing_ok=True)
            _sync_folder(final.parent)

    @_named
    def delete(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    @_named
    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        final = self._root / target
        if (final / MANIFEST).exists():
            return False
        staged = final.with_name(f"_publishing-{uuid.uuid4().hex}")
        try:
            inner = {Path(folder) for folder in map(os.path.dirname, files)}
            folders = {staged / each for folder in inner for each in (folder, *folder.parents)}
            folders.add(staged)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for name, source in files.items():
                os.link(f"{self._root}/{source}", f"{staged}/{name}")
            for name, data in ((MANIFEST, manifest), (SUCCESS, b"")):
                with (staged / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for folder in folders:
                _sync_folder(folder)
            try:
                os.rename(staged, final)  # fails when `final` has files: somebody was first
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
            _sync_folder(final.parent)
            return True
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _unless_missing(error: OSError) -> None:
    """Without it a folder that cannot be read would be listed as an empty one."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
