"""A look at a dataset: its dates, and which columns are images, features and ids.

What is said of columns is a guess from names, types and a file's first rows: people check it.
"""

from __future__ import annotations

import datetime
import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, one_line
from pipeline.image_column import encoded_images, holds_images
from pipeline.plan import is_data
from pipeline.storage import Storage

SAMPLE_ROWS = 256
IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
"""JPEG and PNG."""
ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
ID_NAME = re.compile(r"(^|.*_)(id|uuid|guid|key)$", re.IGNORECASE)
NUMBERED = re.compile(r"(.*?)\d+$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Columns that could be a model's input together."""

    patterns: tuple[str, ...]
    """As `input.features.columns` takes them."""
    width: int
    """Numbers in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a look at a dataset found."""

    partition: str | None
    """As `input.partition` takes it; None: no folder is named by a date."""
    dates: tuple[str, ...]
    """ISO, ascending."""
    num_files: int
    """Of the newest date, or of all where there are no dates."""
    image_column: str | None
    features: tuple[Features, ...]
    """The likeliest first."""
    ids: tuple[str, ...]
    """Columns that tell rows apart, as it seems; never empty."""


def look_at(source: Storage) -> Dataset:
    """List a dataset, and read the first rows of one file of its newest date.

    Raises:
        InputError: There is no Parquet file, the first one cannot be read, or no column could tell
            rows apart.
    """
    paths = [info.path for info in source.list_files("") if is_data(info.path)]
    if not paths:
        raise InputError(
            f"{source.uri}: no *.parquet files; expected a dataset. Check the address."
        )
    partition, by_date = _by_date(paths)
    files = by_date[max(by_date)] if by_date else paths
    sample = _first_rows(source, files[0])
    image = next(_image_columns(sample), None)
    ids = _id_columns(sample)
    if not ids:
        raise InputError(
            f"{source.uri}/{files[0]}: no column of whole numbers or text; expected an id that "
            "tells rows apart in the output. Add one to the dataset."
        )
    return Dataset(
        partition=partition,
        dates=tuple(sorted(by_date)),
        num_files=len(files),
        image_column=image,
        features=tuple(_features(sample.schema, ids)),
        ids=ids,
    )


def _by_date(paths: Sequence[str]) -> tuple[str | None, dict[str, list[str]]]:
    """The commonest way in which folders are named by dates, and the files of each date."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        place = _date_in(path)
        if place is not None:
            template, date = place
            found.setdefault(template, {}).setdefault(date, []).append(path)
    if not found:
        return None, {}
    return max(found.items(), key=lambda item: sum(map(len, item[1].values())))


def _date_in(path: str) -> tuple[str, str] | None:
    """`a/dt=2026-11-20/x.parquet` as `a/dt={date}` and the date."""
    folders = path.split("/")[:-1]
    for depth, folder in enumerate(folders):
        match = ISO_DATE.search(folder)
        if match:
            try:
                date = datetime.date.fromisoformat(match.group()).isoformat()
            except ValueError:
                continue
            name = folder.replace(match.group(), "{date}")
            return "/".join([*folders[:depth], name]), date
    return None


def _first_rows(source: Storage, path: str) -> pa.Table:
    try:
        with source.open(path) as file:
            parquet = pq.ParquetFile(file)
            batches = itertools.islice(parquet.iter_batches(batch_size=SAMPLE_ROWS), 1)
            return pa.Table.from_batches(batches, parquet.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{source.uri}/{path}: {one_line(error)}; expected a Parquet file. Write it again."
        ) from None


def _image_columns(sample: pa.Table) -> Iterator[str]:
    """Binary columns with more pictures than anything else."""
    for field in sample.schema:
        if holds_images(field.type):
            images = encoded_images(sample[field.name].combine_chunks())
            values = [value for value in images.to_pylist() if value]
            pictures = [value for value in values if value.startswith(IMAGE_MAGIC)]
            if 2 * len(pictures) > len(values):
                yield field.name


def _id_columns(sample: pa.Table) -> tuple[str, ...]:
    """Columns that are named like ids; else the first whose values differ; else the first."""
    able = [field.name for field in sample.schema if _may_be_id(field.type)]
    named = [name for name in able if ID_NAME.match(name)]
    distinct = (name for name in able if len(sample[name].unique()) == sample.num_rows)
    return tuple(named or list(itertools.islice(distinct, 1)) or able[:1])


def _may_be_id(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    return any(is_kind(kind) for is_kind in kinds)


def _is_number(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating))


def _features(schema: pa.Schema, ids: Sequence[str]) -> Iterator[Features]:
    """Lists of fixed size, then columns that are numbered alike, then floats, then all numbers."""
    for field in schema:
        if pa.types.is_fixed_size_list(field.type) and _is_number(field.type.value_type):
            yield Features(patterns=(field.name,), width=field.type.list_size)
    numbers = [f.name for f in schema if _is_number(f.type) and f.name not in ids]
    matches = (NUMBERED.match(name) for name in numbers)
    stems = Counter(match.group(1) for match in matches if match)
    for stem, count in stems.most_common():
        members = [name for name in schema.names if fnmatch.fnmatchcase(name, f"{stem}*")]
        if stem and count > 1 and set(members) <= set(numbers):
            yield Features(patterns=(f"{stem}*",), width=len(members))
    floats = [name for name in numbers if pa.types.is_floating(schema.field(name).type)]
    for names in (floats, numbers):
        if names:
            yield Features(patterns=tuple(names), width=len(names))
