"""The engine store: immutable engines by key, and a version log for each question asked of it.

    engines/<engine key>/{<sha256>-<file> ..., manifest.json}   the manifest is created last
    requests/<request key>/<number>.json                        which engine answers a request
    locks/<request key>...                                      held while an engine is built

An engine's key covers all that decides what it answers and where it is valid. A request's key
covers what a job asks for on this device, so that the next night finds the engine again. The store
may lie on a local disk or in a bucket; from a bucket, engines are fetched into a local cache.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from engines.errors import EngineCorruptError, EngineNotFoundError
from engines.files import FileStore
from engines.keys import digest_bytes
from engines.load import probes_agree
from engines.locks import LEASE_S, Patience, Say, file_lock, lease
from engines.manifest import EngineManifest, StoredEngine, check_content, parse_manifest
from engines.versions import Version, VersionLog

log = logging.getLogger(__name__)

ENGINES = "engines"
LOCKS = "locks"
MANIFEST = "manifest.json"


def default_cache() -> Path:
    """Where engines from a bucket are kept on this machine."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "nightscore", "engines")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """What a user of a store may choose."""

    cache: Path | None = None
    """Folder for engines from a bucket; None: see `default_cache`."""
    say: Say = log.info
    """Told when somebody else's build is waited for."""
    lease_s: float = LEASE_S
    """Silence after which the lock of a store in a bucket is taken over."""


