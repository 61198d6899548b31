"""The client of an S3 store: repeats what the store may answer well a moment later."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, cast

import aiohttp
import botocore.exceptions as boto
import s3fs
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper

from pipeline.errors import InputChangedError
from pipeline.store_errors import Patience, refused, unavailable

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

NOT_THAT_VERSION = frozenset({404, 412})


def reply_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and S3's code of an error, which s3fs translates; 0 and empty without a reply."""
    reply = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(reply, dict):
        return 0, ""
    status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(reply.get("Error", {}).get("Code", ""))


def is_passing(error: BaseException) -> bool:
    """Whether the same request may be answered well a moment later."""
    status, code = reply_of(error)
    if status or code:
        overloaded = status in (408, 429) or (status >= 500 and status != 501)
        return overloaded or code in TO_BE_REPEATED
    return isinstance(error, LOST)


def is_refusal(error: BaseException) -> bool:
    """Whether the store does not let us in, or we cannot even ask: no credentials, a wrong URL."""
    _, code = reply_of(error)
    cannot_ask = isinstance(error, (boto.BotoCoreError, ValueError))
    return isinstance(error, PermissionError) or code in REFUSALS or cannot_ask


class _WholeBody:
    """The content of an object, as s3fs reads it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self) -> bytes:
        return self._content

    def close(self) -> None:
        return


class PatientS3(s3fs.S3FileSystem):  # type: ignore[misc]
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

    call_s3 = sync_wrapper(_call_s3)  # theirs would call their own

    async def read_range(self, bucket: str, key: str, version: str, first: int, end: int) -> bytes:
        """Bytes from `first` up to `end` of one version of an object.

        Raises:
            InputChangedError: It is another one by now, or gone.
        """
        where, reply = f"s3://{bucket}/{key}", None
        try:
            reply = await self._call_s3(
                "get_object",
                Bucket=bucket,
                Key=key,
                Range=f"bytes={first}-{end - 1}",
                IfMatch=f'"{version}"',
            )
        except OSError as error:
            if reply_of(error)[0] not in NOT_THAT_VERSION:
                raise
        # Not every store looks at If-Match.
        if reply is None or reply["ETag"].strip('"') != version:
            raise InputChangedError(
                f"{where}: gone, or another version; expected version {version}, as it was listed. "
                "Run again to score the new data."
            )
        content = cast("bytes", await reply["Body"].read())
        if len(content) != end - first:
            raise OSError(errno.EIO, f"{len(content)} bytes instead of {end - first}", where)
        return content

    async def _expand_path(self, path: str | list[str], **_: Any) -> list[str]:
        # Ours are names, not patterns, even with `[` or `*`: what a pattern finds is another's.
        return [path] if isinstance(path, str) else path


async def _read_all(body: Any) -> bytes:
    try:
        return cast("bytes", await body.read())
    finally:
        body.close()
