"""Find and remove what no published, kept or unfinished run of a job needs.

Whatever was touched lately is left alone, by the store's clock, and so is a run that was. Nothing
here is needed for correctness: a reader never sees garbage, and no run reads it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ledger import Ledger
from pipeline.published_names import version_of
from pipeline.storage import (
    PROBE_PREFIX,
    STAGING_PREFIX,
    FileInfo,
    Storage,
    UnfinishedUpload,
)
from pipeline.versions import (
    KEPT_MANIFEST,
    Published,
    find_published,
    settle,
)

ORPHAN = "parts that no record names"
PUBLISHED = "ledgers of published runs"
REPLACED = "replaced versions"
OVERTAKEN = "runs of dates that another run published"
UNFINISHED = "runs that were never published"
LEFTOVER = "temporary files and folders"
STRAY = "files in published folders that no manifest names"
UPLOAD = "unfinished uploads"


@dataclass(frozen=True, kw_only=True, slots=True)
class GcRules:
    """What may go."""

    before: float
    """Unix time in s: what was touched since is left alone."""
    keep_versions: int
    """Replaced versions of each date that are kept, the newest ones."""
    unfinished: bool
    """Whether runs that were never published may go as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """What nobody needs, in the order in which it must go."""

    files: tuple[tuple[FileInfo, str], ...]
    """With the reason of each."""
    uploads: tuple[UnfinishedUpload, ...]
    littered: tuple[Published, ...] = ()
    """Dates in whose folders some of it is."""


def find_garbage(output: Storage, job: str, rules: GcRules) -> Garbage:
    """What of a job's output nobody needs."""
    folders: dict[str, list[FileInfo]] = defaultdict(list)
    for info in output.list_files(job):
        first, _, rest = info.path.removeprefix(f"{job}/").partition("/")
        folders[f"{first}/{rest.partition('/')[0]}" if first == "_runs" else first].append(info)
    runs = {name.removeprefix("_runs/"): found for name, found in folders.items() if "/" in name}
    published = _published_dates(output, job, runs)
    files: list[tuple[FileInfo, str]] = []
    for name, found in folders.items():
        is_old = max(info.modified_at for info in found) < rules.before
        if name.startswith(STAGING_PREFIX) and is_old:
            files += [(info, LEFTOVER) for info in found]
        elif name.startswith("dt="):
            files += _strays(found, published.get(name.removeprefix("dt=")), rules)
    files += [
        (info, LEFTOVER)
        for info in (info for found in folders.values() for info in found)
        if _is_temporary(info) and info.modified_at < rules.before
    ]
    files += _of_runs(output, job, runs, published, rules)
    uploads = tuple(
        upload for upload in output.unfinished_uploads(job) if upload.started_at < rules.before
    )
    littered = {
        info.path.removeprefix(f"{job}/").split("/")[0] for info, why in files if why == STRAY
    }
    return Garbage(
        files=tuple(dict(files).items()),
        uploads=uploads,
        littered=tuple(each for date, each in published.items() if f"dt={date}" in littered),
    )


def collect(output: Storage, garbage: Garbage) -> None:
    """Remove it: commit records first, so that no record ever names a file that is gone."""
    paths = [info.path for info, _ in garbage.files]
    records = [path for path in paths if "/commits/" in path]
    output.delete_many(records)
    output.delete_many(sorted(set(paths) - set(records)))
    for upload in garbage.uploads:
        output.abort_upload(upload)
    for published in garbage.littered:
        settle(output, published)


def summary(garbage: Garbage) -> dict[str, Any]:
    """Numbers of files, and of bytes that come back, in all and by reason."""
    by_reason: dict[str, dict[str, int]] = {}
    freed = _freed_bytes([info for info, _ in garbage.files])
    for (_, why), num_bytes in zip(garbage.files, freed, strict=True):
        entry = by_reason.setdefault(why, {"num_files": 0, "num_bytes": 0})
        entry["num_files"] += 1
        entry["num_bytes"] += num_bytes
    if garbage.uploads:
        by_reason[UPLOAD] = {"num_files": len(garbage.uploads), "num_bytes": 0}
    return {
        "num_files": len(garbage.files),
        "num_bytes": sum(freed),
        "num_uploads": len(garbage.uploads),
        "by_reason": by_reason,
    }


