"""How `verify` reads files: with fsspec and pyarrow, and none of the code that scored them."""

from __future__ import annotations

import bisect
import itertools
import os
from contextlib import ExitStack
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import VerifyError, one_line


def filesystem_of(uri: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    options: dict[str, Any] = {}
    if uri.startswith("s3://"):
        options = {"use_listings_cache": False, "skip_instance_cache": True}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            path_style = {"s3": {"addressing_style": "path"}}
            options |= {"endpoint_url": endpoint, "config_kwargs": path_style}
    filesystem, path = fsspec.core.url_to_fs(uri, **options)
    return filesystem, str(path)


def is_parquet(uri: str) -> bool:
    """Whether a file has a footer that pyarrow can read, and that agrees with itself."""
    filesystem, path = filesystem_of(uri)
    try:
        with filesystem.open(path, "rb") as file:
            file_bytes = filesystem.size(path)
            # Nothing has more parts than bytes; a footer that says so would take gigabytes.
            footer = pq.ParquetFile(file, thrift_container_size_limit=file_bytes).metadata
            sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError):
        return False
    return min(sizes, default=0) >= 0 and sum(sizes) == footer.num_rows


class InputRows:
    """Some columns of an input file, by row. A row group without wanted rows is never read."""

    def __init__(self, source: str, columns: list[str]) -> None:
        self._source, self._columns = source, columns
        self._opened = ExitStack()
        filesystem, path = filesystem_of(source)
        try:
            file = self._opened.enter_context(filesystem.open(path, "rb"))
            self._parquet = pq.ParquetFile(file, page_checksum_verification=True)
            schema = self._parquet.schema_arrow
        except (FileNotFoundError, pa.ArrowException, OSError) as error:
            self._opened.close()
            raise VerifyError(f"{source}: cannot be read any more ({one_line(error)}).") from None
        self._schema = pa.schema([schema.field(name) for name in columns])
        footer = self._parquet.metadata
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self._bounds = [0, *itertools.accumulate(sizes)]
        self._last: tuple[int, pa.Table] | None = None
        self.num_rows = self._bounds[-1]

    def __enter__(self) -> InputRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def rows(self, wanted: list[range]) -> pa.Table:
        """The rows in some ranges of the file, which are in order."""
        # `empty_table` knows no extension types, such as UUIDs within lists (26.0).
        nothing = [pa.nulls(0, field.type) for field in self._schema]
        tables = [pa.Table.from_arrays(nothing, schema=self._schema)]
        for rows in wanted:
            group = bisect.bisect_right(self._bounds, rows.start) - 1
            while rows:
                first, end = self._bounds[group : group + 2]
                inside = rows[: max(0, end - rows.start)]
                if inside:
                    table = self._read(group, end - first)
                    tables.append(table.slice(inside.start - first, len(inside)))
                rows, group = rows[len(inside) :], group + 1
        return pa.concat_tables(tables)

    def _read(self, group: int, num_rows: int) -> pa.Table:
        if self._last and self._last[0] == group:
            return self._last[1]
        try:
            table = self._parquet.read_row_group(group, columns=self._columns)
            if len(table) != num_rows:
                raise pa.ArrowInvalid(f"{len(table)} rows of {num_rows}")
        except (pa.ArrowException, OSError) as error:
            raise VerifyError(
                f"{self._source}: row group {group}, of which rows were scored, cannot be read any "
                f"more ({one_line(error)})."
            ) from None
        self._last = group, table.select(self._columns).cast(self._schema)
        return self._last[1]
