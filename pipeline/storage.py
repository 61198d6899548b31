"""Create-only storage: its protocol, and a local disk. See object_storage.py for S3.

One promise matters: `create` makes an object whole or not at all, and never replaces one. Commit
records and manifests rest on it; see ARCHITECTURE.md, "Commit protocol".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
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


class Storage(Protocol):
    """A tree of immutable files below one root. Paths are relative to the root, with `/`."""

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
LOCK_TIMEOUT_S = 60.0
LOCK_POLL_S = 0.1


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
        ConfigError: The folder cannot be written at all.
    """
    path = f"{folder}/{PROBE_PREFIX}{uuid.uuid4().hex}"
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    where = f"{storage.uri}/{folder}"
    try:
        created = storage.create(path, first)
    except (OSError, StorageError) as error:
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


class LocalStorage:
    """A folder of a local file system that supports hard links."""

    def __init__(self, root: str) -> None:
        self.uri = root.rstrip("/") or "/"
        self._root = Path(os.path.abspath(root))

    def list_files(self, prefix: str) -> list[FileInfo]:
        # Plain strings: with a Path for each file a ledger of 100,000 takes seconds to list.
        found = []
        for parent, _, names in os.walk(self._root / prefix):
            for name in names:
                path = os.path.join(parent, name)
                with suppress(FileNotFoundError):  # somebody's temporary file, gone since
                    found.append(self._info(path, os.stat(path)))
        return sorted(found, key=lambda info: info.path)

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

    def open(self, path: str) -> BinaryIO:
        # Arrow's own file: its readers then need no Python, and no lock, for each column chunk.
        return cast("BinaryIO", pa.OSFile(str(self._root / path)))

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_many(self, paths: Sequence[str]) -> list[bytes]:
        return [(self._root / path).read_bytes() for path in paths]

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

    def delete(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    def delete_many(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.delete(path)
        folders = {parent for path in paths for parent in (self._root / path).parents}
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            if self._root in folder.parents:
                with suppress(OSError):  # not empty
                    folder.rmdir()

    def copy(self, files: Mapping[str, str]) -> None:
        folders = {(self._root / path).parent for path in files}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for path, source in files.items():
            with suppress(FileExistsError):
                os.link(self._root / source, self._root / path)
        for folder in folders:
            _sync_folder(folder)

    def unfinished_uploads(self, prefix: str) -> list[UnfinishedUpload]:  # noqa: ARG002
        return []

    def abort_upload(self, upload: UnfinishedUpload) -> None:  # pragma: no cover
        raise AssertionError(f"{upload.path}: a local disk has no uploads")

    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        final = self._root / target
        if (final / MANIFEST).exists():
            return False
        with self._staged(files, manifest, final) as staged:
            try:
                os.rename(staged, final)  # fails when `final` has files: somebody was first
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
            _sync_folder(final.parent)
            return True

    def swap(self, files: dict[str, str], manifest: bytes, target: str, expected: bytes) -> bool:
        final = self._root / target
        with _locked(final.parent):
            if self.read(f"{target}/{MANIFEST}") != expected:
                return False
            with self._staged(files, manifest, final) as staged:
                exchange(staged, final)
                _sync_folder(final.parent)
                return True

    @contextmanager
    def _staged(self, files: dict[str, str], manifest: bytes, final: Path) -> Iterator[Path]:
        """A folder beside `final` with all that it shall have; what is left of it goes at last."""
        staged = final.with_name(f"{STAGING_PREFIX}{uuid.uuid4().hex}")
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
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on a folder: it is freed when its owner dies.

    Raises:
        StorageError: Somebody else has held it for too long.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"{folder}: locked by another process for {LOCK_TIMEOUT_S:g} s; expected "
                        "it to put its version in place. Look for a hanging `score` process."
                    ) from None
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    """Two folders take each other's place at once (renameat2 with RENAME_EXCHANGE, Linux 3.15).

    Raises:
        StorageError: The system or the file system cannot do that.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD and RENAME_EXCHANGE, linux/fcntl.h and linux/fs.h
    if renameat2 is None:
        code = errno.ENOSYS
    elif renameat2(here, os.fsencode(one), here, os.fsencode(other), both) == 0:
        return
    else:
        code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        raise StorageError(
            f"{other}: its file system cannot exchange two folders at once; expected Linux and a "
            "local disk. Readers would see a date vanish: nothing was changed."
        )
    raise OSError(code, os.strerror(code), str(other))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
