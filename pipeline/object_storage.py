"""Create-only storage in an S3 bucket, through s3fs; see pipeline/storage.py."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, BinaryIO, cast

from pipeline.errors import ConfigError, StorageError
from pipeline.paths import checked
from pipeline.patient_s3 import PatientS3, reply_of
from pipeline.published_names import FIRST, version_of
from pipeline.read_ahead import AHEAD_BYTES, RangedFile, ReadAhead
from pipeline.storage import (
    MANIFEST,
    SUCCESS,
    FileInfo,
    Known,
    UnfinishedUpload,
    occupied,
    s3_endpoint,
)
from pipeline.store_errors import Patience, unavailable

DEADLINE_VARIABLE = "NIGHTSCORE_STORE_DEADLINE_S"
DEFAULT_DEADLINE_S = 60.0
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
"""Silence after which a request counts as lost; to copy a large part takes a store seconds."""

NUM_CONNECTIONS = 64
"""More than are ever needed at once: ranges that come ahead, footers, copies. Ten are the rule."""
PRECONDITION_FAILED = 412
IN_ONE = {"max_concurrency": 1}
"""Request: s3fs would look first how large an object is, to ask for large ones in parts."""


def _no_write(where: str, error: OSError) -> StorageError:
    """For a conditional write that was not made, although nothing is there."""
    status, _ = reply_of(error)
    if status != PRECONDITION_FAILED:  # such as 409: others write there, again and again
        return unavailable(where, error)
    return StorageError(
        f"{where}: the store says that it exists, and does not show it; expected a write, or what "
        "is there. Use a store that shows at once what was written."
    )


def _deadline_s() -> float:
    text = os.environ.get(DEADLINE_VARIABLE, "")
    try:
        return float(text) if text else DEFAULT_DEADLINE_S
    except ValueError:
        raise ConfigError(f"{DEADLINE_VARIABLE}: {text!r}; expected seconds.") from None


class ObjectStorage:
    """A prefix of an S3 bucket; the store must honour If-None-Match (see `probe`).

    What the store may answer well a moment later is repeated: for `NIGHTSCORE_STORE_DEADLINE_S`
    seconds of the environment, 60 by default, or 15 if it has never answered.

    Raises:
        StoreUnavailableError: By any method: it did not answer in that time.
        StoreRefusedError: By any method, at once: no such bucket, no permission, no credentials.
    """

    is_far = True

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._root = self.uri.removeprefix("s3://")
        endpoint = s3_endpoint()
        # A listing cache would hide what other processes wrote; a cached instance may have been
        # made by another thread's event loop.
        self._fs = PatientS3(
            endpoint_url=endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": NUM_CONNECTIONS,
                **({"s3": {"addressing_style": "path"}} if endpoint else {}),
            },
        )
        self._bucket: str = self._fs.split_path(self._root)[0]
        self._patience = self._fs.patience = Patience(_deadline_s())
        self._ahead = ReadAhead(AHEAD_BYTES)

    def _full(self, path: str) -> str:
        return f"{self._root}/{checked(path, self.uri)}".rstrip("/")

    def _place(self, path: str) -> tuple[str, str]:
        """Bucket, which may be an access point with `/` in its name, and key."""
        return self._bucket, self._full(path).removeprefix(self._bucket).lstrip("/")

    def _folder(self, prefix: str) -> dict[str, str]:
        """What a listing of a folder is asked for by."""
        bucket, folder = self._place(prefix)
        return {"Bucket": bucket, "Prefix": f"{folder}/".lstrip("/")}

    def _path_of(self, key: str) -> str:
        return f"{self._bucket}/{key}".removeprefix(f"{self._root}/")

    def list_files(self, prefix: str) -> list[FileInfo]:
        infos = [
            self._info(entry["Key"], entry, entry["Size"])
            for page in self._pages(prefix)
            for entry in page.get("Contents", ())
            # Stores and consoles may keep folders as objects; they are no files.
            if not entry["Key"].endswith("/")
        ]
        return sorted(infos, key=lambda info: info.path)

    def list_folders(self, prefix: str) -> list[str]:
        pages = self._pages(prefix, Delimiter="/")
        folders = (entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ()))
        return sorted(folder.rstrip("/").rpartition("/")[2] for folder in folders)

    def _pages(self, prefix: str, **how: str) -> Iterator[dict[str, Any]]:
        """Replies to a listing of a folder: one request each, also where it is empty."""
        wanted = {**self._folder(prefix), **how}
        page = self._fs.call_s3("list_objects_v2", **wanted)
        yield page
        while token := page.get("NextContinuationToken"):
            page = self._fs.call_s3("list_objects_v2", **wanted, ContinuationToken=token)
            yield page

    def _info(self, key: str, entry: dict[str, Any], num_bytes: int) -> FileInfo:
        return FileInfo(
            path=self._path_of(key),
            num_bytes=num_bytes,
            version=entry["ETag"].strip('"'),
            modified_at=entry["LastModified"].timestamp(),
        )

    def info(self, path: str) -> FileInfo | None:
        bucket, key = self._place(path)
        try:
            entry = self._fs.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
        return self._info(key, entry, entry["ContentLength"])

    def open(self, path: str, known: Known | None = None) -> BinaryIO:
        bucket, key = self._place(path)
        file = known or self.info(path)
        if file is None:
            missing = f"s3://{bucket}/{key}"
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), missing)
        version = file.version

        def fetch(first: int, end: int) -> Future[bytes]:
            reading = self._fs.read_range(bucket, key, version, first, end)
            return asyncio.run_coroutine_threadsafe(reading, self._fs.loop)

        return cast("BinaryIO", RangedFile(fetch, file.num_bytes, self._ahead))

    def read(self, path: str) -> bytes | None:
        try:
            return cast("bytes", self._fs.cat_file(self._full(path), **IN_ONE))
        except FileNotFoundError:
            return None

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        full = [self._full(path) for path in paths]
        contents = self._fs.cat(full, on_error="return", **IN_ONE) if full else {}
        found = [contents[path] for path in full]
        for content in found:
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        return [content if isinstance(content, bytes) else None for content in found]

    def create(self, path: str, data: bytes) -> bool:
        full = self._full(path)
        pauses = self._patience.pauses()
        while True:
            try:
                self._fs.pipe_file(full, data, mode="create")
                return True
            except (OSError, StorageError) as error:
                # The store may have applied a request whose reply was lost: what is there decides.
                found = self.read(path)
                if found is not None:
                    return found == data
                if isinstance(error, StorageError):  # it was repeated for long enough
                    raise
                pause_s = next(pauses, None)
                if pause_s is None:
                    raise _no_write(f"s3://{full}", error) from error
            time.sleep(pause_s)

    def delete(self, path: str) -> None:
        try:
            self._fs.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def delete_many(self, paths: Sequence[str]) -> None:
        if paths:
            self._fs.rm([self._full(path) for path in paths])

    def copy(self, files: Mapping[str, str]) -> None:
        self._copy((self._full(source), self._full(path)) for path, source in files.items())

    def unfinished_uploads(self, prefix: str) -> list[UnfinishedUpload]:
        found: list[UnfinishedUpload] = []
        wanted = self._folder(prefix)
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            if found:
                wanted["KeyMarker"] = page["NextKeyMarker"]
                wanted["UploadIdMarker"] = page["NextUploadIdMarker"]
            page = self._fs.call_s3("list_multipart_uploads", **wanted)
            found += [
                UnfinishedUpload(
                    path=self._path_of(upload["Key"]),
                    upload_id=upload["UploadId"],
                    started_at=upload["Initiated"].timestamp(),
                )
                for upload in page.get("Uploads", ())
            ]
        return found

    def abort_upload(self, upload: UnfinishedUpload) -> None:
        bucket, key = self._place(upload.path)
        with suppress(FileNotFoundError):
            self._fs.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.upload_id
            )

    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        if self.read(f"{target}/{MANIFEST}") is not None:
            return False
        self._refuse_others(target, besides=files)
        # Server-side copies under names that only this run uses: repeating them is harmless.
        self._copy_into(target, files)
        if not self.create(f"{target}/{MANIFEST}", manifest):
            return False
        self._remove_strays(target, files)
        self.create(f"{target}/{SUCCESS}", b"")
        return True

    def check_free(self, target: str) -> None:
        if self.info(f"{target}/{MANIFEST}") is None:
            self._refuse_others(target)

    def _refuse_others(self, target: str, besides: Collection[str] = ()) -> None:
        """Raise StorageError for what no run has put there: parts are copied by those that die."""
        names = self._names_in(target) - set(besides)
        others = [name for name in names if version_of(name) is None]
        if others and MANIFEST not in names:
            raise occupied(f"{self.uri}/{target}", min(others))

    def _remove_strays(self, target: str, named: Collection[str]) -> None:
        """Remove what other runs copied and never published: only one can, and that was us."""
        strays = [name for name in self._names_in(target) - set(named) if version_of(name) == FIRST]
        self.delete_many([f"{target}/{name}" for name in sorted(strays)])

    def _names_in(self, target: str) -> set[str]:
        return {info.path.removeprefix(f"{target}/") for info in self.list_files(target)}

    def swap(self, files: dict[str, str], manifest: bytes, target: str, expected: bytes) -> bool:
        path = f"{target}/{MANIFEST}"
        # The version first: should the manifest change in between, it is no longer that version's.
        before = self.info(path)
        if before is None or self.read(path) != expected:
            return False
        self.delete(f"{target}/{SUCCESS}")
        self._copy_into(target, files)
        try:
            self._put_instead(self._full(path), manifest, before.version)
        except (OSError, StorageError):
            # Refused, or applied although the reply was lost: what is there decides (R8).
            found = self.read(path)
            if found == expected:
                raise
            return found == manifest
        return True

    def _put_instead(self, full: str, data: bytes, version: str) -> None:
        # In one request, however large: only such a one is conditional here.
        self._fs.pipe_file(full, data, chunksize=2**31, IfMatch=f'"{version}"')

    def _copy_into(self, target: str, files: dict[str, str]) -> None:
        named = {f"{target}/{checked(name, self.uri)}": source for name, source in files.items()}
        self.copy(named)

    def _copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        sources, targets = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
        self._fs.copy(list(sources), list(targets), on_error="raise")
