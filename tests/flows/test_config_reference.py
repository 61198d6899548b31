"""The reference page and the schema for editors say what pipeline/config.py says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
import yaml

from flows.config_reference import (
    REFERENCE,
    ROOT,
    SCHEMA,
    field_meanings,
    job_schema,
    reference_text,
    schema_text,
    sections,
)
from pipeline.config import Job
from pipeline.section import TEXTFILE

MEND = "run `python -m flows.config_reference`, and commit what it writes"
JOBS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "prices.yaml")


@pytest.mark.parametrize(("path", "text"), [(REFERENCE, reference_text), (SCHEMA, schema_text)])
def test_what_is_made_from_the_config_is_not_stale(path: str, text: Callable[[], str]) -> None:
    assert (ROOT / path).read_text() == text(), f"{path} is stale: {MEND}"


def test_every_key_has_a_meaning() -> None:
    without = [
        f"{section.path}.{key.name}"
        for section in sections()
        for key in section.keys
        if not key.meaning
    ]
    assert without == [], "write a docstring below these fields of pipeline/config.py"


def test_the_page_has_every_key_of_every_section() -> None:
    def keys_of(model: Any, path: str) -> set[str]:
        found = set()
        for name, value in model:
            found.add(f"{path}{name}")
            if isinstance(value, pydantic.BaseModel):
                found |= keys_of(value, f"{path}{name}.")
        return found

    job = Job.model_validate(yaml.safe_load(JOBS[0].read_text()))
    listed = {f"{s.path}.{key.name}".removeprefix(".") for s in sections() for key in s.keys}
    assert keys_of(job, "") <= listed
    assert "input.images.column" in listed
    assert "input.features.columns" in listed


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_our_own_jobs_name_the_schema_and_fit_it(path: Path) -> None:
    text = path.read_text()
    first = text.splitlines()[0]
    assert first == f"# yaml-language-server: $schema={Path(SCHEMA).name}"
    jsonschema.validate(yaml.safe_load(text), job_schema())


@pytest.mark.parametrize(
    "change",
    [{"lames": {}}, {"name": 3}, {"lanes": {"device": "tpu"}}, {"limits": {"min_rows": -1}}],
)
def test_the_schema_refuses_what_the_job_refuses(change: dict[str, Any]) -> None:
    wrong = {**yaml.safe_load(JOBS[0].read_text()), **change}
    with pytest.raises(pydantic.ValidationError):
        Job.model_validate(wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, job_schema())


def test_the_schema_is_valid_and_has_our_words() -> None:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    lanes = schema["$defs"]["LanesSection"]["properties"]
    assert lanes["grace_s"]["description"].startswith("Seconds that shards in work get")


def test_a_section_that_is_new_is_taken_without_a_change_here() -> None:
    class MailSection(pydantic.BaseModel):
        """Who is told."""

        to: tuple[str, ...] = ()
        """Addresses | people."""
        port: int = pydantic.Field(default=587, ge=1, le=65_535)

    class Wider(pydantic.BaseModel):
        """A job."""

        mail: MailSection | None = None

    _, mail = sections(Wider)
    assert (mail.path, mail.meaning) == ("mail", "Who is told.")
    to, port = mail.keys
    assert (to.kind, to.default, to.meaning) == ("list: text", "`[]`", "Addresses | people.")
    assert port.kind == "whole number at least 1, at most 65535"
    assert port.meaning == ""


def test_text_of_a_pattern_and_large_bounds_are_told_in_words() -> None:
    class Figures(pydantic.BaseModel):
        """Figures."""

        textfile: str = pydantic.Field(pattern=TEXTFILE)
        rows: int = pydantic.Field(le=1_048_576)
        code: str = pydantic.Field(pattern="^[a-c]$")

    (figures,) = sections(Figures)
    assert [key.kind for key in figures.keys] == [
        "a path that ends in .prom",
        "whole number at most 1048576",
        "text",
    ]


def test_the_command_prints_both(score: Callable[..., Any]) -> None:
    assert score("schema").out == schema_text()
    assert score("schema", "--markdown").out == reference_text()


def test_meanings_are_on_one_line() -> None:
    assert field_meanings(Job)["name"].startswith("Folder below the output")
    assert not any("\n" in meaning for meaning in field_meanings(Job).values())
