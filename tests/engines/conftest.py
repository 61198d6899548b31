"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.store import EngineStore
from tests.engines.small_stores import local_store


@pytest.fixture(autouse=True)
def short_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which candidate wins is no matter here."""
    monkeypatch.setattr("engines.gate.RACE_S", 0.005)


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return local_store(tmp_path / "store")


@pytest.fixture
def said() -> tuple[list[str], Callable[[str], None]]:
    lines: list[str] = []
    return lines, lines.append
