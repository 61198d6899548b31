"""Create-only storage in an S3 bucket, through s3fs; see pipeline/storage.py."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, cast

import aiohttp
import botocore.exceptions as boto
import s3fs
from botocore.parsers import ResponseParserError

from pipeline.errors import ConfigError, StorageError
from pipeline.paths import checked
from pipeline.published_names import FIRST, version_of
from pipeline.storage import (
    MANIFEST,
    SUCCESS,
    FileInfo,
    UnfinishedUpload,
    occupied,
    s3_endpoint,
)
from pipeline.store_errors import Patience, refused, unavailable

DEADLINE_VARIABLE = "NIGHTSCORE_STORE_DEADLINE_S"
DEFAULT_DEADLINE_S = 60.0
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
"""Silence after which a request counts as lost; to copy a large part takes a store seconds."""

LOST = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    ConnectionError,
)
"""The answer did not come, not to its end, or damaged."""
TO_BE_REPEATED = frozenset(
    {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
    | {"SlowDown", "OperationAborted"}
)
"""Codes of S3 besides those that come with status 408, 429 or 5xx."""
REFUSALS = frozenset({"NoSuchBucket", "InvalidToken", "TokenRefreshRequired"})
"""Codes of S3 besides those that s3fs takes for a lack of permission."""
PRECONDITION_FAILED = 412


def _reply_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and S3's code of an error, which s3fs translates; 0 and empty without a reply."""
    reply = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(reply, dict):
        return 0, ""
    status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(reply.get("Error", {}).get("Code", ""))


def is_passing(error: BaseException) -> bool:
    """Whether the same request may be answered well a moment later."""
    status, code = _reply_of(error)
    if status or code:
        overloaded = status in (408, 429) or (status >= 500 and status != 501)
        return overloaded or code in TO_BE_REPEATED
    return isinstance(error, LOST)


def is_refusal(error: BaseException) -> bool:
    """Whether the store does not let us in, or we cannot even ask: no credentials, a wrong URL."""
    _, code = _reply_of(error)
    cannot_ask = isinstance(error, (boto.BotoCoreError, ValueError))
    return isinstance(error, PermissionError) or code in REFUSALS or cannot_ask


def _no_write(where: str, error: OSError) -> StorageError:
    """For a conditional write that was not made, although nothing is there."""
    status, _ = _reply_of(error)
    if status != PRECONDITION_FAILED:  # such as 409: others write there, again and again
        return unavailable(where, error)
    return StorageError(
        f"{where}: the store says that it exists, and does not show it; expected a write, or what "
        "is there. Use a store that shows at once what was written."
    )


class _WholeBody:
    """The content of an object, as s3fs reads it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self) -> bytes:
        return self._content

    def close(self) -> None:
        return


class _PatientS3(s3fs.S3FileSystem):  # type: ignore[misc]
    """Repeats requests until the store answers, or until its patience ends.

    botocore and s3fs would each repeat some of them, so many times: a damaged body not at all, a
    server that is not there for half a minute, one that resets connections for a minute and more.
    """

    retries = 1
    patience: Patience

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        where = f"s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', kwargs.get('Prefix', ''))}"
        pauses = None
        while True:
            try:
                reply = await super()._call_s3(method, *args, **kwargs)
                if method == "get_object":  # what goes wrong with the body is repeated too
                    reply["Body"] = _WholeBody(await _read_all(reply["Body"]))
            except Exception as error:
                if not is_passing(error):
                    self.patience.answered()
                    if is_refusal(error):
                        raise refused(where, error) from error
                    raise
                self.patience.failed()
                pauses = pauses or self.patience.pauses()
                pause_s = next(pauses, None)
                if pause_s is None:
                    raise unavailable(where, error) from error
            else:
                self.patience.answered()
                return reply
            await asyncio.sleep(pause_s)

    async def _expand_path(self, path: str | list[str], **_: Any) -> list[str]:
        # Ours are names, not patterns, even with `[` or `*`: what a pattern finds is another's.
        return [path] if isinstance(path, str) else path


async def _read_all(body: Any) -> bytes:
    try:
        return cast("bytes", await body.read())
    finally:
        body.close()


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

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._root = self.uri.removeprefix("s3://")
        endpoint = s3_endpoint()
        # A listing cache would hide what other processes wrote; a cached instance may have been
        # made by another thread's event loop.
        self._fs = _PatientS3(
            endpoint_url=endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                **({"s3": {"addressing_style": "path"}} if endpoint else {}),
            },
        )
        self._patience = self._fs.patience = Patience(_deadline_s())

    def _full(self, path: str) -> str:
        return f"{self._root}/{checked(path, self.uri)}".rstrip("/")

    def list_files(self, prefix: str) -> list[FileInfo]:
        try:
            found = self._fs.find(self._full(prefix), detail=True)
        except FileNotFoundError:
            return []
        # Stores and consoles may keep folders as objects; they are no files.
        infos = [
            self._info(full, entry)
            for full, entry in found.items()
            if entry["type"] == "file" and not full.endswith("/")
        ]
        return sorted(infos, key=lambda info: info.path)

    def list_folders(self, prefix: str) -> list[str]:
        try:
            found = self._fs.ls(self._full(prefix), detail=True)
        except FileNotFoundError:
            return []
        folders = (entry["name"] for entry in found if entry["type"] == "directory")
        return sorted(folder.rstrip("/").rpartition("/")[2] for folder in folders)

    def _info(self, full: str, entry: dict[str, Any]) -> FileInfo:
        relative = full.removeprefix(f"{self._root}/")
        return FileInfo(
            path=relative,
            num_bytes=entry["size"],
            version=entry["ETag"].strip('"'),
            modified_at=entry["LastModified"].timestamp(),
        )

    def info(self, path: str) -> FileInfo | None:
        full = self._full(path)
        try:
            entry = self._fs.info(full)
        except FileNotFoundError:
            return None
        return self._info(full, entry) if entry["type"] == "file" else None

    def open(self, path: str) -> BinaryIO:
        return cast("BinaryIO", self._fs.open(self._full(path), "rb", cache_type="readahead"))

    def read(self, path: str) -> bytes | None:
        try:
            return cast("bytes", self._fs.cat_file(self._full(path)))
        except FileNotFoundError:
            return None

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        full = [self._full(path) for path in paths]
        contents = self._fs.cat(full, on_error="return") if full else {}
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
        bucket, _, root = self._root.partition("/")
        found: list[UnfinishedUpload] = []
        wanted = {"Bucket": bucket, "Prefix": f"{root}/{prefix}".strip("/") + "/"}
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            if found:
                wanted["KeyMarker"] = page["NextKeyMarker"]
                wanted["UploadIdMarker"] = page["NextUploadIdMarker"]
            page = self._fs.call_s3("list_multipart_uploads", **wanted)
            found += [
                UnfinishedUpload(
                    path=upload["Key"].removeprefix(f"{root}/"),
                    upload_id=upload["UploadId"],
                    started_at=upload["Initiated"].timestamp(),
                )
                for upload in page.get("Uploads", ())
            ]
        return found

    def abort_upload(self, upload: UnfinishedUpload) -> None:
        bucket, key, _ = self._fs.split_path(self._full(upload.path))
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
