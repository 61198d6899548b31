"""Files whose bytes come before they are asked for: the same bytes, once, and never too many."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import pytest

from pipeline import read_ahead
from pipeline.read_ahead import RangedFile, ReadAhead, cuts

pytestmark = pytest.mark.timeout(30)
PIECE, GAP = 100, 10
CONTENT = random.Random(0).randbytes(5_000)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(read_ahead, "GAP_BYTES", GAP)


class Store:
    """Brings ranges of `CONTENT`, those of `slowly` when it is told to."""

    def __init__(self, slowly: bool = False) -> None:
        self.asked: list[tuple[int, int]] = []
        self.open: dict[tuple[int, int], Future[bytes]] = {}
        self.failures = 0
        self._slowly = slowly

    def fetch(self, first: int, end: int) -> Future[bytes]:
        self.asked.append((first, end))
        coming: Future[bytes] = Future()
        self.open[first, end] = coming
        if self.failures:
            self.failures -= 1
            coming.set_exception(OSError(5, "Input/output error"))
        elif not self._slowly:
            self.bring(first, end)
        return coming

    def bring(self, first: int, end: int) -> None:
        self.open.pop((first, end)).set_result(CONTENT[first:end])


def a_file(store: Store, max_bytes: int = 10 * PIECE) -> RangedFile:
    return RangedFile(store.fetch, len(CONTENT), ReadAhead(max_bytes))


def some_ranges(rng: random.Random) -> list[tuple[int, int]]:
    """As of a footer: mostly one after the other, some of them nonsense."""
    ranges = []
    for _ in range(rng.randrange(12)):
        first = rng.randrange(len(CONTENT))
        ranges.append((first, min(len(CONTENT), first + rng.choice([0, 1, 7, 90, 100, 350]))))
    return ranges


@pytest.mark.parametrize("seed", range(50))
def test_pieces_cover_what_is_wanted_and_little_more(seed: int) -> None:
    ranges = some_ranges(random.Random(seed))
    wanted = {byte for first, end in ranges for byte in range(first, end)}
    pieces = list(cuts(ranges))
    covered = [byte for (first, end), _ in pieces for byte in range(first, end)]
    assert covered == sorted(set(covered)), "in order, and no byte twice"
    assert wanted <= set(covered)
    for (first, end), num_wanted in pieces:
        assert end - first <= PIECE
        inside = sorted(wanted & set(range(first, end)))
        assert num_wanted == len(inside)
        assert (inside[0], inside[-1]) == (first, end - 1)
        assert all(after - before <= GAP + 1 for before, after in pairwise(inside))


def test_what_lies_close_together_comes_with_one_request() -> None:
    assert list(cuts([(0, 20), (20, 40), (50, 60)])) == [((0, 60), 50)]
    assert list(cuts([(0, 20), (31, 40)])) == [((0, 20), 20), ((31, 40), 9)]
    assert list(cuts([(10, 260)])) == [((10, 110), 100), ((110, 210), 100), ((210, 260), 50)]
    assert list(cuts([])) == []


@pytest.mark.parametrize("seed", range(100))
def test_it_reads_like_any_file(seed: int) -> None:
    rng = random.Random(seed)
    with ThreadPoolExecutor(4) as pool:

        def fetch(first: int, end: int) -> Future[bytes]:
            return pool.submit(lambda: CONTENT[first:end])

        file = RangedFile(fetch, len(CONTENT), ReadAhead(rng.choice([1, 150, 1_000])))
        true = io.BytesIO(CONTENT)
        for _ in range(60):
            if rng.random() < 0.2:
                file.will_read(some_ranges(rng))
            if rng.random() < 0.7:
                whence = rng.choice([io.SEEK_SET, io.SEEK_END])
                offset = rng.randrange(len(CONTENT) + 50) - (whence and len(CONTENT))
                assert file.seek(offset, whence) == true.seek(offset, whence)
            size = rng.choice([-1, 0, 1, 30, 100, 700])
            assert file.read(size) == true.read(size)
            assert file.tell() == true.tell()
        assert file.readable()
        assert file.seekable()
        file.close()


def test_what_is_to_be_read_comes_at_once_and_only_once() -> None:
    store = Store()
    file = a_file(store)
    file.will_read([(0, 250), (400, 450)])
    assert store.asked == [(0, 100), (100, 200), (200, 250), (400, 450)]
    for first, end in ((400, 450), (0, 30), (30, 170), (170, 250)):  # in whatever order
        file.seek(first)
        assert file.read(end - first) == CONTENT[first:end]
    assert len(store.asked) == 4


def test_no_more_comes_than_may_wait() -> None:
    store = Store(slowly=True)
    file = a_file(store, max_bytes=250)
    file.will_read([(0, 1_000)])
    assert store.asked == [(0, 100), (100, 200)]
    store.bring(0, 100)
    assert len(store.asked) == 2, "it has come, and waits to be read"
    file.read(99)
    assert len(store.asked) == 2
    file.read(1)
    assert store.asked[2:] == [(200, 300)]


def test_a_piece_that_is_larger_than_all_that_may_wait_comes_alone() -> None:
    store = Store()
    file = a_file(store, max_bytes=1)
    file.will_read([(0, 300)])
    assert store.asked == [(0, 100)]
    assert file.read(300) == CONTENT[:300]


def test_what_is_asked_for_comes_in_any_case_and_what_lies_behind_it() -> None:
    store = Store()
    file = a_file(store, max_bytes=200)
    file.will_read([(0, 1_000)])
    assert store.asked == [(0, 100), (100, 200)]
    file.seek(450)
    assert file.read(50) == CONTENT[450:500]
    assert store.asked[2:] == [(400, 500), (500, 600)]


def test_a_file_that_is_read_does_not_wait_for_files_that_are_read_later() -> None:
    """Several are opened at once, and the last may be the first to say what it will read."""
    store, ahead = Store(), ReadAhead(300)
    first = RangedFile(store.fetch, len(CONTENT), ahead)
    last = RangedFile(store.fetch, len(CONTENT), ahead)
    last.will_read([(2_000, 2_500)])
    first.will_read([(0, 500)])
    assert store.asked == [(2_000, 2_100), (2_100, 2_200), (2_200, 2_300)]
    assert first.read(100) == CONTENT[:100]
    assert store.asked[3:] == [(0, 100), (100, 200), (200, 300)], "side by side all the same"
    assert first.read(100) == CONTENT[100:200]
    assert store.asked[6:] == [(300, 400)]


def test_what_is_said_last_holds() -> None:
    store = Store(slowly=True)
    file = a_file(store)
    file.will_read([(0, 100)])
    file.will_read([(50, 150)])
    assert store.open[0, 100].cancelled()
    store.bring(50, 150)
    file.seek(50)
    assert file.read(100) == CONTENT[50:150]


def test_files_share_what_may_wait_and_the_first_comes_first() -> None:
    store, ahead = Store(slowly=True), ReadAhead(150)
    first = RangedFile(store.fetch, len(CONTENT), ahead)
    second = RangedFile(store.fetch, len(CONTENT), ahead)
    first.will_read([(0, 200)])
    second.will_read([(300, 400)])
    assert store.asked == [(0, 100)]
    first.close()
    assert store.asked[1:] == [(300, 400)], "nobody waits for the rest of the first"
    assert store.open[0, 100].cancelled()


def test_what_nobody_foresaw_comes_with_what_lies_behind_it() -> None:
    store = Store()
    file = a_file(store)
    file.will_read([(150, 200)])
    assert [file.read(20) for _ in range(3)] == [CONTENT[i : i + 20] for i in (0, 20, 40)]
    assert store.asked == [(150, 200), (0, 100)]
    file.seek(110)
    assert file.read(300) == CONTENT[110:410]
    assert store.asked[2:] == [(110, 150), (200, 410)]


def test_what_failed_is_asked_for_again_by_the_next_read() -> None:
    store = Store()
    store.failures = 1
    file = a_file(store)
    file.will_read([(0, 50)])
    with pytest.raises(OSError, match="Input/output error"):
        file.read(50)
    assert file.tell() == 0
    assert file.read(50) == CONTENT[:50]


@pytest.fixture
def reader() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_reading_waits_for_what_is_on_its_way(reader: ThreadPoolExecutor) -> None:
    store = Store(slowly=True)
    file = a_file(store)
    file.will_read([(0, 100)])
    reading = reader.submit(file.read, 40)
    with pytest.raises(TimeoutError):
        reading.result(0.05)
    store.bring(0, 100)
    assert reading.result(10) == CONTENT[:40]
