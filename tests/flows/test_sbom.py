"""The bill of materials: what is installed, and under which licence."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from flows.sbom import UNKNOWN_LICENCE, bill_of_materials


@pytest.fixture(scope="module")
def components() -> dict[str, dict[str, object]]:
    return {each["name"]: each for each in bill_of_materials()["components"]}


@pytest.mark.parametrize("name", ["pyarrow", "prefect", "pydantic-core", "botocore", "torch"])
def test_what_is_required_directly_or_not_is_listed(
    components: dict[str, dict[str, object]], name: str
) -> None:
    assert components[name]["version"] == version(name)
    assert components[name]["purl"] == f"pkg:pypi/{name}@{version(name)}"
    assert components[name]["type"] == "library"


def test_nearly_all_licences_are_known(components: dict[str, dict[str, object]]) -> None:
    licences = {name: each["licenses"] for name, each in components.items()}
    unknown = [name for name, found in licences.items() if UNKNOWN_LICENCE in str(found)]
    assert len(unknown) <= 0.05 * len(licences), unknown
    assert "Apache" in str(licences["pyarrow"])


def test_the_command_prints_one_document_and_no_path() -> None:
    score = Path(sys.executable).with_name("score")
    done = subprocess.run([score, "doctor", "--sbom"], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "nightscore"
    assert str(Path(sys.prefix)) not in done.stdout
