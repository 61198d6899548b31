"""The wheel: exactly our packages, with the files that they need where no checkout is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"pipeline", "flows", "engines"}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        timeout=100,
        capture_output=True,
    )
    (wheel,) = folder.glob("nightscore-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_our_packages_and_nothing_else(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    (info,) = tops - PACKAGES
    assert info.startswith("nightscore-")
    assert info.endswith(".dist-info")


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_module_is_in_the_wheel(names: set[str], package: str) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    assert modules
    assert modules <= names
    assert f"{package}/py.typed" in names


def test_files_that_code_reads_are_in_the_wheel(names: set[str]) -> None:
    configs = {f"flows/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(configs) >= 3
    assert names >= configs | {"engines/imagenet_classes.txt", "pipeline/report.css"}


def test_nothing_that_was_left_lying_about_is_in_the_wheel(names: set[str]) -> None:
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".onnx"))]


def test_the_wheel_installs_the_command(names: set[str]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
