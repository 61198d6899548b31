"""Every storage: a local disk, and a real object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import Storage, open_storage


@pytest.fixture(params=["local", "object"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "object":
        return str(request.getfixturevalue("s3_folder"))
    return str(tmp_path / "store")


@pytest.fixture
def storage(uri: str) -> Storage:
    return open_storage(uri)
