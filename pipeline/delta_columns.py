"""Which columns can be in a job's Delta Lake table, and how: asked before a night begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import pyarrow as pa

from pipeline.column_types import as_stored, common_type
from pipeline.config import OUTPUT_COLUMNS, Job
from pipeline.delta_table import DATE_COLUMN, known_types, uri_of
from pipeline.errors import ConfigError

INSTALL_HINT = "pip install 'nightscore[delta]'"


def is_installed() -> bool:
    """Whether `deltalake` can be imported."""
    return importlib.util.find_spec("deltalake") is not None


def delta_types(
    job: Job, types: Mapping[str, pa.DataType], where: str
) -> Mapping[str, pa.DataType]:
    """The types that passthrough columns must have in a part, so that a Delta table can name it.

    Args:
        job: Without a Delta table all types are left as they are.
        types: Of the date's columns, by name.
        where: A file of the date.

    Returns:
        By name; where the table has a wider type, that one.

    Raises:
        ConfigError: One has a type that Delta Lake or the job's table does not have, or the name of
            another column, whose case does not count there; or `deltalake` is missing.
        StorageError: The table is not this job's.
    """
    if not job.output.delta:
        return types
    if not is_installed():
        raise ConfigError(
            "output.delta: the package deltalake is not installed; expected it. Install it with "
            f"{INSTALL_HINT}."
        )
    known = known_types(job)
    columns = (*OUTPUT_COLUMNS[job.model.head], DATE_COLUMN, *known)
    taken = {name.casefold(): name for name in columns}
    for name in job.input.passthrough:
        other = taken.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(
                f"input.passthrough: `{name}` and `{other}` are one name in a Delta table; "
                "expected names that differ not only in case. Leave one out, or rename it."
            )
    return {name: _delta_type(job, name, kind, known, where) for name, kind in types.items()}


def _delta_type(
    job: Job, name: str, kind: pa.DataType, known: Mapping[str, pa.DataType], where: str
) -> pa.DataType:
    expected = known.get(name)
    if expected is not None and expected != _as_in_delta(kind):
        if common_type(kind, expected) != expected:
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected {expected}, as in the Delta table "
                f"{uri_of(job)}. Write it with that type, leave it out of `input.passthrough`, or "
                "name another table in `output.delta`."
            )
        kind = expected
    if not _fits(kind):
        raise ConfigError(
            f"{where}: column `{name}` is {kind}; expected a type that Delta Lake has, such as "
            "int64, string or timestamp[us]. Leave it out of `input.passthrough`, or write it "
            "with another type."
        )
    return kind


def _as_in_delta(kind: pa.DataType) -> pa.DataType:
    """The type that a table has for a column of a part."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_as_in_delta(kind.value_type))
    if pa.types.is_timestamp(kind) and kind.unit == "ms":
        return pa.timestamp("us", kind.tz)
    return as_stored(kind)


def _fits(kind: pa.DataType) -> bool:
    """Whether polars and delta-rs read files with this type: tried with each of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _fits(kind.value_type)
    if pa.types.is_timestamp(kind):
        return kind.unit in ("us", "ms") and kind.tz in (None, "UTC")
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_boolean,
            pa.types.is_signed_integer,
            pa.types.is_float32,
            pa.types.is_float64,
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_date32,
            pa.types.is_decimal128,
        )
    )
