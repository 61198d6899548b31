"""Create-only storage in an S3 bucket, through fsspec; see pipeline/storage.py."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, ParamSpec, TypeVar, cast

from pipeline.errors import StorageError
from pipeline.storage import MANIFEST, SUCCESS, FileInfo, UnfinishedUpload
from pipeline.store_errors import why

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
        return f"{self._root}/{path}".rstrip("/")

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
                    raise StorageError(f"s3://{full}: {why(error)}; expected a write.") from error
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

    @_named
    def delete_many(self, paths: Sequence[str]) -> None:
        if paths:
            self._fs.rm([self._full(path) for path in paths])

    def copy(self, files: Mapping[str, str]) -> None:
        self._copy((self._full(source), self._full(path)) for path, source in files.items())

    @_named
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

    @_named
    def abort_upload(self, upload: UnfinishedUpload) -> None:
        bucket, key, _ = self._fs.split_path(self._full(upload.path))
        with suppress(FileNotFoundError):
            self._fs.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.upload_id
            )

    def publish(self, files: dict[str, str], manifest: bytes, target: str) -> bool:
        if self.read(f"{target}/{MANIFEST}") is not None:
            return False
        # Server-side copies under names that only this run uses: repeating them is harmless.
        self._copy_into(target, files)
        if not self.create(f"{target}/{MANIFEST}", manifest):
            return False
        self._remove_strays(target, set(files))
        self.create(f"{target}/{SUCCESS}", b"")
        return True

    def _remove_strays(self, target: str, named: set[str]) -> None:
        """Remove what other runs copied and never published: only one can, and that was us."""
        found = self.list_files(target)
        published_at = next(
            info.modified_at for info in found if info.path == f"{target}/{MANIFEST}"
        )
        # Whatever came after the manifest may be a next version's.
        strays = [
            info.path
            for info in found
            if info.modified_at < published_at and info.path.removeprefix(f"{target}/") not in named
        ]
        self.delete_many(strays)

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

    @_named
    def _put_instead(self, full: str, data: bytes, version: str) -> None:
        # In one request, however large: only such a one is conditional here.
        self._fs.pipe_file(full, data, chunksize=2**31, IfMatch=f'"{version}"')

    def _copy_into(self, target: str, files: dict[str, str]) -> None:
        self.copy({f"{target}/{name}": source for name, source in files.items()})

    @_named
    def _copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        sources, targets = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
        self._fs.copy(list(sources), list(targets), on_error="raise")
