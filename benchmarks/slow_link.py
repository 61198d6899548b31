"""A TCP proxy as far away as a cloud's object store: latency for each request, and a bounded rate.

    python -m benchmarks.slow_link PORT LATENCY_MS MB_PER_S

Listens on a free port of 127.0.0.1, which it prints, and passes all on to PORT. The first byte of
each answer comes late, and one connection brings no more than so many bytes a second, however many
there are: Amazon names 100 to 200 ms and 85 to 90 MB/s for S3. Source:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 1 << 17


class _Link:
    """One connection through the proxy."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s
        self._is_asked = False
        self._free_at = 0.0
        """When the next byte may come."""

    async def up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests; at their own pace."""
        while data := await reader.read(CHUNK_BYTES):
            self._is_asked = True
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers: late, and slowly."""
        while data := await reader.read(CHUNK_BYTES):
            now = time.monotonic()
            if self._is_asked:
                self._is_asked, self._free_at = False, now + self._latency_s
            self._free_at = max(self._free_at, now) + len(data) / self._bytes_per_s
            await asyncio.sleep(self._free_at - now)
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def _serve(port: int, latency_s: float, bytes_per_s: float) -> None:
    held: set[asyncio.Task[None] | None] = set()  # asyncio itself holds its tasks weakly

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.add(asyncio.current_task())
        there, back = await asyncio.open_connection("127.0.0.1", port)
        link = _Link(latency_s, bytes_per_s)
        with suppress(OSError):
            await asyncio.gather(link.up(reader, back), link.down(there, writer))
        back.close()
        writer.close()
        held.discard(asyncio.current_task())

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


@contextmanager
def slow_link(address: str, latency_ms: float, mb_per_s: float) -> Iterator[str]:
    """Meanwhile, another address of the server at `address`; the proxy has its own process."""
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "benchmarks.slow_link", port, f"{latency_ms}", f"{mb_per_s}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            yield f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        finally:
            proxy.terminate()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2]) / 1e3, float(sys.argv[3]) * 1e6))
