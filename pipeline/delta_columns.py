"""Which columns can be in a Delta Lake table as they are in a part: asked before a night begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import pyarrow as pa

from pipeline.config import OUTPUT_COLUMNS, Job
from pipeline.errors import ConfigError

DATE_COLUMN = "dt"
"""The table's partitions."""
INSTALL_HINT = "pip install 'nightscore[delta]'"


def is_installed() -> bool:
    """Whether `deltalake` can be imported."""
    return importlib.util.find_spec("deltalake") is not None


def check_delta_columns(job: Job, types: Mapping[str, pa.DataType], where: str) -> None:
    """See that the passthrough columns, by name, can be in a Delta table as they are.

    Raises:
        ConfigError: One has a type that Delta Lake does not have, or the name of another column,
            whose case does not count there; or `deltalake` is missing.
    """
    if not job.output.delta:
        return
    if not is_installed():
        raise ConfigError(
            "output.delta: the package deltalake is not installed; expected it. Install it with "
            f"{INSTALL_HINT}."
        )
    taken = {name.casefold(): name for name in (*OUTPUT_COLUMNS[job.model.head], DATE_COLUMN)}
    for name in job.input.passthrough:
        other = taken.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(
                f"input.passthrough: `{name}` and `{other}` are one name in a Delta table; "
                "expected names that differ not only in case. Leave one out, or rename it."
            )
        kind = types[name]
        if not _fits(kind):
            raise ConfigError(
                f"{where}: column `{name}` is {kind}; expected a type that Delta Lake has, such as "
                "int64, string or timestamp[us]. Leave it out of `input.passthrough`, or write it "
                "with another type."
            )


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
