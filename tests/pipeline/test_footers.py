"""Footers that cannot be read: told in a few words, in no time, and never with an exception."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hostile_inputs import footer_of, mutant_parquet, parquet_bytes, with_footer, with_promise
from pipeline_cases import users

from pipeline.errors import InputChangedError, StoreUnavailableError
from pipeline.footers import Footer, check_pin, read_footers
from pipeline.local_storage import LocalStorage
from pipeline.report import UnreadableFile

GOOD = parquet_bytes(users(200), 100)
FOOTER = footer_of(GOOD)
LIST_OF_STRUCTS = 0xFC


def footer_for(tmp_path: Path, *contents: bytes) -> list[Footer | UnreadableFile]:
    for number, content in enumerate(contents):
        (tmp_path / f"{number:05d}.parquet").write_bytes(content)
    storage = LocalStorage(str(tmp_path))
    return read_footers(storage, storage.list_files(""))


def big_list(num_items: int, item: bytes, sent: int) -> bytes:
    """A footer whose list of row groups says `num_items` and sends fewer."""
    size, rest = b"", num_items
    while rest > 0x7F:
        size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
    return b"\x15\x02\x39" + bytes([LIST_OF_STRUCTS]) + size + bytes([rest]) + item * sent + b"\0"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"PAR1", "no Parquet magic bytes at its end"),
        (b"a,b\n1,2\n" * 1000, "no Parquet magic bytes at its end"),
        (GOOD[:-100], "no Parquet magic bytes at its end"),
        (GOOD[:-4] + b"PARE", "its footer is encrypted"),
        (b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1", "a footer of 2147483655 bytes in a"),
        (b"PAR1" + b"\xff" * 100 + b"\x10\0\0\0PAR1", "damaged footer ("),
        (b"PAR1" + b"\0" * 8 + b"PAR1", "damaged footer ("),
        (with_promise(GOOD, 200, 201), "damaged footer (201 rows, and 200 in its row groups)"),
        (with_promise(GOOD, 100, 2**62), "damaged footer (200 rows, and "),
        (with_footer(GOOD, big_list(2**31 - 1, b"", 0)), "damaged footer ("),
        (with_footer(GOOD, big_list(2**27, b"\0", 10_000)), "damaged footer ("),
        (with_footer(GOOD, b"\x1c" * 100_000 + b"\0" * 100_000), "damaged footer ("),
        (with_footer(GOOD, b"\x15\x02\x48" + b"\xff" * 9), "damaged footer ("),
    ],
)
def test_what_is_wrong_is_told_in_a_few_words(tmp_path: Path, content: bytes, said: str) -> None:
    good, bad = footer_for(tmp_path, GOOD, content)
    assert isinstance(good, Footer)
    assert (good.file.num_rows, good.group_rows) == (200, (100, 100))
    assert isinstance(bad, UnreadableFile)
    assert bad.message.startswith(said)
    assert "\n" not in bad.message
    assert bad.num_bytes == len(content)


def test_a_type_that_pyarrow_does_not_know_is_no_damage(tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.parquet"
    pl.DataFrame({"user_id": [1]}).with_columns(big=pl.lit(1, pl.Int128)).write_parquet(unknown)
    (bad,) = read_footers(LocalStorage(str(tmp_path)), LocalStorage(str(tmp_path)).list_files(""))
    assert isinstance(bad, UnreadableFile)
    assert bad.message.startswith("a footer with a type that pyarrow cannot read (Integers with ")


def test_a_footer_beyond_all_reason_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.footers.MAX_FOOTER_BYTES", len(FOOTER))
    (found,) = footer_for(tmp_path, GOOD)
    assert isinstance(found, UnreadableFile)
    assert found.message == f"a footer of {len(FOOTER) + 8} bytes, more than {len(FOOTER)}"


def test_footers_made_to_take_memory_take_little(tmp_path: Path) -> None:
    """Lists that say a million, and elements as short as they may be."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    group = b"\x19\xfc\xc0\x84\x3d" + b"\x26\0\0" * 10  # a million columns; ten are there
    contents = [with_footer(GOOD, big_list(10**6, group, 2)) for _ in range(16)]
    assert all(isinstance(found, UnreadableFile) for found in footer_for(tmp_path, *contents))
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after_kib - before_kib < 500 << 10


def test_mutants_are_read_or_told_of_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(20261121)
    other = parquet_bytes(pa.table({"x": ["a", "b"] * 50}), 10)
    began = time.perf_counter()
    found = footer_for(tmp_path, *(mutant_parquet(GOOD, other, rng) for _ in range(1_000)))
    assert time.perf_counter() - began < 20
    unreadable = [file for file in found if isinstance(file, UnreadableFile)]
    assert 200 < len(unreadable) < 900
    assert all(file.message and "\n" not in file.message for file in unreadable)
    for footer in found:
        if isinstance(footer, Footer):
            assert sum(footer.group_rows) == footer.file.num_rows
            assert min(footer.group_rows, default=0) >= 0


def test_a_file_that_ends_earlier_than_it_was_listed_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(GOOD)
    storage = LocalStorage(str(tmp_path))
    infos = storage.list_files("")
    (tmp_path / "a.parquet").write_bytes(GOOD[:-50])
    with pytest.raises(InputChangedError, match="ends 50 bytes early; expected"):
        read_footers(storage, infos)


def test_a_store_that_fails_is_no_damage(tmp_path: Path) -> None:
    class Broken(LocalStorage):
        def open(self, path: str, known: object = None) -> object:  # type: ignore[override]
            del known
            raise OSError(5, f"Input/output error: {path}")

    (tmp_path / "a.parquet").write_bytes(GOOD)
    storage = Broken(str(tmp_path))
    with pytest.raises(StoreUnavailableError, match="Input/output error"):
        read_footers(storage, storage.list_files(""))


def test_a_file_that_was_unreadable_and_is_repaired_is_another_file(tmp_path: Path) -> None:
    (found,) = footer_for(tmp_path, GOOD[:-1])
    assert isinstance(found, UnreadableFile)
    storage = LocalStorage(str(tmp_path))
    check_pin(found, storage)
    (tmp_path / "00000.parquet").write_bytes(GOOD)
    with pytest.raises(InputChangedError, match="as when the run was planned"):
        check_pin(found, storage)


def test_equal_schemas_are_one_object(tmp_path: Path) -> None:
    other = parquet_bytes(users(100).rename_columns(["a", "b", "c"]), 100)
    found = footer_for(tmp_path, GOOD, other, GOOD)
    schemas = [footer.schema for footer in found if isinstance(footer, Footer)]
    assert schemas[0] is schemas[2]
    assert not schemas[0].equals(schemas[1])
