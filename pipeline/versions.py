"""Versions of a published date: a forced re-run takes the last one's place, and can be taken back.

    <job>/dt=<date>/                        the current version, all that readers see
    <job>/_runs/<run_id>/manifest.json      one that was replaced, as it was published
    <job>/_runs/<run_id>/parts/             its files

A manifest says its `version` (1, 2, ...) and which run it `replaces`. Going back makes another
version, too: numbers only grow, so that nothing ever has to be guessed about who was first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError, StorageError, VerifyError
from pipeline.ledger import CommitRecord, record_from_dict, run_folder, utc_now
from pipeline.published_names import numbered, version_of
from pipeline.storage import MANIFEST, SUCCESS, Storage

REPORT_JSON = "_report.json"
REPORT_HTML = "_report.html"
KEPT_MANIFEST = "manifest.json"
NUM_LOOKS = 5
"""At a published folder, to remove what whoever lost a race is still copying there."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A published version of a date."""

    job: str
    date: str
    manifest: dict[str, Any]
    data: bytes
    """The manifest as it is stored: what a swap is conditional on."""

    @property
    def run_id(self) -> str:
        return str(self.manifest["run_id"])

    @property
    def version(self) -> int:
        return int(self.manifest.get("version", 1))

    @property
    def engine_key(self) -> str:
        return str(self.manifest["report"]["engine"]["key"])

    @property
    def engine_common(self) -> str:
        """What its engines have in common; see pipeline/engine_pin.py. Empty: not known."""
        return str(self.manifest["report"]["engine"].get("common", ""))

    @property
    def folder(self) -> str:
        """Where readers find it, below the output's root."""
        return published_folder(self.job, self.date)

    def files(self) -> Iterator[tuple[str, str]]:
        """Of each file its path in `folder`, and its name in the run's `parts/`."""
        for part in self.manifest["parts"]:
            for file in (part["part"], part["quarantine"]):
                if file is not None:
                    yield file["path"], file["name"]

    def records(self) -> dict[int, CommitRecord]:
        """What its ledger said, by shard; the ledger itself may be gone (see pipeline/gc.py)."""
        found = {}
        for part in self.manifest["parts"]:
            files = {kind: _without_path(part[kind]) for kind in ("part", "quarantine")}
            found[part["shard"]] = record_from_dict({**part, **files})
        return found

    def kept_path(self, name: str) -> str:
        """Where a file of this version is in the ledger of its run."""
        return f"{run_folder(self.job, self.run_id)}/parts/{name}"


def _without_path(file: dict[str, Any] | None) -> dict[str, Any] | None:
    return file and {key: value for key, value in file.items() if key != "path"}


def published_folder(job: str, date: str) -> str:
    """Where readers find a date, below the output's root."""
    return f"{job}/dt={date}"


def find_published(output: Storage, job: str, date: str) -> Published | None:
    """The current version of a date, or None when it is not published."""
    return _read(output, job, date, f"{published_folder(job, date)}/{MANIFEST}")


def find_kept(output: Storage, job: str, date: str, run_id: str) -> Published | None:
    """A version that was replaced, or None when it is not kept."""
    return _read(output, job, date, f"{run_folder(job, run_id)}/{KEPT_MANIFEST}")


def _read(output: Storage, job: str, date: str, path: str) -> Published | None:
    data = output.read(path)
    if data is None:
        return None
    try:
        manifest = json.loads(data)
        if not isinstance(manifest["run_id"], str):
            raise TypeError("its run_id is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise VerifyError(
            f"{output.uri}/{path}: damaged ({error}); expected the manifest of a published run. "
            "Move its folder away and run the date again: what its ledger knows to be scored is "
            "only published once more."
        ) from None
    return Published(job=job, date=date, manifest=manifest, data=data)


def replace(
    output: Storage, current: Published, manifest: dict[str, Any], files: dict[str, str]
) -> Published | None:
    """Put another version in the place of `current`, which is kept, unless files of it are lost.

    Args:
        output: Where both are.
        current: The version that is expected to be published.
        manifest: Of the new one; gets its number, and new names for its files: no name ever means
            two versions' files, so that nobody can remove another one's.
        files: Path in the published folder, as in `manifest` -> existing path.

    Returns:
        The new one; None when another one has been published meanwhile, and nothing has changed.
    """
    _keep(output, current)
    version = current.version + 1
    parts = [
        {
            **part,
            **{kind: _renamed(part[kind], version) for kind in ("part", "quarantine")},
        }
        for part in manifest["parts"]
    ]
    number = {"version": version, "replaces": current.run_id, "published_at": utc_now()}
    new = {**manifest, "parts": parts, **number}
    copies = {numbered(path, version): source for path, source in files.items()}
    data = json.dumps(new).encode()
    if not output.swap(copies, data, current.folder, current.data):
        withdraw(output, current.job, current.date, set(copies))
        return None
    published = Published(job=current.job, date=current.date, manifest=new, data=data)
    settle(output, published)
    return published


