"""Recount a published run against its input, independently of the code that made it.

Shares nothing with the rest of the pipeline but the error type: reads the manifest, the parts and
the input files themselves (`verify_files.py`) with pyarrow, and compares. For every input file it
shows that each row is exactly once either in a part, at the right place, or in quarantine (R1), and
that no byte of the output has changed since it was committed (R12).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.column_types import as_stored, common_type, without_views
from pipeline.errors import VerifyError, one_line
from pipeline.verify_files import InputRows, filesystem_of, is_parquet

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
    num_unreadable = _check_unreadable(folder, manifest)
    _check_engines(folder, manifest)
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
        "unreadable_files": num_unreadable,
    }


def _check_unreadable(folder: str, manifest: Row) -> int:
    """Files left out must be no Parquet, and the report must tell of each."""
    unreadable = manifest["input"]["unreadable"]
    told = {file["path"] for file in manifest["report"]["unreadable_files"]}
    if silent := {file["path"] for file in unreadable} ^ told:
        raise VerifyError(
            f"{folder}: {sorted(silent)} left out in the manifest or in its report; expected both."
        )
    if unreadable and not manifest["report"]["degraded"]:
        raise VerifyError(f"{folder}: files are left out; expected a report that says degraded.")
    for file in unreadable:
        source = f"{manifest['input']['uri'].rstrip('/')}/{file['path']}"
        if is_parquet(source):
            raise VerifyError(
                f"{source}: can be read, but none of its rows was scored; expected a damaged file. "
                "If it has been repaired, score the date again."
            )
    return len(unreadable)


def _read(uri: str) -> bytes:
    filesystem, path = filesystem_of(uri)
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
    filesystem, path = filesystem_of(folder)
    # No glob: the folder's own name may have brackets.
    listed = (name.rpartition("/")[2] for name in filesystem.ls(path, detail=False))
    found = {name for name in listed if name.endswith(".parquet")}
    named = {part["part"]["path"] for part in parts}
    if strays := sorted(found - named):
        raise VerifyError(
            f"{folder}: {strays} is only in the folder; expected what the manifest names. Move "
            "away what somebody else has put there; what a killed run has left goes with `score "
            "gc` once it is old enough, and with the next version of the date."
        )
    if lost := sorted(named - found):
        raise VerifyError(
            f"{folder}: {lost} is only in the manifest; expected all parts that it names. Score "
            "the date again with `score run --force`."
        )


def _read_part(folder: str, stored: Row) -> pa.Table:
    uri = f"{folder}/{stored['path']}"
    data = _read(uri)
    if len(data) != stored["num_bytes"] or hashlib.sha256(data).hexdigest() != stored["sha256"]:
        raise VerifyError(f"{uri}: {len(data)} bytes with another sha256 than was committed.")
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise VerifyError(f"{uri}: cannot be read ({one_line(error)}).") from None
    return table


def _check_count(folder: str, stored: Row, found: int) -> None:
    if found != stored["num_rows"]:
        raise VerifyError(
            f"{folder}/{stored['path']}: {found} rows; committed were {stored['num_rows']}."
        )


def _check_engine(folder: str, part: Row, table: pa.Table) -> None:
    """Manifests of earlier versions of the program do not name it."""
    named = (table.schema.metadata or {}).get(b"nightscore.engine_key", b"").decode()
    told = part.get("engine")
    if named and told and told != named:
        raise VerifyError(
            f"{folder}/{part['part']['path']}: scored by engine {named[:12]} by its footer; the "
            f"manifest says {told[:12]}."
        )


def _check_engines(folder: str, manifest: Row) -> None:
    """The report's rows of each engine are those of the parts that name it."""
    told = {engine["key"]: engine["rows"] for engine in manifest["report"].get("engines", ())}
    counted: dict[str, int] = defaultdict(int)
    for part in manifest["parts"]:
        counted[part.get("engine", "")] += part["num_rows"]
    if told and "" not in counted and told != counted:
        raise VerifyError(
            f"{folder}: the report says {told} rows of engines; the parts name {dict(counted)}."
        )


