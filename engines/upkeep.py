"""Upkeep of an engine store: going back to an earlier engine, and removing what nobody needs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

from engines.errors import RollbackError
from engines.files import StoredFile
from engines.store import ENGINES, LOCKS, MANIFEST, EngineStore
from engines.versions import Version

LEFT_OVER_S = 3600.0
"""Younger files may belong to somebody who publishes right now."""


def roll_back(store: EngineStore, request_key: str, to: str | None = None) -> Version:
    """Make an earlier engine of a request current again, by appending a version.

    Args:
        store: The store.
        request_key: The request.
        to: Full key of the engine; None: the newest that is not current.

    Raises:
        RollbackError: There is none, it is current, or it missed the gate.
        EngineCorruptError: It is damaged.
    """
    history = store.versions.history(request_key)
    if not history:
        raise RollbackError("no engine has answered this request; expected at least two versions.")
    current = history[-1].engine
    if to is None:
        earlier = [version.engine for version in history if version.engine != current]
        if not earlier:
            raise RollbackError(
                f"engine {current[:12]}: the only one that has answered this request; expected an "
                "earlier one. An engine of another model comes back with its model file."
            )
        to = earlier[-1]
    elif to == current:
        raise RollbackError(f"engine {to[:12]}: current already; expected another one.")
    elif to not in {version.engine for version in history}:
        raise RollbackError(
            f"engine {to[:12]}: has never answered this request; expected one that has."
        )
    if not store.check(to).manifest.passed_gate:
        raise RollbackError(f"engine {to[:12]}: did not pass the gate; expected one that did.")
    digest = next(v.manifest_sha256 for v in reversed(history) if v.engine == to)
    return store.versions.append(request_key, to, digest, "rolled back")


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """What is, or would be, removed."""

    engines: tuple[str, ...]
    """Keys."""
    left_overs: tuple[str, ...]
    """Paths of files that killed processes left behind."""
    num_bytes: int


def collect_garbage(store: EngineStore, num_versions: int, *, dry_run: bool = False) -> Garbage:
    """Remove engines that no request names in its newest versions, and old left-overs.

    Args:
        store: The store.
        num_versions: How many versions of each request keep their engine.
        dry_run: Say it only.
    """
    files = [file for file in store.files.list_files("") if _is_ours(file)]
    log = store.versions.all()
    kept = {v.engine for versions in log.values() for v in versions[-num_versions:]}
    by_engine: dict[str, list[StoredFile]] = {}
    for file in files:
        folder, _, rest = file.path.partition("/")
        if folder == ENGINES:
            by_engine.setdefault(rest.partition("/")[0], []).append(file)
    doomed = {key: of for key, of in by_engine.items() if key not in kept and _is_old(of)}
    removed = [file for of in doomed.values() for file in of]
    left_overs = [file for file in _left_overs(store, files, by_engine) if file not in removed]
    if not dry_run:
        for file in sorted(removed, key=lambda file: not file.path.endswith(f"/{MANIFEST}")):
            store.files.delete(file.path)  # manifests first: readers begin with them
        for file in left_overs:
            store.files.delete(file.path)
        for key in doomed:
            _forget_here(store, key)
    return Garbage(
        engines=tuple(sorted(doomed)),
        left_overs=tuple(file.path for file in left_overs),
        num_bytes=sum(file.num_bytes for file in (*removed, *left_overs)),
    )


def _is_ours(file: StoredFile) -> bool:
    return file.path.partition("/")[0] in (ENGINES, "requests", LOCKS)


def _is_old(files: Iterable[StoredFile]) -> bool:
    return time.time() - max(file.modified_at for file in files) > LEFT_OVER_S


def _left_overs(
    store: EngineStore, files: list[StoredFile], by_engine: dict[str, list[StoredFile]]
) -> list[StoredFile]:
    """Old temporary files, files that no manifest names, and leases whose owner is long dead."""
    found = [file for file in files if file.path.endswith(".tmp") and _is_old([file])]
    named: set[str] = {f"{ENGINES}/{key}/{MANIFEST}" for key in by_engine}
    for engine in store.list():
        named |= {f"{ENGINES}/{engine.key}/{name}" for name in engine.manifest.files}
    for of in by_engine.values():
        found += [f for f in of if f.path not in named and _is_old([f]) and f not in found]
    leases: dict[PurePosixPath, list[StoredFile]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if path.parts[0] == LOCKS and len(path.parts) > 2:
            leases.setdefault(path.parent, []).append(file)
    for of in leases.values():
        found += of if _is_old(of) else []
    return found


def _forget_here(store: EngineStore, key: str) -> None:
    """Remove what this machine has of an engine: its copy of it, or the empty folder."""
    folder = store.folder(key)
    if "://" in store.files.uri:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with suppress(OSError):  # not empty: somebody publishes it again
            folder.rmdir()