def _renamed(file: dict[str, Any] | None, version: int) -> dict[str, Any] | None:
    return file and {**file, "path": numbered(file["path"], version)}


def _keep(output: Storage, current: Published) -> None:
    """Make the ledger of a version's run hold all that publishing it again takes, if it is there.

    What somebody else keeps and removes meanwhile is not lost: the ledger is listed last.
    """
    folder = run_folder(current.job, current.run_id)
    wanted = {current.kept_path(name): f"{current.folder}/{path}" for path, name in current.files()}
    published, kept = (
        {info.path for info in output.list_files(each)}
        for each in (current.folder, f"{folder}/parts")
    )
    missing = {path: source for path, source in wanted.items() if path not in kept}
    lost = set(missing.values()) - published
    if lost:
        what = "%s/%s: lost, one of %d such files of version %d, which cannot be had back then."
        log.warning(what, output.uri, min(lost), len(lost), current.version)
        return
    output.copy(missing)
    output.create(f"{folder}/{KEPT_MANIFEST}", current.data)


def withdraw(output: Storage, job: str, date: str, ours: set[str]) -> None:
    """Remove what was copied for a version that was not published: on an object store it is there.

    Args:
        output: Where the job's output is.
        job: Name of the job.
        date: ISO date.
        ours: Paths in the published folder; those that the version there names are left alone.
    """
    now = find_published(output, job, date)
    named = {path for path, _ in now.files()} if now else set()
    folder = published_folder(job, date)
    output.delete_many([f"{folder}/{path}" for path in sorted(ours - named)])
    if now:
        settle(output, now)


def settle(output: Storage, published: Published) -> None:
    """Remove what other runs left in the published folder, then say that it is whole.

    Does nothing on a local disk. On an object store it may be done again at any time, by anybody.
    Files of an earlier version are stale, and so are those of a run that meant to publish this one:
    whoever would still name them expects a manifest that is gone. Where files of a later version
    are appearing, it is whoever copies them that ends this. Names that no run gives are left alone.
    """
    done = f"{published.folder}/{SUCCESS}"
    if output.info(done) is not None:
        return
    others: dict[str, int] = {}
    for _ in range(NUM_LOOKS):
        others = _unnamed(output, published)
        stale = [path for path, version in others.items() if version <= published.version]
        if not stale:
            break
        output.delete_many([f"{published.folder}/{path}" for path in stale])
    if "replaces" in published.manifest:
        reports = (REPORT_JSON, REPORT_HTML)
        output.delete_many([f"{published.folder}/{name}" for name in reports])
    if others:
        what = (
            "%s/%s: no %s yet, as `%s` is not of version %d. Whoever is publishing the date ends "
        )
        what += "this; if nobody is, `score run --force` does, or `score gc` when it is old enough."
        log.warning(what, output.uri, published.folder, SUCCESS, min(others), published.version)
        return
    output.create(done, b"")


def _unnamed(output: Storage, published: Published) -> dict[str, int]:
    """Parts in the published folder that its manifest does not name, and the version of each."""
    found = output.list_files(published.folder)
    present = {info.path.removeprefix(f"{published.folder}/") for info in found}
    versions = {
        path: version_of(path) for path in present - {path for path, _ in published.files()}
    }
    return {path: version for path, version in versions.items() if version is not None}


def roll_back(output: Storage, job: str, date: str, to: str | None = None) -> Published:
    """Publish an earlier version again, as a new version.

    Args:
        output: Where the job's output is.
        job: Name of the job.
        date: ISO date.
        to: Run id of that version; None: the one that the current one replaced.

    Raises:
        InputError: The date is not published, or has no such version.
        StorageError: Another version was published meanwhile.
    """
    current = find_published(output, job, date)
    where = f"{output.uri}/{published_folder(job, date)}"
    if current is None:
        raise InputError(f"{where}: not published; expected a published date.")
    wanted = to or current.manifest.get("replaces")
    if wanted is None:
        raise InputError(f"{where}: there is only one version; expected an earlier one.")
    is_name = "/" not in wanted and wanted != current.run_id
    earlier = find_kept(output, job, date, wanted) if is_name else None
    if earlier is None:
        known = ", ".join(kept_versions(output, job, date, besides=current.run_id)) or "none"
        raise InputError(f"{where}: no earlier version {wanted}; expected one of: {known}.")
    files = {path: earlier.kept_path(name) for path, name in earlier.files()}
    published = replace(output, current, earlier.manifest, files)
    if published is None:
        raise StorageError(
            f"{where}: another version was published meanwhile; nothing was changed. Look at "
            "`score status`, and run the same command again if you still want it."
        )
    return published


def kept_versions(output: Storage, job: str, date: str, *, besides: str) -> list[str]:
    """Run ids of a date's replaced versions that can be had back."""
    files = output.list_files(f"{job}/_runs")
    ids = [
        info.path.split("/")[-2]
        for info in files
        if info.path.endswith(f"/{KEPT_MANIFEST}") and info.path.count("/") == job.count("/") + 3
    ]
    return [run_id for run_id in ids if run_id.startswith(f"{date}-") and run_id != besides]
