"""Names of classes: one for each class of the model, or nothing is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_cases import DATE, a_job, job_data, users, write_input

import pipeline.run
from engines.build import ResolvedEngine
from engines.manifest import StoredEngine
from pipeline.engine import load_class_names
from pipeline.errors import ConfigError
from pipeline.lane import LaneDevice
from pipeline.run import Night, PreparedRun, RunClock, lane_setup
from tests.engines.small_stores import a_manifest

DEVICE = LaneDevice(name="cpu", num_threads=1)


def prepared(root: Path, monkeypatch: pytest.MonkeyPatch, num_classes: int) -> PreparedRun:
    monkeypatch.setattr(pipeline.run, "fingerprint_model", lambda _: "model")
    write_input(root / "in", users(20))
    job = a_job(job_data(root), model={"head": "classes", "class_names": str(root / "names.txt")})
    engine = StoredEngine(folder="none", manifest=a_manifest(num_classes=num_classes))
    return pipeline.run.prepare_run(
        Night(job=job, date=DATE),
        [DEVICE],
        RunClock(),
        lambda _: None,
        lambda *_, **__: ResolvedEngine(engine=engine, built=False, build_s=0.0),
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n", ("cat", "dog")),
        ("cat\r\ndog", ("cat", "dog")),
        ("cat\n\ndog\n\n", ("cat", "", "dog")),
        ("big\u2028cat\nhot\x0cdog\n", ("big\u2028cat", "hot\x0cdog")),
        ("\ufeffcat\ndog\n", ("cat", "dog")),
        ("", ()),
    ],
)
def test_a_name_ends_with_its_line(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    (tmp_path / "names.txt").write_bytes(text.encode())
    assert load_class_names(str(tmp_path / "names.txt")) == names


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"cat\ndo\xe9\n")
    with pytest.raises(ConfigError, match=r"names.txt: not UTF-8 \(byte 6\); expected a text file"):
        load_class_names(str(tmp_path / "names.txt"))


@pytest.mark.parametrize("text", ["", "cat\ndog\n", "cat\ndog\ncow\nhen\n"])
def test_each_class_has_a_name_or_the_night_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ConfigError, match=rf"{len(text.split())} names; expected 3, one for each"):
        prepared(tmp_path, monkeypatch, num_classes=3)
    assert not list((tmp_path / "out").rglob("commits"))


def test_names_are_those_of_when_the_night_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    run = prepared(tmp_path, monkeypatch, num_classes=2)
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert lane_setup(run, DEVICE, 1).layout.class_names == ("cat", "dog")


def test_an_engine_that_does_not_say_how_many_classes_it_has_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert prepared(tmp_path, monkeypatch, num_classes=0).class_names == ("cat", "dog")
