"""The columns of a date's files: what a job reads, in which all files must agree."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from engines.keys import digest
from pipeline.column_types import as_stored, common_type
from pipeline.config import Job
from pipeline.delta_columns import delta_types
from pipeline.errors import ConfigError
from pipeline.footers import Footer
from pipeline.image_column import IMAGE_FIELD, holds_images

NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
"""Kinds of features; a column without any value is null where a writer takes types from values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What all files of a date agree on."""

    features: tuple[str, ...]
    """Expanded from the globs of the job; empty for images."""
    num_features: int
    """Width of the engine's input: columns, or the length of the fixed-size list."""
    wider_types: Mapping[str, pa.DataType]
    """What passthrough columns become that not all files have in one type, or in another one than
    the job's Delta table."""
    sha256: str
    """Over the features in their order, and passthrough columns with their types in all parts."""


def columns_of(job: Job, footers: Sequence[Footer], root: str) -> Columns:
    """Columns in which all files must agree; those without rows are not asked if others have some.

    Raises:
        ConfigError: No file fits the job, or some files do not: the message says which it is.
    """
    footers = [footer for footer in footers if footer.file.num_rows] or footers
    alike: dict[int, list[Footer]] = {}
    for footer in footers:
        alike.setdefault(id(footer.schema), []).append(footer)
    fitting: tuple[tuple[str, ...], int] | None = None
    copied: dict[str, pa.DataType] = {}
    wrong: list[Footer] = []
    error: ConfigError | None = None
    for files in alike.values():
        schema, where = files[0].schema, f"{root}/{files[0].file.path}"
        try:
            columns = _feature_columns(job, schema, where)
            _check_columns(job, columns, schema, where)
            if fitting:
                check_order(columns, fitting[0], where, "as in other files of the date")
            width = _num_features(schema, columns)
            if fitting and width != fitting[1]:
                raise ConfigError(f"{where}: {width} features; expected {fitting[1]}.")
            copied = _common_types(job, schema, copied, where)
        except ConfigError as found:
            wrong, error = wrong + files, error or found
        else:
            fitting = columns, width
    if fitting is None:
        raise error or AssertionError("a plan without files")
    if error is not None:
        num_wrong = len(wrong)
        raise ConfigError(
            f"{error} {num_wrong} of {len(footers)} files {'is' if num_wrong == 1 else 'are'} like "
            "this, the others fit the job: write the file again."
        )
    kinds = delta_types(job, copied, f"{root}/{footers[0].file.path}")
    schemas = [files[0].schema for files in alike.values()]
    wider = {
        name: kind
        for name, kind in kinds.items()
        if any(as_stored(schema.field(name).type) != kind for schema in schemas)
    }
    return Columns(
        features=fitting[0],
        num_features=fitting[1],
        wider_types=wider,
        sha256=digest([*fitting, [(name, str(kind)) for name, kind in kinds.items()]]),
    )


def _feature_columns(job: Job, schema: pa.Schema, where: str) -> tuple[str, ...]:
    if job.input.features is None:
        return ()
    columns: list[str] = []
    for pattern in job.input.features.columns:
        found = [name for name in schema.names if fnmatch.fnmatchcase(name, pattern)]
        if pattern in schema.names:  # `f[0]` is a name, and as a glob it is f0
            found = [pattern]
        if not found:
            raise _missing_column(pattern, schema, where, "input.features.columns")
        columns += [name for name in found if name not in columns]
    return tuple(columns)


def check_order(found: Sequence[str], expected: Sequence[str], where: str, why: str) -> None:
    """Raise ConfigError unless globs gave the very columns, in the very order, that they should.

    A model takes its features by position: it scores any order, and one of them is right.
    """
    if found == expected:
        return
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        said = f"no column `{missing[0]}`; expected it"
    elif extra:
        said = f"column `{extra[0]}` is a feature; expected none more"
    else:
        position = next(at for at, name in enumerate(found) if name != expected[at])
        said = (
            f"feature {position + 1:,} is column `{found[position]}`; expected "
            f"`{expected[position]}`"
        )
    raise ConfigError(
        f"{where}: {said}, {why}. In `input.features.columns` name the columns without globs, in "
        "the model's order."
    )


def _check_columns(job: Job, features: tuple[str, ...], schema: pa.Schema, where: str) -> None:
    label = job.engine.gate.label
    wanted = [(name, "input.passthrough") for name in job.input.passthrough]
    wanted += [(label, "engine.gate.label")] if label else []
    wanted += [(name, "input.features.columns") for name in features]
    wanted += [(job.input.images.column, "input.images.column")] if job.input.images else []
    names = schema.names
    for name, key in wanted:
        if name not in names:
            raise _missing_column(name, schema, where, key)
        if names.count(name) > 1:
            raise ConfigError(f"{where}: column `{name}` twice; expected each name once.")
    if job.input.images:
        name = job.input.images.column
        kind = schema.field(name).type
        if not holds_images(kind):
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected binary with encoded images, or a "
                f"struct with them in a field `{IMAGE_FIELD}`. Check `input.images.column`."
            )
    for name in features:
        kind = schema.field(name).type
        if pa.types.is_fixed_size_list(kind) and len(features) == 1:
            kind = kind.value_type
        if not any(is_kind(kind) for is_kind in NUMBERS):
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected integers or floats, or one column "
                "of fixed-size lists of them. Check `input.features.columns`."
            )


def _common_types(
    job: Job, schema: pa.Schema, so_far: Mapping[str, pa.DataType], where: str
) -> dict[str, pa.DataType]:
    """Parts have the columns of their files, and readers take all parts of a date for one table."""
    kinds: dict[str, pa.DataType] = {}
    for name in job.input.passthrough:
        kind = schema.field(name).type
        expected = so_far.get(name, kind)
        common = common_type(expected, kind)
        if common is None:
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected {expected}, as in other files of "
                "the date, because of `input.passthrough`."
            )
        kinds[name] = common
    return kinds


def _missing_column(name: str, schema: pa.Schema, where: str, key: str) -> ConfigError:
    close = difflib.get_close_matches(name, schema.names, n=1)
    hint = f"Did you mean `{close[0]}`?" if close else f"It has: {', '.join(schema.names[:8])}."
    return ConfigError(f"{where}: no column `{name}`; expected it because of `{key}`. {hint}")


def _num_features(schema: pa.Schema, columns: tuple[str, ...]) -> int:
    if len(columns) == 1:
        kind = schema.field(columns[0]).type
        return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 1
    return len(columns)
