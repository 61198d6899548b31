"""Rules that the project keeps about itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cost import find_price, load_prices
from pipeline.job_file import load_job

ROOT = Path(__file__).parents[2]
PACKAGES = ("engines", "pipeline", "flows")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PRICES = "prices.yaml"
MAX_MODULE_LINES = 400
MAX_TEST_LINES = 500

RUNTIMES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "nvidia.dali")
ADAPTERS = {
    "engines.graph": ("onnx",),
    "engines.round_weights": ("onnx",),
    "engines.quantize": ("onnx", "onnxruntime"),
    "engines.sensitivity": ("onnx", "onnxruntime"),
    "pipeline.decode_images": ("nvidia.dali",),
    "pipeline.decode_images_gpu": ("nvidia.dali",),
}
"""Modules that load a library when they are imported; all others import these when needed."""


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    prices = load_prices(ROOT / "configs" / PRICES)
    if path.name != PRICES:
        job = load_job(str(path))
        assert find_price(prices, job.cost.instance, job.cost.market).usd_per_hour > 0


def test_there_are_configs_to_start_from() -> None:
    assert {"demo.yaml", "demo-features.yaml", PRICES} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_test_modules_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_TEST_LINES


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_hold_no_code_of_their_own(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_text().strip() == ""


def test_importing_our_modules_loads_no_runtime(tmp_path: Path) -> None:
    """One process per package; the modules that adapt a runtime may load just that one."""
    names = [dotted(path) for path in MODULES]
    script = tmp_path / "imports.py"
    script.write_text(
        f"""\
import importlib, sys
adapters = {ADAPTERS!r}
for name in sorted({names!r}, key=lambda name: name in adapters):
    before = set(sys.modules)
    importlib.import_module(name)
    allowed = adapters.get(name, ())
    loaded = [r for r in {RUNTIMES!r} if r in sys.modules and r not in before]
    wrong = [r for r in loaded if r not in allowed]
    if wrong:
        print(name, "loads", wrong)
"""
    )
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


@pytest.mark.parametrize(
    "name", ["engines.store", "engines.build", "pipeline.plan", "pipeline.lane", "flows.cli"]
)
def test_each_of_these_alone_loads_no_runtime(name: str) -> None:
    code = f"import sys, {name}; print([r for r in {RUNTIMES!r} if r in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_the_layers_are_kept() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [str(program), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
