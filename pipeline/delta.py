"""Delta Lake as a second way to read a job's output: one transaction for each published version.

    output.delta: true             the table is `<output>/<job>`, and its log names the published
                                   parts: nothing is copied
    output.delta: s3://lake/users  a table of its own, with copies of the parts; earlier versions
                                   of a date stay readable until somebody vacuums them

The table is partitioned by `dt`, the date. A transaction removes what the table has of a date and
adds the parts of the published version, and it carries the version's number under an application id
of job and date: versions only count up, so that one is never committed twice and never after a
later one. Whoever finds a published date that the table does not have yet commits it.

The package `deltalake` (extra `delta`) is imported in this module and in `delta_table.py`, and only
when a job asks for it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.column_types import as_stored
from pipeline.config import Job
from pipeline.delta_table import (
    DATE_COLUMN,
    first_line,
    open_table,
    options_for,
    types_of,
    uri_of,
)
from pipeline.errors import StorageError, StoreRefusedError, StoreUnavailableError
from pipeline.storage import Storage, open_storage
from pipeline.versions import Published, find_published

MAX_TRIES = 20
"""Of a commit: dates that are backfilled side by side meet at the table's log."""
LONGEST_PAUSE_S = 0.5
NUM_COPIERS = 4
"""Parts in memory at once, when they are copied to a table of its own."""
LOCAL_TIMES = "timestampNtz"
"""The only feature that a column of ours may need: a table has it from the first such column on."""


def update_table(job: Job, output: Storage, date: str) -> bool:
    """Make the job's Delta table say of a date what is published; does nothing without one.

    Args:
        job: Its `output.delta` says where the table is.
        output: Where the job's output is.
        date: ISO date; one that is not published is left as it is.

    Returns:
        Whether something was committed; False also when the table had it already.

    Raises:
        StoreUnavailableError: The table cannot be read or written now. The date is published; the
            same command, or `score report`, commits it.
        StorageError: The table is not this job's, or has a column of another type.
    """
    if not job.output.delta:
        return False
    table = _Table(job, output)
    for attempt in range(MAX_TRIES):
        published = find_published(output, job.name, date)
        if published is None:
            return False
        try:
            return table.commit(published)
        except _OutdatedError as error:
            outdated = error
        time.sleep(random.uniform(0, LONGEST_PAUSE_S) * attempt / MAX_TRIES)
    raise _unavailable(table.uri, str(outdated))


class _OutdatedError(Exception):
    """Somebody else has committed or published meanwhile, perhaps this very version."""


