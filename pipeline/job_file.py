"""Read a job's YAML file, and say in one sentence what is wrong with it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from engines.masking import MASK, SECRET_NAME, has_credentials
from pipeline.config import Job, MailSection, OutputSection
from pipeline.errors import ConfigError
from pipeline.job_problems import Location, first_problem, line_of
from pipeline.section import NAME

DEEPEST = 8
"""Sections within sections; YAML can nest a section in itself."""


def load_job(path: str, overrides: Sequence[str] = ()) -> Job:
    """Read and check a job file.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` pairs that replace or add values; the value is YAML.

    Raises:
        ConfigError: The file is missing, is not YAML, or breaks the schema; one sentence that
            names the line and the way out.
    """
    root, data = _read(path)
    _refuse_repeats(path, root)
    for override in overrides:
        _apply_override(data, override)
    _refuse_secrets(path, root, data)
    try:
        return Job.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(first_problem(path, root, error)) from None


class _Sender(pydantic.BaseModel, extra="ignore"):
    """What of a job a mail needs."""

    name: Annotated[str, pydantic.Field(pattern=NAME)]
    output: OutputSection
    mail: MailSection


def load_sender(path: str) -> Job | None:
    """As much of a job as a mail needs, from a file that is wrong elsewhere; None: there, too."""
    try:
        root, data = _read(path)
        kept = {key: data[key] for key in _Sender.model_fields if key in data}
        _refuse_secrets(path, root, kept)
        found = _Sender.model_validate(kept)
    except (ConfigError, pydantic.ValidationError):
        return None
    return Job.model_construct(name=found.name, output=found.output, mail=found.mail)


def _read(path: str) -> tuple[yaml.Node | None, dict[str, Any]]:
    """The nodes of a file, which know their lines, and its values."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; expected a job file. "
            "See configs/demo.yaml for one to start from."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; expected a YAML job file.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{path}{line}: {problem}; expected YAML.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: {type(data).__name__}; expected a mapping such as `name: ...`.")
    return root, data


def parse_date(text: str) -> str:
    """An ISO date such as 2026-11-20, as given; ConfigError when it is none."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ConfigError(f"date: {text!r}; expected an ISO date such as 2026-11-20.") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator or not dotted:
        shown = MASK if SECRET_NAME.search(override) else override
        raise ConfigError(f"--set {shown}: no `=`; expected dotted.key=value.")
    where = f"--set {dotted}=..."
    *parents, last = dotted.split(".")
    section = data
    for key in parents:
        if section.get(key) is None:  # missing, or a section left empty
            section[key] = {}
        child = section[key]
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: `{key}` is a value; expected a section.")
        section = child
    try:
        section[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{where}: the value is not YAML.") from None


def _refuse_repeats(path: str, root: yaml.Node | None) -> None:
    """PyYAML keeps the last of two equal keys: the guards of the first would be gone unseen."""
    for section in _sections(root):
        lines: dict[tuple[str, str], int] = {}
        for name, _ in section.value:
            key, line = (name.tag, name.value), name.start_mark.line + 1
            if key in lines:
                raise ConfigError(
                    f"{path}, line {line}: {name.value}: a second time, first in line {lines[key]}"
                    "; expected each key once. Put both into one."
                )
            lines[key] = line


def _sections(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Every mapping once, those that come first in the file first."""
    nodes, seen = [root], set()
    for node in nodes:  # which grows meanwhile
        if id(node) in seen:  # by a name, perhaps within itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _refuse_secrets(path: str, root: yaml.Node | None, data: Any, at: Location = ()) -> None:
    """Job files are copied, logged and published with their runs: no place for secrets."""
    if isinstance(data, (dict, list)) and len(at) < DEEPEST:
        for key, child in data.items() if isinstance(data, dict) else enumerate(data):
            _refuse_secrets(path, root, child, (*at, key))
    is_named = bool(at) and SECRET_NAME.search(str(at[-1])) is not None
    if is_named or (isinstance(data, str) and has_credentials(data)):
        line = line_of(root, at)
        where = f"{path}, line {line}" if line else path
        raise ConfigError(
            f"{where}: {'.'.join(map(str, at))}: a secret in the job; expected none. Put it into "
            "the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
