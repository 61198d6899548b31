"""Say in one sentence what is wrong with a job file, and in which line."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config import Job
from pipeline.section import PATTERNS, Section

Location = tuple[int | str, ...]

EXPECTED = {
    "model_type": "a section with keys",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:,.12g}",
    "greater_than_equal": "a number of at least {ge:,.12g}",
    "less_than_equal": "a number of at most {le:,.12g}",
    "literal_error": "{expected}",
}
"""What should have been there, by pydantic's type of error and with its context."""

BRANCHES = {"bool", "str", "constrained-str"}
"""What pydantic adds to the location of a value that may be of several types."""


def first_problem(path: str, root: yaml.Node | None, error: pydantic.ValidationError) -> str:
    """The first problem, its line and the way out; of the others, how many there are."""
    problems: dict[Location, list[ErrorDetails]] = {}
    for each in error.errors(include_url=False):
        problems.setdefault(_without_branch(each), []).append(each)
    location, same = next(iter(problems.items()))
    dotted = ".".join(str(key) for key in location)
    line = line_of(root, location)
    where = f"{path}, line {line}: {dotted}" if line else f"{path}: {dotted}".removesuffix(": ")
    more = f" ({len(problems) - 1} more problems.)" if len(problems) > 1 else ""
    return f"{where}:{_said(location, same)}{more}"


def line_of(node: yaml.Node | None, location: Sequence[int | str]) -> int | None:
    """Line, from 1, of the deepest part of `location` that is in the file."""
    line = None
    for key in location:
        if isinstance(node, yaml.MappingNode):
            pairs = {name.value: (name, value) for name, value in node.value}
            if key not in pairs:
                break
            name, node = pairs[key]
            line = name.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _without_branch(problem: ErrorDetails) -> Location:
    location = problem["loc"]
    is_branch = problem["type"] != "extra_forbidden" and location and location[-1] in BRANCHES
    return location[:-1] if is_branch else location


def _said(location: Location, problems: Sequence[ErrorDetails]) -> str:
    problem = problems[0]
    match problem["type"]:
        case "extra_forbidden":
            allowed = _allowed_keys(location[:-1])
            close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known keys: {', '.join(allowed)}."
            return f" unknown key. {hint}"
        case "missing":
            return " missing; expected a value."
    value = problem["input"]
    found = "" if isinstance(value, Mapping) else f" {_as_written(value)};"
    return f"{found} {_expected(problems)}.{_way_out(location, problem)}"


def _expected(problems: Sequence[ErrorDetails]) -> str:
    """What each branch of a value's type would have taken; else what the validator says."""
    words = dict.fromkeys(filter(None, map(_words, problems)))
    if words:
        return f"expected {' or '.join(words)}"
    message = problems[0]["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:].rstrip('.')}"


def _words(problem: ErrorDetails) -> str | None:
    context = problem.get("ctx", {})
    words = EXPECTED.get(problem["type"]) or PATTERNS.get(context.get("pattern", ""))
    return words and words.format(**context)


def _as_written(value: Any) -> str:
    """A value as YAML has it; text in quotes."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case datetime.date():
            return value.isoformat()
    return repr(value)


def _way_out(location: Location, problem: ErrorDetails) -> str:
    value, field = problem["input"], _field_at(location)
    if isinstance(value, bool) and field and type(None) in _choices(field):
        return " Write null for none."
    if problem["type"] == "string_type" and isinstance(value, int | float | datetime.date):
        return " Put it between quotes."
    return ""


def _allowed_keys(location: Location) -> list[str]:
    section = _section_of(_field_at(location))
    assert section is not None
    return [each.alias or name for name, each in section.model_fields.items()]


def _field_at(location: Location) -> FieldInfo | None:
    """The field that a location is of, or within; None: the job itself."""
    field = None
    for key in location:
        section = _section_of(field)
        if section is None:  # an item of a list
            break
        field = next(
            each for name, each in section.model_fields.items() if key in (each.alias, name)
        )
    return field


def _section_of(field: FieldInfo | None) -> type[Section] | None:
    """The section that a field takes, if it takes one."""
    choices = (Job,) if field is None else _choices(field)
    return next(
        (each for each in choices if isinstance(each, type) and issubclass(each, Section)), None
    )


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation) or (field.annotation,)
