"""Reading, over every storage, while others remove files."""

from __future__ import annotations

from pipeline.storage import Storage


def test_of_many_files_those_that_are_gone_are_none(storage: Storage) -> None:
    storage.create("a", b"1")
    storage.create("b", b"")
    assert storage.read_many(["gone", "b", "a", "no/where"]) == [None, b"", b"1", None]
    assert storage.read_many(["gone"]) == [None]
