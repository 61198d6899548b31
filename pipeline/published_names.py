"""Names of parts in a published folder: they tell that a run made a file, and for which version.

    part-00017-0123456789ab.parquet                        of version 1
    part-00017-0123456789ab-v2.parquet                     of version 2
    _quarantine/quarantine-00017-0123456789ab-v2.parquet

What has another name belongs to somebody else: no run removes it.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

FIRST = 1
"""The version of names without a number."""
_PART = re.compile(r"(?:part|_quarantine/quarantine)-\d{5,}-[0-9a-f]{12}(?:-v(\d+))?\.parquet")


def numbered(path: str, version: int) -> str:
    """`part-00017-0123456789ab.parquet` as `part-00017-0123456789ab-v2.parquet`."""
    whole = PurePosixPath(path)
    stem, _, number = whole.stem.rpartition("-v")
    return str(whole.with_stem(f"{stem if number.isdigit() else whole.stem}-v{version}"))


def version_of(path: str) -> int | None:
    """The version of a date that a run made a file for; None: no run gives such a name."""
    found = _PART.fullmatch(path)
    return found and int(found[1] or FIRST)