class _Table:
    """The Delta table of a job."""

    def __init__(self, job: Job, output: Storage) -> None:
        self._job = job
        self._output = output
        delta = job.output.delta
        self._own = open_storage(delta) if isinstance(delta, str) else None
        """None: the table's files are the published ones."""
        self.uri = uri_of(job)

    def commit(self, published: Published) -> bool:
        """Replace a date, unless the table has this version of it or a later one."""
        from deltalake.exceptions import CommitFailedError, DeltaError

        try:
            return self._commit(published)
        except (CommitFailedError, FileNotFoundError) as error:
            raise _OutdatedError(first_line(error)) from error
        except (DeltaError, OSError, StoreRefusedError) as error:
            raise _unavailable(self.uri, first_line(error)) from error

    def _commit(self, published: Published) -> bool:
        import deltalake

        table = open_table(self._job) or self._created(published)
        application = f"nightscore:{published.job}:{published.date}"
        known = table.transaction_version(application)
        if known is not None and known >= published.version:
            return False
        schema = self._schema(published, table.schema())
        if _has_local_times(schema) and LOCAL_TIMES not in (table.protocol().writer_features or ()):
            # A commit adds no feature, and one without it leaves a table that nobody can open.
            table.alter.add_feature(
                deltalake.TableFeatures.TimestampWithoutTimezone,
                allow_protocol_versions_increase=True,
            )
            return self._commit(published)
        if self._own is not None:
            self._copy(published, self._own)
        table.create_write_transaction(
            [_added(published, entry) for entry in published.manifest["parts"]],
            "overwrite",
            schema,
            [DATE_COLUMN],
            [(DATE_COLUMN, "=", published.date)],
            commit_properties=deltalake.CommitProperties(
                custom_metadata={
                    "nightscore.job": published.job,
                    "nightscore.run_id": published.run_id,
                    "nightscore.version": str(published.version),
                },
                app_transactions=[deltalake.Transaction(application, published.version)],
            ),
        )
        return True

    def _created(self, published: Published) -> Any:
        """A new table, or the one that somebody else has made meanwhile."""
        import deltalake

        return deltalake.DeltaTable.create(
            self.uri,
            self._schema(published, deltalake.Schema([])),
            mode="ignore",
            partition_by=[DATE_COLUMN],
            name=self._job.name,
            description=f"Scores of the nightscore job {self._job.name}, a partition for each date",
            storage_options=options_for(self.uri),
        )

    def _schema(self, published: Published, known: Any) -> Any:
        """The columns that are known, and those of the published parts.

        A column that is null in all of a date has no type that Delta Lake has: it is left out,
        and readers take the table's.
        """
        import deltalake
        from deltalake.exceptions import DeltaError

        with self._output.open(f"{published.folder}/{_part_paths(published)[0]}") as file:
            found = [field for field in pq.read_schema(file) if not pa.types.is_null(field.type)]
        kinds = {field.name: as_stored(field.type) for field in found} | {DATE_COLUMN: pa.date32()}
        try:
            wanted = deltalake.Schema.from_arrow(pa.schema(kinds))
        except Exception as error:  # it raises nothing narrower
            raise self._refused(published, error) from error
        fields, known_types = {field.name: field for field in known.fields}, types_of(known)
        for field, kind in zip(wanted.fields, types_of(wanted).values(), strict=True):
            if known_types.get(field.name, kind) != kind:
                raise StorageError(
                    f"{self.uri}: column `{field.name}` is {known_types[field.name]}; expected "
                    f"{kind}, as {published.date} has it. Name another table in `output.delta`."
                )
            if fields.setdefault(field.name, field).type != field.type:  # lists without a null
                fields[field.name] = field
        try:
            return deltalake.Schema(list(fields.values()))
        except DeltaError as error:  # such as a new column whose name differs from one only in case
            raise self._refused(published, error) from error

    def _refused(self, published: Published, error: Exception) -> StorageError:
        return StorageError(
            f"{self.uri}: cannot have the columns of {published.date} ({first_line(error)}); "
            "expected such as Delta Lake has. Name another table in `output.delta`, or leave the "
            "column out of `input.passthrough`."
        )

    def _copy(self, published: Published, own: Storage) -> None:
        """Names of parts are never used twice: what is there already is the same."""

        def copy(path: str) -> None:
            data = self._output.read(f"{published.folder}/{path}")
            if data is None:
                raise _OutdatedError(f"{path} was replaced meanwhile")
            own.create(f"{DATE_COLUMN}={published.date}/{path}", data)

        with ThreadPoolExecutor(NUM_COPIERS) as pool:
            list(pool.map(copy, _part_paths(published)))


def _has_local_times(schema: Any) -> bool:
    """Whether a Delta schema has times without a zone, be it in lists."""

    def is_local(kind: pa.DataType) -> bool:
        inner = [kind.field(index).type for index in range(kind.num_fields)]
        return (pa.types.is_timestamp(kind) and kind.tz is None) or any(map(is_local, inner))

    return any(is_local(kind) for kind in pa.schema(schema).types)


def _part_paths(published: Published) -> list[str]:
    """In the published folder, which is also the partition's in both kinds of table."""
    return [entry["part"]["path"] for entry in published.manifest["parts"]]


def _added(published: Published, entry: Mapping[str, Any]) -> Any:
    """A part, by its entry in the manifest."""
    from deltalake.transaction import AddAction

    return AddAction(
        path=f"{DATE_COLUMN}={published.date}/{entry['part']['path']}",
        size=entry["part"]["num_bytes"],
        partition_values={DATE_COLUMN: published.date},
        modification_time=int(datetime.fromisoformat(entry["committed_at"]).timestamp() * 1000),
        data_change=True,
        stats=json.dumps({"numRecords": entry["num_scored"]}),
    )


def _unavailable(uri: str, found: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"{uri}: {found}; expected a Delta table that takes a commit. The date is published, and "
        "the same command commits it to the table."
    )
