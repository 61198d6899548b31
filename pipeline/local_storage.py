"""Create-only storage on a local disk, with hard links; see pipeline/storage.py."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Concatenate, ParamSpec, TypeVar, cast

import pyarrow as pa

from pipeline.errors import InputError, StorageError
from pipeline.paths import checked, is_hidden
from pipeline.storage import (
    MANIFEST,
    STAGING_PREFIX,
    SUCCESS,
    FileInfo,
    Known,
    UnfinishedUpload,
    occupied,
)
from pipeline.store_errors import named

LOCK_TIMEOUT_S = 60.0
LOCK_POLL_S = 0.1

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

    is_far = False

    def __init__(self, root: str) -> None:
        self.uri = root.rstrip("/") or "/"
        self._root = Path(os.path.abspath(root))

    def _full(self, path: str) -> Path:
        return self._root / checked(path, self.uri)

    @_named
    def list_files(self, prefix: str) -> list[FileInfo]:
        # Plain strings: with a Path for each file a ledger of 100,000 takes seconds to list.
        found = []
        top = self._full(prefix)
        for parent, folders, names in os.walk(top, onerror=_unless_missing, followlinks=True):
            for folder in folders:
                _refuse_loop(os.path.join(parent, folder))
            for name in names:
                path = os.path.join(parent, name)
                status = self._status(path)
                if status is not None:
                    found.append(self._info(path, status))
        return sorted(found, key=lambda info: info.path)

    def _status(self, path: str) -> os.stat_result | None:
        """None for somebody's temporary file, which is gone since.

        Raises:
            InputError: A link that leads nowhere: where it should lead to may be rows of the night.
        """
        try:
            return os.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
        # Hidden ones are editors' locks, say.
        if os.path.islink(path) and not is_hidden(path.removeprefix(str(self._root))):
            raise InputError(
                f"{path}: a link to {os.readlink(path)}, which is not there; expected a file or a "
                "folder. Mount what it leads to, or remove the link."
            )
        return None

    @_named
    def list_folders(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self._full(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    @_named
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
            shared=(status.st_ino, status.st_nlink) if status.st_nlink > 1 else None,
        )

    @_named
    def open(self, path: str, known: Known | None = None) -> BinaryIO:
        del known  # whoever needs to know looks before and after
        # Arrow's own file: its readers then need no Python, and no lock, for each column chunk.
        return cast("BinaryIO", pa.OSFile(str(self._full(path))))

    @_named
    def read(self, path: str) -> bytes | None:
        try:
            return self._full(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        return [self.read(path) for path in paths]

    @_named
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

    @_named
    def delete(self, path: str) -> None:
        self._full(path).unlink(missing_ok=True)

    def delete_many(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.delete(path)
        folders = {parent for path in paths for parent in self._full(path).parents}
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            if self._root in folder.parents:
                with suppress(OSError):  # not empty
                    folder.rmdir()

    @_named
    def copy(self, files: Mapping[str, str]) -> None:
        folders = {self._full(path).parent for path in files}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for path, source in files.items():
            with suppress(FileExistsError):
                os.link(self._full(source), self._full(path))
        for folder in folders:
            _sync_folder(folder)

    def unfinished_uploads(self, prefix: str) -> list[UnfinishedUpload]:  # noqa: ARG002
        return []

    def abort_upload(self, upload: UnfinishedUpload) -> None:  # pragma: no cover
        raise AssertionError(f"{upload.path}: a local disk has no uploads")

    @_named
    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        final = self._full(target)
        if (final / MANIFEST).exists():
            return False
        with self._staged(files, manifest, final) as staged:
            try:
                os.rename(staged, final)  # fails when `final` has files
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    self.check_free(target)
                    return False  # somebody was first
                raise
            _sync_folder(final.parent)
            return True

    @_named
    def check_free(self, target: str) -> None:
        try:
            names = os.listdir(self._full(target))
        except FileNotFoundError:
            return
        if names and MANIFEST not in names:  # no run leaves that: it makes a folder elsewhere
            raise occupied(f"{self.uri}/{target}", min(names))

    @_named
    def swap(self, files: dict[str, str], manifest: bytes, target: str, expected: bytes) -> bool:
        final = self._full(target)
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


def _unless_missing(error: OSError) -> None:
    """Without it a folder that cannot be read would be listed as an empty one."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _refuse_loop(folder: str) -> None:
    """Raise InputError for a link to a folder that it lies in: a listing would never end."""
    if not os.path.islink(folder):
        return
    target = Path(os.path.realpath(folder))
    if any(Path(os.path.realpath(above)).is_relative_to(target) for above in Path(folder).parents):
        raise InputError(
            f"{folder}: a link to {target}, in which it lies itself; expected folders without "
            "loops. Remove the link."
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
