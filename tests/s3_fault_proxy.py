"""An HTTP proxy in front of an S3 server that makes faults, request by request.

    kind                          what the client sees                         is it applied?
    500 503 429 403 409 slowdown  that status with an S3 error document        no
    reset_before                  connection reset                             no
    reset_after                   connection reset                             yes
    500_after                     500 InternalError                            yes
    200_error                     200 with an error document (copies)          yes
    truncated                     half of the body, then a reset               yes
    flipped                       one bit of the body changed                  yes
    slow                          the reply after a while                      yes
    overwrites                    a conditional write that ignores its condition

Listens on 127.0.0.1 only; plain HTTP, path-style addresses.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import s3fs

STATUS_FAULTS = {
    "500": (500, "InternalError"),
    "503": (503, "ServiceUnavailable"),
    "429": (429, "TooManyRequests"),
    "slowdown": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "409": (409, "ConditionalRequestConflict"),
}
HEAD_END = b"\r\n\r\n"
SLOW_S = 1.0


@dataclass(kw_only=True)
class Fault:
    """What happens to some of the requests."""

    kind: str
    method: str = ""
    """Any by default."""
    match: str = ""
    """Part of the address, decoded."""
    skip: int = 0
    """So many matching requests pass before the first."""
    times: float = 1
    fired: int = 0


ALWAYS = math.inf


def reply(status: int, body: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return head.encode() + HEAD_END + body


def s3_error(code: str) -> bytes:
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
    return text.encode()


async def read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The raw body after `head`, chunk framing included, so that it can be passed on as it is."""
    length = 0
    for line in head.lower().split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"transfer-encoding" and b"chunked" in value:
            return await read_chunks(reader)
        if name == b"content-length":
            length = int(value)
    return await reader.readexactly(length)


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    raw = b""
    while True:
        size_line = await reader.readline()
        size = int(size_line.split(b";")[0], 16)
        raw += size_line + await reader.readexactly(size + 2)
        if size == 0:
            return raw


def without_headers(head: bytes, *names: bytes) -> bytes:
    lines = head.removesuffix(HEAD_END).split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].lower() not in names]
    return b"\r\n".join(kept) + HEAD_END


@dataclass
class FaultProxy:
    """A proxy that runs; set `faults` at any time."""

    upstream: str
    """Address of the S3 server."""
    files: Any
    """The server's files (s3fs), behind the proxy's back."""
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, decoded address and kind of fault of each request."""
    address: str = ""

    def num_requests(self, method: str, match: str) -> int:
        return sum(method == each[0] and match in each[1] for each in self.log)

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one_request(reader, writer):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, which is its right, or the test is over
        finally:
            writer.close()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; False ends the connection."""
        head = await reader.readuntil(HEAD_END)
        method, path, _ = head.split(b"\r\n")[0].decode().split(" ", 2)
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue" + HEAD_END)
            await writer.drain()
        body = await read_body(reader, head)
        kind = self._pick(method, unquote(path))
        self.log.append((method, unquote(path), kind))
        if kind in STATUS_FAULTS:
            status, code = STATUS_FAULTS[kind]
            writer.write(reply(status, b"" if method == "HEAD" else s3_error(code)))
            return True
        if kind == "slow":
            await asyncio.sleep(SLOW_S)
        if kind == "overwrites" and b"\r\nif-none-match:" in head.lower():
            await asyncio.to_thread(self.files.rm_file, unquote(urlsplit(path).path).lstrip("/"))
        if kind == "reset_before":
            writer.transport.abort()
            return False
        head_back, body_back = await self._forward(method, head, body)
        return await self._answer(writer, kind, head_back, body_back)

    async def _answer(
        self, writer: asyncio.StreamWriter, kind: str, head: bytes, body: bytes
    ) -> bool:
        if kind == "reset_after":
            writer.transport.abort()
            return False
        if kind in ("500_after", "200_error"):
            writer.write(reply(500 if kind == "500_after" else 200, s3_error("InternalError")))
            return True
        if kind == "truncated":
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            writer.transport.abort()
            return False
        if kind == "flipped":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        writer.write(head + body)
        return True

    def _pick(self, method: str, path: str) -> str:
        for fault in self.faults:
            if fault.method not in ("", method) or fault.match not in path:
                continue
            if fault.skip > 0:
                fault.skip -= 1
            elif fault.fired < fault.times:
                fault.fired += 1
                return fault.kind
        return ""

    async def _forward(self, method: str, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        port = urlsplit(self.upstream).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = without_headers(head, b"connection", b"expect").removesuffix(HEAD_END)
            writer.write(head + b"\r\nConnection: close" + HEAD_END + body)
            await writer.drain()
            head_back = await reader.readuntil(HEAD_END)
            status = int(head_back.split(b" ", 2)[1])
            no_body = method == "HEAD" or status in (204, 304)
            body_back = b"" if no_body else await read_body(reader, head_back)
            return without_headers(head_back, b"connection"), body_back
        finally:
            writer.close()


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy in a thread of its own, on a free port."""
    files = s3fs.S3FileSystem(
        endpoint_url=upstream,
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"s3": {"addressing_style": "path"}},
    )
    proxy = FaultProxy(upstream, files)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault-proxy")
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(proxy.client, "127.0.0.1", 0, limit=1 << 20)

    async def stop() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    try:
        server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        proxy.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield proxy
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
