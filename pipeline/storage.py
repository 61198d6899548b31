"""Create-only storage on a local disk or an object store, through fsspec.

One promise matters: `create` makes an object whole or not at all, and never replaces one. Commit
records and manifests rest on it; see ARCHITECTURE.md, "Commit protocol".
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar, cast

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.paths import checked


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
        return ObjectStorage(uri)
    raise ConfigError(f"{uri}: unknown kind of storage; expected a path or s3://bucket/prefix.")


def probe(storage: Storage, folder: str) -> None:
    """Prove create-if-absent and read-after-write on `folder`, or refuse the store (R14).

    Raises:
        StorageError: The store replaces existing objects or does not show what was written.
        ConfigError: The folder cannot be written at all.
    """
    path = f"{folder}/_probe-{uuid.uuid4().hex}"
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    where = f"{storage.uri}/{folder}"
    try:
        created = storage.create(path, first)
    except (OSError, StorageError) as error:
        raise ConfigError(
            f"{where}: cannot be written ({_why(error)}); expected a writable output. "
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


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class LocalStorage:
    """A folder of a local file system that supports hard links."""

    def __init__(self, root: str) -> None:
        self.uri = root.rstrip("/") or "/"
        self._root = Path(os.path.abspath(root))

    def _full(self, path: str) -> Path:
        return self._root / checked(path, self.uri)

    def list_files(self, prefix: str) -> list[FileInfo]:
        # Plain strings: with a Path for each file a ledger of 100,000 takes seconds to list.
        found = []
        for parent, _, names in os.walk(self._full(prefix)):
            for name in names:
                path = os.path.join(parent, name)
                with suppress(FileNotFoundError):  # somebody's temporary file, gone since
                    found.append(self._info(path, os.stat(path)))
        return sorted(found, key=lambda info: info.path)

    def info(self, path: str) -> FileInfo | None:
        full = self._full(path)
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
        return cast("BinaryIO", pa.OSFile(str(self._full(path))))

    def read(self, path: str) -> bytes | None:
        try:
            return self._full(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_many(self, paths: Sequence[str]) -> list[bytes]:
        return [self._full(path).read_bytes() for path in paths]

    def create(self, path: str, data: bytes) -> bool:
        # Not open("xb"): a full disk leaves a torn file. Not rename: it replaces silently.
        final = self._full(path)
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
        self._full(path).unlink(missing_ok=True)

    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        final = self._full(target)
        if (final / MANIFEST).exists():
            return False
        staged = final.with_name(f"_publishing-{uuid.uuid4().hex}")
        try:
            files = {checked(name, self.uri): source for name, source in files.items()}
            inner = {Path(folder) for folder in map(os.path.dirname, files)}
            folders = {staged / each for folder in inner for each in (folder, *folder.parents)}
            folders.add(staged)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for name, source in files.items():
                os.link(self._full(source), f"{staged}/{name}")
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Params = ParamSpec("Params")
Result = TypeVar("Result")


def _named(method: Callable[Params, Result]) -> Callable[Params, Result]:
    """Turn what the S3 client raises besides OSError (no credentials, no connection) into ours."""

    @functools.wraps(method)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        from botocore.exceptions import BotoCoreError

        try:
            return method(*args, **kwargs)
        except BotoCoreError as error:
            raise StorageError(
                f"object store: {error}; expected to reach it. Check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL."
            ) from error

    return call


class ObjectStorage:
    """A prefix of an S3 bucket; the store must honour If-None-Match (see `probe`)."""

    RETRY_PAUSES_S = (0.2, 1.0, 5.0)
    """Waits between tries of a conditional write that the store asked us to repeat."""

    def __init__(self, uri: str) -> None:
        import fsspec  # brings asyncio and more, which a local disk does not need

        self.uri = uri.rstrip("/")
        self._root = self.uri.removeprefix("s3://")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        # A listing cache would hide what other processes wrote; a cached instance may have been
        # made by another thread's event loop.
        self._fs: Any = fsspec.filesystem(
            "s3",
            endpoint_url=endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "retries": {"mode": "standard", "max_attempts": 6},
                "connect_timeout": 5,
                "read_timeout": 60,
                **({"s3": {"addressing_style": "path"}} if endpoint else {}),
            },
        )

    def _full(self, path: str) -> str:
        return f"{self._root}/{checked(path, self.uri)}".rstrip("/")

    @_named
    def list_files(self, prefix: str) -> list[FileInfo]:
        try:
            found = self._fs.find(self._full(prefix), detail=True)
        except FileNotFoundError:
            return []
        # Stores and consoles may keep folders as objects; they are no files.
        infos = [
            self._info(full, entry) for full, entry in found.items() if entry["type"] == "file"
        ]
        return sorted(infos, key=lambda info: info.path)

    def _info(self, full: str, entry: dict[str, Any]) -> FileInfo:
        relative = full.removeprefix(f"{self._root}/")
        return FileInfo(
            path=relative,
            num_bytes=entry["size"],
            version=entry["ETag"].strip('"'),
            modified_at=entry["LastModified"].timestamp(),
        )

    @_named
    def info(self, path: str) -> FileInfo | None:
        full = self._full(path)
        try:
            entry = self._fs.info(full)
        except FileNotFoundError:
            return None
        return self._info(full, entry) if entry["type"] == "file" else None

    @_named
    def open(self, path: str) -> BinaryIO:
        return cast("BinaryIO", self._fs.open(self._full(path), "rb", cache_type="readahead"))

    @_named
    def read(self, path: str) -> bytes | None:
        try:
            return cast("bytes", self._fs.cat_file(self._full(path)))
        except FileNotFoundError:
            return None

    @_named
    def read_many(self, paths: Sequence[str]) -> list[bytes]:
        full = [self._full(path) for path in paths]
        contents = self._fs.cat(full, on_error="raise") if full else {}
        return [contents[path] for path in full] if isinstance(contents, dict) else [contents]

    def create(self, path: str, data: bytes) -> bool:
        full = self._full(path)
        for pause_s in (*self.RETRY_PAUSES_S, None):
            try:
                self._put_new(full, data)
                return True
            except (OSError, StorageError) as error:
                # The store may have applied a request whose reply was lost: what is there decides.
                found = self.read(path)
                if found is not None:
                    return found == data
                if pause_s is None:
                    raise StorageError(f"s3://{full}: {_why(error)}; expected a write.") from error
                time.sleep(pause_s)
        raise AssertionError("unreachable: the last try returns or raises")

    @_named
    def _put_new(self, full: str, data: bytes) -> None:
        self._fs.pipe_file(full, data, mode="create")

    @_named
    def delete(self, path: str) -> None:
        try:
            self._fs.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        if self.read(f"{target}/{MANIFEST}") is not None:
            return False
        # Server-side copies under names that only this run uses: repeating them is harmless.
        self._copy(
            (self._full(source), self._full(f"{target}/{checked(name, self.uri)}"))
            for name, source in files.items()
        )
        if not self.create(f"{target}/{MANIFEST}", manifest):
            return False
        self.create(f"{target}/{SUCCESS}", b"")
        return True

    @_named
    def _copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        sources, targets = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
        self._fs.copy(list(sources), list(targets), on_error="raise")