def _check_file(
    folder: str, source: str, path: str, parts: list[Row], passthrough: list[str], num_rows: int
) -> tuple[int, int]:
    """Compare the parts of one input file with the file; return rows scored and quarantined."""
    next_row = num_scored = num_quarantined = 0
    with InputRows(source, passthrough) as file:
        if file.num_rows != num_rows:
            raise VerifyError(f"{source}: {file.num_rows} rows now; {num_rows} when it was scored.")
        for part in sorted(parts, key=lambda entry: entry["first_row"]):
            if part["first_row"] != next_row:
                raise VerifyError(
                    f"{source}: shard {part['shard']} begins at row {part['first_row']}; "
                    f"expected {next_row}."
                )
            next_row += part["num_rows"]
            if next_row > num_rows:
                break
            table = _read_part(folder, part["part"])
            _check_count(folder, part["part"], len(table))
            _check_engine(folder, part, table)
            bad = _quarantined_ranges(folder, path, part)
            wanted = file.rows(_between(part["first_row"], next_row, bad))
            if len(table) != len(wanted) or not all(
                _same_values(table[name], wanted[name]) for name in passthrough
            ):
                raise VerifyError(
                    f"{folder}/{part['part']['path']}: its {', '.join(passthrough)} are not those "
                    f"of {source} from row {part['first_row']} without the quarantined rows."
                )
            num_scored += len(table)
            num_quarantined += sum(len(rows) for rows in bad)
    if next_row != num_rows:
        raise VerifyError(f"{source}: parts end at row {next_row}; expected {num_rows}.")
    return num_scored, num_quarantined


def _between(first: int, end: int, bad: list[range]) -> list[range]:
    """The rows from `first` on that are in none of the ranges, which are in order."""
    starts = [first, *(rows.stop for rows in bad)]
    ends = [*(rows.start for rows in bad), end]
    return [range(*bounds) for bounds in zip(starts, ends, strict=True) if bounds[0] < bounds[1]]


def _same_values(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> bool:
    if common_type(expected.type, found.type) == as_stored(found.type) != as_stored(expected.type):
        expected = expected.cast(found.type)  # what other files of the date have
    if pa.types.is_dictionary(expected.type):  # the same values may have other indices
        found, expected = (column.cast(expected.type.value_type) for column in (found, expected))
    found, expected = without_views(found), without_views(expected)
    if found.type != expected.type or len(found) != len(expected):
        return False
    # To Arrow NaN is unlike itself; to us a row that kept its NaN is the same row.
    return found.equals(expected) or repr(found.to_pylist()) == repr(expected.to_pylist())


def _quarantined_ranges(folder: str, path: str, part: Row) -> list[range]:
    """Rows of the file that are in quarantine, in order."""
    if part["quarantine"] is None:
        return []
    table = _read_part(folder, part["quarantine"])
    where = f"{folder}/{part['quarantine']['path']}"
    bounds = zip(table["row"].to_pylist(), table["num_rows"].to_pylist(), strict=True)
    ranges = sorted(
        (range(row, row + num_rows) for row, num_rows in bounds), key=lambda rows: rows.start
    )
    end = part["first_row"]
    for rows in ranges:
        if rows.start < end or not rows:
            raise VerifyError(f"{where}: a row twice, or of another shard.")
        end = rows.stop
    if end > part["first_row"] + part["num_rows"]:
        raise VerifyError(f"{where}: a row twice, or of another shard.")
    _check_count(folder, part["quarantine"], sum(len(rows) for rows in ranges))
    if set(table["file"].to_pylist()) != {path}:
        raise VerifyError(f"{where}: rows of another file than {path}.")
    if not all(table["reason"].to_pylist()):
        raise VerifyError(f"{where}: a row without a reason.")
    return ranges
