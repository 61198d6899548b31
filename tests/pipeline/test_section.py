"""What all sections refuse: switches for numbers, and addresses that say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.config_cases import GOOD, complaint, load


@pytest.mark.parametrize("switch", ["off", "no", "false", "on", "yes", "true"])
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("limits.min_rows", "expected a whole number."),
        ("limits.max_psi", "expected a number. Write null for none."),
        ("limits.drift_rows", "expected a whole number. Write null for none."),
        ("engine.gate.min_agreement", "expected a number."),
        ("window.deadline", "expected text. Write null for none."),
    ],
)
def test_a_switch_is_neither_a_number_nor_a_time(
    tmp_path: Path, key: str, expected: str, switch: str
) -> None:
    shown = "false" if switch in ("off", "no", "false") else "true"
    said = complaint(tmp_path, GOOD, "window.max_hours=1", f"{key}={switch}")
    assert said == f"job.yaml: {key}: {shown}; {expected}"


def test_a_switch_in_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    assert complaint(tmp_path, GOOD + "limits:\n  max_psi: off\n") == (
        "job.yaml, line 15: limits.max_psi: false; expected a number. Write null for none."
    )


@pytest.mark.parametrize("key", ["limits.max_usd", "lanes.threads"])
def test_false_is_not_told_to_be_too_small_a_number_alone(tmp_path: Path, key: str) -> None:
    assert complaint(tmp_path, GOOD, f"{key}=off").endswith(". Write null for none.")


def test_a_list_of_numbers_has_no_switch(tmp_path: Path) -> None:
    assert "model.mean: [1, True, 1]; expected a number." in (
        complaint(tmp_path, GOOD, "model.mean=[1, true, 1]")
    )


@pytest.mark.parametrize("key", ["output.delta", "lanes.mix_devices", "lanes.gpu_decode.enabled"])
@pytest.mark.parametrize("number", ["0", "1", "1.0"])
def test_a_number_is_no_switch(tmp_path: Path, key: str, number: str) -> None:
    said = complaint(tmp_path, GOOD, f"{key}={number}")
    assert said.endswith(f"{key}: {number}; expected true or false.")


def test_switches_whole_numbers_and_numbers_in_text_stay_what_they_are(tmp_path: Path) -> None:
    job = load(
        tmp_path,
        GOOD,
        "output.delta=yes",
        "lanes.mix_devices=off",
        "lanes.grace_s=3",
        "limits.max_psi=1e-3",  # text to YAML 1.1
        "window.deadline=07:00",
        "lanes.threads=8.0",
    )
    assert (job.output.delta, job.lanes.mix_devices) == (True, False)
    assert (job.lanes.grace_s, job.limits.max_psi, job.lanes.threads) == (3.0, 0.001, 8)
    assert job.window is not None
    assert job.window.deadline == "07:00"


@pytest.mark.parametrize("key", ["input.uri", "output.uri", "output.delta", "engine.store"])
@pytest.mark.parametrize("blank", ["''", "'  '"])
def test_an_address_is_not_blank(tmp_path: Path, key: str, blank: str) -> None:
    said = complaint(tmp_path, GOOD, f"{key}={blank}")
    assert f"{key}: {blank}; expected " in said
    assert said.endswith("a folder or `s3://bucket/prefix`.")
