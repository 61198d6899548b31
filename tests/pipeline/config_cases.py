"""A small job file, and what is said of it once it is spoilt."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Job
from pipeline.errors import ConfigError
from pipeline.job_file import load_job

GOOD = """\
name: users
input:
  uri: in
  passthrough: [user_id]
  features:
    columns: ["f*"]
model:
  source: model.onnx
  head: scores
output:
  uri: out
cost:
  instance: c6i.large
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_job(str(path), overrides)


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    """What is said of a wrong file; one sentence or two, on one line, that name the file."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", ".)", "?"))
    return message.replace(str(tmp_path / "job.yaml"), "job.yaml")
