"""Recount a published run against its input, independently of the code that made it.

Shares nothing with the rest of the pipeline but the error type: reads the manifest, the parts and
the input files themselves with pyarrow, and compares. For every input file it shows that each row
is exactly once either in a part, at the right place, or in quarantine (R1), and that no byte of
the output has changed since it was committed (R12).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import VerifyError, one_line

Row = dict[str, Any]


def verify_published(output_uri: str, job: str, date: str) -> Row:
    """Check one published date.

    Args:
        output_uri: Root of the job's output.
        job: Name of the job.
        date: ISO date.

    Returns:
        run_id, rows, scored, quarantined, parts, and status `verified`.

    Raises:
        VerifyError: The first thing that does not agree.
    """
    folder = f"{output_uri.rstrip('/')}/{job}/dt={date}"
    manifest = _read_manifest(folder)
    try:
        return _check(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise VerifyError(
            f"{folder}/_MANIFEST.json: damaged ({error!r}); expected the manifest of a run."
        ) from None


def _check(folder: str, manifest: Row) -> Row:
    _check_names(folder, manifest)
    _check_listing(folder, manifest["parts"])
    by_file: dict[str, list[Row]] = defaultdict(list)
    for part in manifest["parts"]:
        by_file[part["file"]].append(part)
    pinned = {file["path"]: file for file in manifest["input"]["files"]}
    if stray := set(by_file) - set(pinned):
        raise VerifyError(f"{folder}: parts of {sorted(stray)}; expected only pinned input files.")
    num_scored = num_quarantined = 0
    for path, file in pinned.items():
        source = f"{manifest['input']['uri'].rstrip('/')}/{path}"
        scored, quarantined = _check_file(
            folder, source, path, by_file[path], manifest["passthrough"], file["num_rows"]
        )
        num_scored += scored
        num_quarantined += quarantined
    counted = {
        "rows": num_scored + num_quarantined,
        "scored": num_scored,
        "quarantined": num_quarantined,
    }
    for name, number in counted.items():
        if manifest[name] != number:
            raise VerifyError(
                f"{folder}: the manifest says {manifest[name]} {name}; counted {number}."
            )
    return {
        "status": "verified",
        "run_id": manifest["run_id"],
        **counted,
        "parts": len(manifest["parts"]),
    }


def _filesystem(uri: str) -> tuple[Any, str]:
    options: Row = {}
    if uri.startswith("s3://"):
        options = {"use_listings_cache": False, "skip_instance_cache": True}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            path_style = {"s3": {"addressing_style": "path"}}
            options |= {"endpoint_url": endpoint, "config_kwargs": path_style}
    filesystem, path = fsspec.core.url_to_fs(uri, **options)
    return filesystem, str(path)


def _read(uri: str) -> bytes:
    filesystem, path = _filesystem(uri)
    try:
        return bytes(filesystem.cat_file(path))
    except FileNotFoundError:
        raise VerifyError(f"{uri}: missing; expected a file of a published run.") from None


def _read_manifest(folder: str) -> Row:
    try:
        manifest: Row = json.loads(_read(f"{folder}/_MANIFEST.json"))
    except VerifyError:
        raise VerifyError(f"{folder}: not published; expected a _MANIFEST.json there.") from None
    except ValueError as error:
        raise VerifyError(f"{folder}/_MANIFEST.json: damaged ({error}); expected JSON.") from None
    return manifest


def _check_names(folder: str, manifest: Row) -> None:
    """Whoever has altered the manifest must not lead us to other files."""
    stored = [part[key] for part in manifest["parts"] for key in ("part", "quarantine")]
    paths = [file["path"] for file in (*manifest["input"]["files"], *filter(None, stored))]
    for path in paths:
        if path.startswith("/") or ".." in path.split("/"):
            raise VerifyError(f"{folder}: {path!r} leads out of it; expected paths below it.")


def _check_listing(folder: str, parts: list[Row]) -> None:
    """Readers list *.parquet: exactly the parts must be there."""
    filesystem, path = _filesystem(folder)
    found = {name.rpartition("/")[2] for name in filesystem.glob(f"{path}/*.parquet")}
    named = {part["part"]["path"] for part in parts}
    if found != named:
        odd = sorted(found ^ named)
        raise VerifyError(f"{folder}: {odd} is only in the folder or only in the manifest.")


def _read_part(folder: str, stored: Row) -> pa.Table:
    uri = f"{folder}/{stored['path']}"
    data = _read(uri)
    if len(data) != stored["num_bytes"] or hashlib.sha256(data).hexdigest() != stored["sha256"]:
        raise VerifyError(f"{uri}: {len(data)} bytes with another sha256 than was committed.")
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise VerifyError(f"{uri}: cannot be read ({one_line(error)}).") from None
    if len(table) != stored["num_rows"]:
        raise VerifyError(f"{uri}: {len(table)} rows; committed were {stored['num_rows']}.")
    return table


def _check_file(
    folder: str, source: str, path: str, parts: list[Row], passthrough: list[str], num_rows: int
) -> tuple[int, int]:
    """Compare the parts of one input file with the file; return rows scored and quarantined."""
    filesystem, source_path = _filesystem(source)
    try:
        with filesystem.open(source_path, "rb") as file:
            expected = _read_columns(file, passthrough)
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise VerifyError(f"{source}: cannot be read any more ({one_line(error)}).") from None
    if len(expected) != num_rows:
        raise VerifyError(f"{source}: {len(expected)} rows now; {num_rows} when it was scored.")
    next_row = num_scored = num_quarantined = 0
    for part in sorted(parts, key=lambda entry: entry["first_row"]):
        if part["first_row"] != next_row:
            raise VerifyError(
                f"{source}: shard {part['shard']} begins at row {part['first_row']}; "
                f"expected {next_row}."
            )
        next_row += part["num_rows"]
        table = _read_part(folder, part["part"])
        bad = _quarantined_rows(folder, path, part)
        kept = [row for row in range(part["first_row"], next_row) if row not in bad]
        wanted = expected.take(pa.array(kept, pa.int64())).select(passthrough)
        if not all(_same_values(table[name], wanted[name]) for name in passthrough):
            raise VerifyError(
                f"{folder}/{part['part']['path']}: its {', '.join(passthrough)} are not those of "
                f"{source} from row {part['first_row']} without the quarantined rows."
            )
        num_scored += len(table)
        num_quarantined += len(bad)
    if next_row != num_rows:
        raise VerifyError(f"{source}: parts end at row {next_row}; expected {num_rows}.")
    return num_scored, num_quarantined


def _read_columns(file: Any, columns: list[str]) -> pa.Table:
    """The columns; null in row groups that cannot be read: their rows must all be in quarantine."""
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    schema = pa.schema([parquet.schema_arrow.field(name) for name in columns])
    tables = []
    for group in range(parquet.num_row_groups):
        num_rows = parquet.metadata.row_group(group).num_rows
        try:
            table = parquet.read_row_group(group, columns=columns)
            if len(table) != num_rows:
                raise pa.ArrowInvalid(f"{len(table)} rows of {num_rows}")
        except (pa.ArrowException, OSError):
            table = pa.table(
                {name: pa.nulls(num_rows, schema.field(name).type) for name in columns}
            )
        tables.append(table.select(columns))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _same_values(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> bool:
    if pa.types.is_dictionary(expected.type):  # the same values may have other indices
        found, expected = (column.cast(expected.type.value_type) for column in (found, expected))
    if found.type != expected.type or len(found) != len(expected):
        return False
    # To Arrow NaN is unlike itself; to us a row that kept its NaN is the same row.
    return found.equals(expected) or repr(found.to_pylist()) == repr(expected.to_pylist())


def _quarantined_rows(folder: str, path: str, part: Row) -> set[int]:
    if part["quarantine"] is None:
        return set()
    table = _read_part(folder, part["quarantine"])
    rows = table["row"].to_pylist()
    first, end = part["first_row"], part["first_row"] + part["num_rows"]
    if len(set(rows)) != len(rows) or any(not first <= row < end for row in rows):
        raise VerifyError(
            f"{folder}/{part['quarantine']['path']}: a row twice, or of another shard."
        )
    if set(table["file"].to_pylist()) != {path}:
        raise VerifyError(
            f"{folder}/{part['quarantine']['path']}: rows of another file than {path}."
        )
    if not all(table["reason"].to_pylist()):
        raise VerifyError(f"{folder}/{part['quarantine']['path']}: a row without a reason.")
    return set(rows)
