"""Paths that come from jobs, listings and records must stay below the root that the job names."""

from __future__ import annotations

import os

from pipeline.errors import StorageError


def stays_below(path: str) -> bool:
    """Whether a relative path with `/` leads nowhere but below its root, links aside."""
    return not path.startswith("/") and ".." not in path.split("/")


def is_plain(address: str) -> bool:
    """Whether it is a local path, or an `s3://` address whose every segment is a name.

    A bucket takes empty segments, `.` and `..` for names, and who compares addresses does not.
    """
    scheme, separator, rest = address.partition("://")
    segments = rest.rstrip("/").split("/") if separator and scheme == "s3" else []
    return not {"", ".", ".."} & set(segments)


def is_hidden(path: str) -> bool:
    """Like Spark and pyarrow: what has a name that begins with `_` or `.`, or lies below such."""
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def is_listed_below(address: str, folder: str) -> bool:
    """Whether data at one address, local or `s3://`, are in a listing of the folder at another."""
    inner, outer = (
        text.rstrip("/") if "://" in text else os.path.abspath(text).rstrip("/")
        for text in (address.removeprefix("file://"), folder.removeprefix("file://"))
    )
    below = f"{inner}/".removeprefix(f"{outer}/")
    return below != f"{inner}/" and not is_hidden(below)


def checked(path: str, uri: str) -> str:
    """`path`, which must stay below the root at `uri`: names in records may have been altered.

    Links are followed, as by Spark and pyarrow: whoever may write links there may write data, too.

    Raises:
        StorageError: It leads out.
    """
    if not stays_below(path):
        raise StorageError(
            f"{uri}: {path!r} leads out of it; expected a path below it. Somebody has altered a "
            "record; look who can write there."
        )
    return path
