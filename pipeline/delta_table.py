"""The Delta table of a job: where it is, and what it has by now."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa

from pipeline.column_types import as_stored
from pipeline.config import Job
from pipeline.errors import StorageError
from pipeline.storage import open_storage, s3_endpoint

log = logging.getLogger(__name__)

DATE_COLUMN = "dt"
"""The table's partitions."""


def uri_of(job: Job) -> str:
    """Where the table is: at its own address, or where the job's output is."""
    if isinstance(job.output.delta, str):
        return open_storage(job.output.delta).uri
    return f"{open_storage(job.output.uri).uri}/{job.name}"


def open_table(job: Job) -> Any | None:
    """The table as it is now; None when there is none yet.

    Raises:
        StorageError: It is not this job's. Errors of deltalake are left as they are.
    """
    import deltalake

    uri = uri_of(job)
    options = options_for(uri)
    if not deltalake.DeltaTable.is_deltatable(uri, options):
        return None
    table = deltalake.DeltaTable(uri, storage_options=options)
    found = table.metadata()
    if found.name not in (None, job.name) or found.partition_columns != [DATE_COLUMN]:
        raise StorageError(
            f"{uri}: a Delta table named {found.name}, partitioned by "
            f"{', '.join(found.partition_columns) or 'nothing'}; expected one of the job "
            f"{job.name}, partitioned by {DATE_COLUMN}. Name another place in `output.delta`."
        )
    return table


def types_of(schema: Any) -> dict[str, pa.DataType]:
    """The types of a Delta schema by column, as Parquet keeps them."""
    return {field.name: as_stored(field.type) for field in pa.schema(schema)}


def known_types(job: Job) -> dict[str, pa.DataType]:
    """The types of the table by column; none without a table, or where it cannot be read now.

    That stops no night: its commit comes after publication, and tells what is wrong.

    Raises:
        StorageError: The table is not this job's.
    """
    from deltalake.exceptions import DeltaError

    try:
        table = open_table(job)
    except (DeltaError, OSError) as error:
        log.warning(
            "%s: the Delta table cannot be read; columns are not held to it (%s).",
            uri_of(job),
            first_line(error),
        )
        return {}
    return types_of(table.schema()) if table else {}


def options_for(uri: str) -> dict[str, str] | None:
    """For a bucket: the same endpoint as everything else; credentials are in the environment."""
    endpoint = s3_endpoint()
    if not uri.startswith("s3://") or not endpoint:
        return None
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": str(endpoint.startswith("http://")).lower(),
    }


def first_line(error: Exception) -> str:
    """Delta's errors have a whole stack of C frames below it."""
    return str(error).partition("\n")[0]