def _freed_bytes(files: Sequence[FileInfo]) -> list[int]:
    """For each file what comes back when all of them go.

    That is nothing while a published or kept version has the same part under another name. Of names
    that all go, the last brings the bytes.
    """
    gone: Counter[tuple[int, int]] = Counter()
    freed = []
    for info in files:
        if info.shared is not None:
            gone[info.shared] += 1
        is_last = info.shared is None or gone[info.shared] == info.shared[1]
        freed.append(info.num_bytes if is_last else 0)
    return freed


def _is_temporary(info: FileInfo) -> bool:
    name = info.path.rpartition("/")[2]
    return name.startswith(PROBE_PREFIX) or (name.startswith(".") and name.endswith(".tmp"))


def _published_dates(
    output: Storage, job: str, runs: dict[str, list[FileInfo]]
) -> dict[str, Published]:
    """Current versions of all dates that have a run's ledger."""
    dates = {_date_of(run_id) for run_id in runs}
    found = {date: find_published(output, job, date) for date in sorted(dates)}
    return {date: version for date, version in found.items() if version is not None}


def _date_of(run_id: str) -> str:
    return run_id.rpartition("-")[0]


def _strays(
    found: Sequence[FileInfo], published: Published | None, rules: GcRules
) -> Iterator[tuple[FileInfo, str]]:
    """Copies of a publication that died, on an object store."""
    if published is None:  # perhaps somebody is publishing: it may take a while
        return
    named = {path for path, _ in published.files()}
    for info in found:
        path = info.path.partition(f"/dt={published.date}/")[2]
        is_part = version_of(path) is not None  # what is none was put there by somebody else
        if is_part and path not in named and info.modified_at < rules.before:
            yield info, STRAY


def _of_runs(
    output: Storage,
    job: str,
    runs: dict[str, list[FileInfo]],
    published: dict[str, Published],
    rules: GcRules,
) -> Iterator[tuple[FileInfo, str]]:
    kept = _kept_versions(runs, published, rules)
    for run_id, found in sorted(runs.items()):
        if max(info.modified_at for info in found) >= rules.before:
            continue  # at work, or not long ago
        current = published.get(_date_of(run_id))
        if current is None:
            why = UNFINISHED
            found = found if rules.unfinished else _orphans(output, job, run_id, found)
        elif run_id in kept:
            continue
        else:
            why = REPLACED if _has_manifest(run_id, found) else OVERTAKEN
            why = PUBLISHED if run_id == current.run_id else why
        yield from ((info, why if found is runs[run_id] else ORPHAN) for info in found)


def _kept_versions(
    runs: dict[str, list[FileInfo]], published: dict[str, Published], rules: GcRules
) -> set[str]:
    """Replaced versions that `score rollback` can go back to: of each date the newest ones."""
    by_date: dict[str, list[tuple[bool, float, str]]] = defaultdict(list)
    for run_id, found in runs.items():
        current = published.get(_date_of(run_id))
        if current and run_id != current.run_id and _has_manifest(run_id, found):
            is_last = run_id == current.manifest.get("replaces")
            replaced_at = max(info.modified_at for info in found)
            by_date[current.date].append((is_last, replaced_at, run_id))
    newest = (sorted(each, reverse=True)[: rules.keep_versions] for each in by_date.values())
    return {run_id for each in newest for _, _, run_id in each}


def _has_manifest(run_id: str, found: Sequence[FileInfo]) -> bool:
    return any(info.path.endswith(f"/{run_id}/{KEPT_MANIFEST}") for info in found)


def _orphans(output: Storage, job: str, run_id: str, found: Sequence[FileInfo]) -> list[FileInfo]:
    """Parts of an unfinished run that were uploaded and not committed."""
    records = Ledger(output, job, run_id).records().values()
    named = {file.name for record in records for file in (record.part, record.quarantine) if file}
    return [
        info
        for info in found
        if info.path.split("/")[-2] == "parts" and info.path.split("/")[-1] not in named
    ]