class EngineStore:
    """Engines that several processes, or machines, may use at once."""

    def __init__(self, files: FileStore, options: StoreOptions | None = None) -> None:
        self.files = files
        self.versions = VersionLog(files)
        self._options = options or StoreOptions()
        self._local = Path(os.path.abspath(files.uri)) if "://" not in files.uri else None

    def find(self, request_key: str) -> StoredEngine | None:
        """The intact engine that answers a request, at hand on this machine; None without one.

        A damaged one is not served: that is said, and `publish` replaces it.
        """
        try:
            version = self.versions.current(request_key)
            if version is None:
                return None
            engine = self._read(version.engine, version)
            if engine.manifest.request_key != request_key:
                raise EngineCorruptError(
                    f"engine {engine.key[:12]}: answers request {engine.manifest.request_key[:12]}"
                    f"; expected {request_key[:12]}."
                )
            self.fetch(engine).check()
        except EngineCorruptError as error:
            log.warning("%s: %s So it is not used, and built again.", self.files.uri, error)
            return None
        return engine

    def keys(self) -> list[str]:
        """Keys of all engines that have at least one file."""
        return sorted({file.path.split("/")[1] for file in self.files.list_files(ENGINES)})

    def list(self) -> list[StoredEngine]:
        """All engines, newest first, not fetched; those that cannot be read are left out."""
        engines = []
        for key in self.keys():
            try:
                engines.append(self._read(key))
            except EngineCorruptError:
                continue
        return sorted(engines, key=lambda engine: engine.manifest.created_at, reverse=True)

    def full_key(self, key: str) -> str:
        """The one key that begins with `key`.

        Raises:
            EngineNotFoundError: None, or several.
        """
        found = [full for full in self.keys() if full.startswith(key)]
        if len(found) != 1:
            raise EngineNotFoundError(
                f"engine {key}: {len(found)} in {self.files.uri}; expected one. "
                "`score engine list` shows their keys."
            )
        return found[0]

    def get(self, key: str) -> StoredEngine:
        """The engine whose key begins with `key`, not fetched.

        Raises:
            EngineNotFoundError: None, or several.
            EngineCorruptError: Its manifest cannot be read.
        """
        return self._read(self.full_key(key))

    def check(self, key: str) -> StoredEngine:
        """Compare every file of an engine, as it lies in the store, with what was published.

        Raises:
            EngineCorruptError: A byte has changed, or a file is gone.
        """
        engine = self._read(key)
        named = [v for v in self.versions.history(engine.manifest.request_key) if v.engine == key]
        if named:
            engine = self._read(key, named[-1])
        for name, sha256 in engine.manifest.files.items():
            self._read_file(key, name, sha256)
        return engine

    def fetch(self, engine: StoredEngine) -> StoredEngine:
        """Bring the files of an engine to this machine, unless they are here.

        Raises:
            EngineCorruptError: What the store has is not what was published.
        """
        if self._local is not None:
            return engine
        folder = Path(engine.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, sha256 in engine.manifest.files.items():
            path = folder / name
            if path.exists() and digest_bytes(path.read_bytes()) == sha256:
                continue
            temporary = path.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
            try:
                temporary.write_bytes(self._read_file(engine.key, name, sha256))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return engine

    def publish(
        self, manifest: EngineManifest, artifact: bytes, attachments: Mapping[str, bytes]
    ) -> StoredEngine:
        """Store an engine and let it answer its request from now on.

        Hashes and sizes of the files are filled in here. Builds are not deterministic: when an
        intact engine of the same key is there, or comes first, that one is taken and returned;
        unless it does not answer its probe batch as this one, which ran a moment ago, did.
        """
        manifest = replace(
            manifest,
            artifact_sha256=digest_bytes(artifact),
            artifact_bytes=len(artifact),
            attachments={name: digest_bytes(data) for name, data in attachments.items()},
        )
        contents = {manifest.artifact: artifact, **attachments}
        self._create(manifest, dict(zip(manifest.files, contents.values(), strict=True)))
        path = _path(manifest.key, MANIFEST)
        published = self.files.read(path)
        if published is None:
            raise EngineCorruptError(f"{path}: gone; expected what was created a moment ago.")
        digest = digest_bytes(published)
        version = self.versions.append(manifest.request_key, manifest.key, digest, "built")
        engine = self.fetch(self._read(manifest.key, version))
        if engine.manifest.artifact_sha256 != manifest.artifact_sha256:
            log.info("engine %s: an earlier build of it is kept.", manifest.key[:12])
        return engine

    def lock(self, request_key: str, timeout_s: float = 3600.0) -> AbstractContextManager[None]:
        """Hold the build lock of a request; see engines/locks.py for what frees it.

        Raises:
            LockTimeoutError: Somebody else has held it for longer than `timeout_s`.
        """
        patience = Patience(timeout_s=timeout_s, say=self._options.say)
        if self._local is not None:
            return file_lock(self._local / LOCKS / f"{request_key}.lock", patience)
        return lease(self.files, f"{LOCKS}/{request_key}", patience, self._options.lease_s)

    def folder(self, key: str) -> Path:
        """Where the files of an engine lie on this machine, or will."""
        if self._local is not None:
            return self._local / ENGINES / key
        return (self._options.cache or default_cache()) / key

    def _create(self, manifest: EngineManifest, contents: Mapping[str, bytes]) -> None:
        """Put the files of an engine into the store, the manifest last."""
        if self.files.read(_path(manifest.key, MANIFEST)) is not None:
            if self._is_as_good(manifest):
                return
            # First: readers begin with it. None to see is none to delete: one may just be created.
            self.files.delete(_path(manifest.key, MANIFEST))
        for name, data in contents.items():
            path = _path(manifest.key, name)
            if not self.files.create(path, data) and self.files.read(path) != data:
                self.files.delete(path)
                self.files.create(path, data)
        self.files.create(_path(manifest.key, MANIFEST), manifest.to_json())

    def _is_as_good(self, manifest: EngineManifest) -> bool:
        """Whether the engine that is there already is intact and answers as the new one."""
        try:
            there = self.check(manifest.key)
            there.check_runtime()
        except EngineCorruptError:
            return False
        return probes_agree(there.manifest.probe, manifest.probe)

    def _read(self, key: str, version: Version | None = None) -> StoredEngine:
        data = self.files.read(_path(key, MANIFEST))
        if data is None:
            raise EngineCorruptError(f"engine {key[:12]}: no {MANIFEST}; expected an engine.")
        if version is not None:
            check_content(key, MANIFEST, data, version.manifest_sha256)
        manifest = parse_manifest(data)
        if manifest.key != key:
            raise EngineCorruptError(
                f"engine {key[:12]}: its manifest is that of {manifest.key[:12]}; expected its own."
            )
        return StoredEngine(folder=str(self.folder(key)), manifest=manifest)

    def _read_file(self, key: str, name: str, sha256: str) -> bytes:
        data = self.files.read(_path(key, name))
        if data is None:
            raise EngineCorruptError(f"engine {key[:12]}: {name} is gone; expected it.")
        check_content(key, name, data, sha256)
        return data


def _path(key: str, name: str) -> str:
    return f"{ENGINES}/{key}/{name}"
