"""Anything in any order may happen to a night; what must never happen does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "night_machine.py"
NUM_EXAMPLES = int(os.environ.get("TORTURE_KILLS", "300")) // 10
NUM_STEPS = 25
MUTANT_EXAMPLES = 300
"""So many at most: each is found in far fewer."""

takes_long = pytest.mark.skipif("TORTURE_KILLS" not in os.environ, reason="half a minute")
pytestmark = [pytest.mark.scenario, pytest.mark.timeout(3 * NUM_EXAMPLES + 300)]


def machine(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_sequence_of_events_loses_doubles_mixes_or_changes_a_row(tmp_path: Path) -> None:
    done = machine(tmp_path, NUM_EXAMPLES, NUM_STEPS)
    assert done.returncode == 0, done.stderr[-6_000:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mutant", "seen"),
    [
        ("write_in_place", "AssertionError"),
        ("let_the_last_win", "AssertionError"),  # a race, which ends in many ways
        ("forget_commits", "were scored again"),
        pytest.param("mix_inputs", "scores of another input", marks=takes_long),
    ],
)
def test_the_machine_finds_a_mistake(tmp_path: Path, mutant: str, seen: str) -> None:
    """The naive ways must fail here, or the test above shows nothing."""
    done = machine(tmp_path, MUTANT_EXAMPLES, NUM_STEPS, mutant)
    assert done.returncode == 1
    assert seen in done.stderr, done.stderr[-6_000:]
