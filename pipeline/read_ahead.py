"""Files of a bucket whose bytes are fetched before they are asked for, several requests at once.

One request to an object store brings some 50 to 100 MB a second, however fast the network is, and
its first byte takes tens of milliseconds. So whoever reads says first what will be read, and it
comes in pieces side by side while rows that came before are decoded.
"""

from __future__ import annotations

import bisect
import io
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

PIECE_BYTES = 8 << 20
"""Of one request. Amazon advises 8 to 16 MB for ranges that are fetched side by side; source:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html"""
AHEAD_BYTES = 64 << 20
"""That may be on their way, or wait to be read: eight requests at once."""
GAP_BYTES = 1 << 18
"""Between two ranges, that are fetched with them: less than a request's latency is worth."""

Range = tuple[int, int]
"""First byte of a file, and the one behind the last."""
Fetch = Callable[[int, int], "Future[bytes]"]
"""Begins to fetch a range."""


class Piece:
    """A range that is fetched with one request, and kept until all that is wanted has been read.

    Args:
        first: First byte.
        end: The one behind the last.
        fetch: Begins to fetch a range of the file.
        num_unread: Bytes of it that will be read.
    """

    def __init__(self, first: int, end: int, fetch: Fetch, num_unread: int) -> None:
        self.first, self.end = first, end
        self.num_unread = num_unread
        self._fetch = fetch
        self._coming: Future[bytes] | None = None

    @property
    def num_bytes(self) -> int:
        """Of the range."""
        return self.end - self.first

    @property
    def is_begun(self) -> bool:
        """Whether it has been asked for."""
        return self._coming is not None

    def begin(self) -> None:
        """Ask for it."""
        self._coming = self._fetch(self.first, self.end)

    def content(self) -> bytes:
        """Its bytes, waited for; raises what the store raises."""
        assert self._coming is not None
        return self._coming.result()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.num_unread = 0
        if self._coming is not None:
            self._coming.cancel()


class ReadAhead:
    """Fetches pieces in the order in which they are named, so many bytes ahead of their readers.

    Threads may share it; there is one for all files of a storage.

    Args:
        max_bytes: On their way, or not read yet; as much again of a file that is being read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[Piece] = deque()
        self._held: set[Piece] = set()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def add(self, pieces: Iterable[Piece]) -> None:
        """They will be read, after those that were named before."""
        with self._lock:
            self._waiting.extend(pieces)
            self._begin_some()

    def need(self, pieces: Sequence[Piece]) -> None:
        """The first is read now, and the others next: begin those that have not begun.

        Whoever else has taken all that may wait: these come as if they were alone. Else files whose
        readers come later could make the first wait for one piece after the other.
        """
        with self._lock:
            num_bytes = 0
            for piece in pieces:
                num_bytes += piece.num_bytes
                if num_bytes > max(self._max_bytes, pieces[0].num_bytes):
                    return
                if not piece.is_begun:
                    self._begin(piece)

    def drop(self, pieces: Iterable[Piece]) -> None:
        """Nobody reads them any more: there is room for others."""
        with self._lock:
            for piece in pieces:
                piece.cancel()
                if piece in self._held:
                    self._held.remove(piece)
                    self._held_bytes -= piece.num_bytes
            self._begin_some()

    def _begin_some(self) -> None:
        while self._waiting:
            piece = self._waiting[0]
            if piece.num_unread and not piece.is_begun:
                if self._held and self._held_bytes + piece.num_bytes > self._max_bytes:
                    return
                self._begin(piece)
            self._waiting.popleft()

    def _begin(self, piece: Piece) -> None:
        piece.begin()
        self._held.add(piece)
        self._held_bytes += piece.num_bytes


class RangedFile(io.RawIOBase):
    """A file of which ranges can be fetched. One thread at a time may use it.

    Args:
        fetch: Begins to fetch a range of it.
        num_bytes: Its size.
        ahead: What fetches the pieces of this file, and of others.
    """

    def __init__(self, fetch: Fetch, num_bytes: int, ahead: ReadAhead) -> None:
        self._fetch = fetch
        self.num_bytes = num_bytes
        self._ahead = ahead
        self._position = 0
        self._pieces: list[Piece] = []
        self._unforeseen: Piece | None = None

    def will_read(self, ranges: Iterable[Range]) -> None:
        """Begin to fetch ranges that will be read: once each, and about in their order.

        What was said before holds no more.
        """
        self._drop(*self._pieces)
        self._pieces = [Piece(*cut, self._fetch, num_wanted) for cut, num_wanted in cuts(ranges)]
        self._ahead.add(self._pieces)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where it is read next."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read there next."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}
        self._position = max(0, start[whence] + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer at the end of the file; raises what the store raises."""
        wanted = self.num_bytes if size is None or size < 0 else size
        end = min(self._position + wanted, self.num_bytes)
        found = list(self._parts(self._position, end))
        self._position += sum(map(len, found))
        return found[0] if len(found) == 1 else b"".join(found)

    def close(self) -> None:
        """What was fetched and not read is gone."""
        self._drop(*self._pieces)
        super().close()

    def __del__(self) -> None:
        """Unlike other files it is not closed: a lock that `close` takes may be held just now."""

    def _parts(self, first: int, end: int) -> Iterator[bytes]:
        while first < end:
            piece, *others = self._pieces_from(first, end)
            stop = min(end, piece.end)
            self._ahead.need([piece, *others])
            try:
                content = piece.content()
            except BaseException:
                self._drop(piece)  # another try asks the store again
                raise
            yield content[first - piece.first : stop - piece.first]
            piece.num_unread -= stop - first
            if piece.num_unread <= 0:
                self._drop(piece)
            first = stop

    def _pieces_from(self, first: int, end: int) -> Sequence[Piece]:
        """The piece that holds byte `first`, and those behind it.

        If nobody said that it will be read it is another one, and as large as any: what is read
        next often lies behind it.
        """
        places = [piece.first for piece in self._pieces]
        index = bisect.bisect_right(places, first)
        if index and first < self._pieces[index - 1].end:
            return self._pieces[index - 1 :]
        if self._unforeseen is not None:
            self._drop(self._unforeseen)
            return self._pieces_from(first, end)
        bound = places[index] if index < len(places) else self.num_bytes
        stop = min(max(end, first + PIECE_BYTES), bound)
        self._unforeseen = Piece(first, stop, self._fetch, stop - first)
        self._pieces.insert(index, self._unforeseen)
        return self._pieces[index:]

    def _drop(self, *pieces: Piece) -> None:
        gone = set(pieces)
        self._pieces = [piece for piece in self._pieces if piece not in gone]
        if self._unforeseen in gone:
            self._unforeseen = None
        self._ahead.drop(gone)


def cuts(ranges: Iterable[Range]) -> Iterator[tuple[Range, int]]:
    """Pieces that cover ranges, in the order of the file, each with how many bytes are wanted."""
    begin = stop = num_wanted = 0
    for first, end in sorted(ranges):
        first = max(first, stop)  # damaged footers name bytes twice
        while first < end:
            if num_wanted and (first - stop > GAP_BYTES or first >= begin + PIECE_BYTES):
                yield (begin, stop), num_wanted
                num_wanted = 0
            if not num_wanted:
                begin = first
            stop = min(end, begin + PIECE_BYTES)
            num_wanted += stop - first
            first = stop
    if num_wanted:
        yield (begin, stop), num_wanted
