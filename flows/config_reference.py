"""The reference and the JSON schema of job files, made from the models in pipeline/config.py.

    python -m flows.config_reference     # writes docs/configuration.md, configs/job.schema.json

Meanings are the docstrings of the fields, which are read from the source: pydantic would do the
same at each import of the models, in each lane's process too.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from pydantic.fields import FieldInfo

from pipeline.config import Job
from pipeline.section import PATTERNS

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "docs/configuration.md"
SCHEMA = "configs/job.schema.json"
WIDTH = 100
BAR = r"\|"
"""A bar within a cell of a Markdown table."""

INTRODUCTION = """\
# Every key of a job file

Made from [pipeline/config.py](../pipeline/config.py) by `score schema --markdown`; do not edit it.
A job file is YAML. Unknown keys are refused, with the line and a suggestion. `--set key=value`
replaces a value for one command: `--set lanes.grace_s=60`. Your editor completes and checks keys
when the file's first line is

```yaml
# yaml-language-server: $schema=<path or address of configs/job.schema.json>
```

`score schema > job.schema.json` writes that file. A key without a default must be given, if its
section is.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a section."""

    name: str
    kind: str
    """What it takes, in words."""
    default: str
    """As YAML would have it; empty: it must be given."""
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionKeys:
    """A section of the job file and its own keys; the sections in it come after it."""

    path: str
    """Dotted; empty: the job itself."""
    meaning: str
    keys: tuple[Key, ...]


def sections(model: type[pydantic.BaseModel] = Job, path: str = "") -> Iterator[SectionKeys]:
    """All sections, in the order of the file."""
    meanings, schema = field_meanings(model), model.model_json_schema()
    keys: list[Key] = []
    inner: list[tuple[str, type[pydantic.BaseModel]]] = []
    for attribute, field in model.model_fields.items():
        name = field.alias or attribute
        section = _section_of(field.annotation)
        if section is not None:
            inner.append((f"{path}.{name}".removeprefix("."), section))
        kind = "a section" if section else _kind_in_words(schema["properties"][name])
        default = "" if field.is_required() else _shown(field, is_section=section is not None)
        meaning = " ".join(
            [*([_paragraphs(section)[0]] if section else []), meanings.get(attribute, "")]
        )
        keys.append(Key(name=name, kind=kind, default=default, meaning=meaning.strip()))
    yield SectionKeys(path=path, meaning="\n\n".join(_paragraphs(model)), keys=tuple(keys))
    for inner_path, section in inner:
        yield from sections(section, inner_path)


def field_meanings(model: type[pydantic.BaseModel]) -> dict[str, str]:
    """The docstring below each field of a model, on one line; fields without one are left out."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def job_schema() -> dict[str, Any]:
    """JSON schema of job files, with all meanings: what editors show and check."""
    schema = Job.model_json_schema()
    for model in _models(Job):
        part = schema if model is Job else schema["$defs"][model.__name__]
        for attribute, meaning in field_meanings(model).items():
            name = model.model_fields[attribute].alias or attribute
            part["properties"][name]["description"] = meaning
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "nightscore job",
    }


def schema_text() -> str:
    """The file configs/job.schema.json."""
    return json.dumps(job_schema(), indent=1) + "\n"


def reference_text() -> str:
    """The page docs/configuration.md."""
    return "\n".join([INTRODUCTION, *(_section_text(section) for section in sections())])


def _section_text(section: SectionKeys) -> str:
    title = f"## `{section.path}`" if section.path else "## The job"
    rows = [
        f"| {' | '.join(cell.replace('|', BAR) for cell in _cells(key))} |" for key in section.keys
    ]
    head = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    return "\n".join([title, "", _wrapped(section.meaning), "", *head, *rows, ""])


def _wrapped(text: str) -> str:
    return "\n\n".join(textwrap.fill(each, WIDTH) for each in text.split("\n\n"))


def _cells(key: Key) -> tuple[str, ...]:
    return f"`{key.name}`", key.kind, key.default or "*must be given*", key.meaning


def _models(model: type[pydantic.BaseModel]) -> Iterator[type[pydantic.BaseModel]]:
    yield model
    for field in model.model_fields.values():
        section = _section_of(field.annotation)
        if section is not None:
            yield from _models(section)


def _section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    choices = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, pydantic.BaseModel):
            return choice
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _paragraphs(model: type[pydantic.BaseModel]) -> list[str]:
    return [" ".join(each.split()) for each in (inspect.getdoc(model) or "").split("\n\n")]


WORDS = {"string": "text", "boolean": "true or false", "integer": "whole number", "null": "null"}
BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)


def _kind_in_words(schema: dict[str, Any]) -> str:
    """A field's JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_kind_in_words(choice) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            item = _kind_in_words(schema["prefixItems"][0])
            return f"list of {len(schema['prefixItems'])}: {item}"
        least = f", at least {schema['minItems']}" if "minItems" in schema else ""
        return f"list{least}: {_kind_in_words(schema.get('items', {}))}"
    if schema.get("type") == "object":
        return f"mapping: {_kind_in_words(schema.get('additionalProperties') or {})}"
    if schema.get("pattern") in PATTERNS:
        return PATTERNS[schema["pattern"]]
    word = WORDS.get(schema.get("type", ""), schema.get("type", "anything"))
    bounds = [f"{said} {schema[name]:.12g}" for name, said in BOUNDS if name in schema]
    return " ".join([word, ", ".join(bounds)]).strip()


def _shown(field: FieldInfo, *, is_section: bool) -> str:
    """A default, as YAML has it."""
    default = field.get_default(call_default_factory=True)
    if is_section:
        return "none" if default is None else "as below"
    if default == "":
        return "empty"
    value = list(default) if isinstance(default, tuple) else default
    return f"`{json.dumps(value, default=str).strip(chr(34))}`"


def main() -> None:
    """Write both files into the checkout."""
    for path, text in ((REFERENCE, reference_text()), (SCHEMA, schema_text())):
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
