"""The engine store: immutable engines by key, and a pointer for each question asked of it.

    <root>/engines/<engine key>/{<artifact>, manifest.json}   published by one atomic rename
    <root>/current/<request key>.json                         which engine answers a request
    <root>/locks/<request key>.lock                           held while an engine is built

An engine's key covers all that decides what it answers and where it is valid. A request's key
covers what a job asks for on this device, so that the next night finds the engine again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.devices import Cpu, Device, Gpu
from engines.errors import EngineCorruptError, EngineNotFoundError, LockTimeoutError
from engines.gate import Accuracy
from engines.keys import digest_bytes
from engines.runner import TensorSpec

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One candidate of the ladder, as it was measured."""

    runtime: str
    precision: str
    rows_per_s: float
    accuracy: Accuracy | None
    """None when the candidate failed."""
    passed: bool
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineManifest:
    """What an engine is, where it is valid, and why it was chosen."""

    key: str
    request_key: str
    model_source: str
    model_fingerprint: str
    runtime: str
    runtime_version: str
    precision: str
    batch_size: int
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    artifact: str
    """Name of the file that the runtime loads: an ONNX graph, a TensorRT plan, a torch program."""
    artifact_sha256: str
    artifact_bytes: int
    attachments: Mapping[str, str]
    """Names and sha256 of the files kept beside it, such as the scale table."""
    device: Device
    calibration_rows: int
    calibration_sha256: str
    """Of the rows that the scales were taken from."""
    min_agreement: float
    accuracy: Accuracy
    rungs: tuple[Rung, ...]
    reason: str
    build_s: float
    created_at: str
    """ISO 8601, UTC."""
    probe: tuple[float, ...]
    """Float output of the probe batch, first column; see engines/load.py."""

    def to_json(self) -> bytes:
        """UTF-8 JSON."""
        return json.dumps(asdict(self), indent=1).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEngine:
    """An engine on disk."""

    folder: str
    manifest: EngineManifest

    @property
    def key(self) -> str:
        """The engine's key."""
        return self.manifest.key

    @property
    def artifact(self) -> Path:
        """The file that the runtime loads."""
        return Path(self.folder, self.manifest.artifact)

    def check(self) -> None:
        """Compare the graph with its manifest.

        Raises:
            EngineCorruptError: A byte has changed, or the file is gone.
        """
        try:
            found = digest_bytes(self.artifact.read_bytes())
        except OSError as error:
            raise EngineCorruptError(
                f"engine {self.key[:12]}: {error.strerror}; expected {self.artifact}."
            ) from None
        if found != self.manifest.artifact_sha256:
            raise EngineCorruptError(
                f"engine {self.key[:12]}: sha256 {found[:12]}; expected "
                f"{self.manifest.artifact_sha256[:12]}. The file was changed after it was stored."
            )


class EngineStore:
    """A folder of engines that several processes may use at once."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)

    def find(self, request_key: str) -> StoredEngine | None:
        """The engine that answers a request, not yet checked; None when there is none."""
        path = self._root / "current" / f"{request_key}.json"
        try:
            pointer = json.loads(path.read_bytes())
            return _read_engine(self._root / "engines" / pointer["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if path.exists():
                log.warning("%s: %s: %s; it is not used.", path, type(error).__name__, error)
            return None

    def list(self) -> list[StoredEngine]:
        """All engines, newest first; folders that cannot be read are left out."""
        engines = []
        for folder in (self._root / "engines").glob("[0-9a-f]*"):
            try:
                engines.append(_read_engine(folder))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return sorted(engines, key=lambda engine: engine.manifest.created_at, reverse=True)

    def get(self, key: str) -> StoredEngine:
        """The engine whose key begins with `key`.

        Raises:
            EngineNotFoundError: None, or several.
        """
        found = [engine for engine in self.list() if engine.key.startswith(key)]
        if len(found) != 1:
            raise EngineNotFoundError(
                f"engine {key}: {len(found)} in {self._root}; expected one. "
                "`score engine list` shows their keys."
            )
        return found[0]

    def publish(
        self, manifest: EngineManifest, artifact: bytes, attachments: Mapping[str, bytes]
    ) -> StoredEngine:
        """Store an engine and let it answer its request from now on."""
        folder = self._root / "engines" / manifest.key
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.parent / f".publishing-{uuid.uuid4().hex}"
        staged.mkdir()  # not mkdtemp, whose folders nobody else may read
        try:
            _write(staged / manifest.artifact, artifact)
            for name, data in attachments.items():
                _write(staged / name, data)
            _write(staged / MANIFEST, manifest.to_json())
            if folder.exists() and not _is_intact(folder):
                shutil.rmtree(folder)  # damaged, and we hold the lock of its request
            try:
                os.rename(staged, folder)
            except OSError:
                if not _is_intact(folder):
                    raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        pointer = self._root / "current" / f"{manifest.request_key}.json"
        pointer.parent.mkdir(parents=True, exist_ok=True)
        temporary = pointer.with_suffix(f".{os.getpid()}.tmp")
        _write(temporary, json.dumps({"key": manifest.key}).encode())
        os.replace(temporary, pointer)
        return _read_engine(folder)

    @contextmanager
    def lock(self, request_key: str, timeout_s: float = 3600.0) -> Iterator[None]:
        """Hold the build lock of a request; the kernel frees it when its owner dies.

        Raises:
            LockTimeoutError: Somebody else has held it for longer than `timeout_s`.
        """
        path = self._root / "locks" / f"{request_key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_s
        with path.open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LockTimeoutError(
                            f"{path}: held by another process for {timeout_s:.0f} s; expected its "
                            "build to end. Look for a hanging `score` process."
                        ) from None
                    time.sleep(LOCK_POLL_S)
            yield


def _read_engine(folder: Path) -> StoredEngine:
    manifest = _manifest_from(json.loads((folder / MANIFEST).read_bytes()))
    if manifest.key != folder.name:
        raise ValueError(f"manifest of engine {manifest.key}; expected {folder.name}")
    return StoredEngine(folder=str(folder), manifest=manifest)


def _is_intact(folder: Path) -> bool:
    try:
        _read_engine(folder).check()
    except (OSError, ValueError, KeyError, TypeError, EngineCorruptError):
        return False
    return True


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _manifest_from(fields: dict[str, Any]) -> EngineManifest:
    def tensor(spec: dict[str, Any]) -> TensorSpec:
        return TensorSpec(**{**spec, "shape": tuple(spec["shape"])})

    def device(spec: dict[str, Any]) -> Device:
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in spec.items()
        }
        return Gpu(**values) if "uuid" in values else Cpu(**values)

    def rung(entry: dict[str, Any]) -> Rung:
        accuracy = entry["accuracy"]
        return Rung(**{**entry, "accuracy": Accuracy(**accuracy) if accuracy else None})

    return EngineManifest(
        **{
            **fields,
            "device": device(fields["device"]),
            "input": tensor(fields["input"]),
            "outputs": tuple(map(tensor, fields["outputs"])),
            "accuracy": Accuracy(**fields["accuracy"]),
            "rungs": tuple(map(rung, fields["rungs"])),
            "probe": tuple(fields["probe"]),
        }
    )
