"""What is known of a stored engine: its manifest, and the files that it is made of."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from engines.devices import Device
from engines.errors import EngineCorruptError
from engines.gate import Accuracy, GateSpec
from engines.keys import digest_bytes, runtime_version
from engines.runner import TensorSpec

REFERENCE = "reference.onnx"
"""Attachment of every engine: its model in fp32; see engines/reference.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One candidate of the ladder, as it was measured."""

    runtime: str
    precision: str
    """`fp32`, `fp16`, `int8`, or `mixed`: int8 but for `float_layers`."""
    batch_size: int
    """0 when there was nothing to run."""
    rows_per_s: float
    """Alone, when the engine was built."""
    accuracy: Accuracy | None
    """None when the candidate failed."""
    passed: bool
    failures: tuple[str, ...]
    """What of the gate was missed."""
    error: str | None
    """Why the candidate could not be made or run."""
    note: str | None
    """What was done differently than asked for, such as a smaller batch."""
    float_layers: tuple[str, ...]
    """Layers kept in float so that the gate is passed."""

    @property
    def name(self) -> str:
        """Such as `openvino int8`."""
        return f"{self.runtime} {self.precision}"


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
    """Name of the file that the runtime loads; see `engines.candidates.Candidate.graph`."""
    artifact_sha256: str
    artifact_bytes: int
    attachments: Mapping[str, str]
    """Names and sha256 of the files kept beside it, such as the scale table."""
    device: Device
    calibration_rows: int
    calibration_seed: int
    calibration_sha256: str
    """Of these rows; no scale was taken from those that fp32 has no finite answer to."""
    calibration_method: str
    gate: GateSpec
    accuracy: Accuracy
    rungs: tuple[Rung, ...]
    reason: str
    build_s: float
    created_at: str
    """ISO 8601, UTC."""
    probe: tuple[float, ...]
    """Float output of the probe batch, first column; see engines/load.py."""
    reference_batch: int = 0
    """Rows of a batch of the fp32 graph that is kept beside it; see engines/reference.py. 0: none
    is."""
    num_classes: int = 0
    """Of the model. 0: it gives scores, or an earlier version of the program built the engine."""
    columns: tuple[str, ...] = ()
    """Names of the features in the rows that it was built on; empty: images, or not known."""

    @property
    def files(self) -> dict[str, str]:
        """The engine's files as they are named in a store, and their sha256."""
        named = {self.artifact: self.artifact_sha256, **self.attachments}
        return {stored_name(name, sha256): sha256 for name, sha256 in named.items()}

    @property
    def passed_gate(self) -> bool:
        """Whether the rung that was chosen passed the gate."""
        return any(rung.passed for rung in self.chosen)

    @property
    def chosen(self) -> tuple[Rung, ...]:
        """The rung that became this engine."""
        name = (self.runtime, self.precision)
        return tuple(rung for rung in self.rungs if (rung.runtime, rung.precision) == name)

    def to_json(self) -> bytes:
        """UTF-8 JSON."""
        return json.dumps(asdict(self), indent=1).encode()


def stored_name(name: str, sha256: str) -> str:
    """Name of a file in a store: two builds of one engine never share a file by accident."""
    return f"{sha256[:16]}-{name}"


def parse_manifest(data: bytes) -> EngineManifest:
    """Read `EngineManifest.to_json` back.

    Raises:
        EngineCorruptError: It is no manifest, or that of another version of this program.
    """
    try:
        return _adapter().validate_python(json.loads(data))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise EngineCorruptError(
            f"manifest of an engine: {where}: {problem['msg']}; expected what was published."
        ) from None
    except ValueError as error:
        raise EngineCorruptError(f"manifest of an engine: {error}; expected JSON.") from None


@functools.cache
def _adapter() -> TypeAdapter[EngineManifest]:
    return TypeAdapter(EngineManifest)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEngine:
    """An engine whose files lie, or will lie once they are fetched, in a folder of this machine."""

    folder: str
    manifest: EngineManifest

    @property
    def key(self) -> str:
        """The engine's key."""
        return self.manifest.key

    @property
    def artifact(self) -> Path:
        """The file that the runtime loads."""
        manifest = self.manifest
        return Path(self.folder, stored_name(manifest.artifact, manifest.artifact_sha256))

    def attachment(self, name: str) -> Path:
        """A file that is kept beside the artifact."""
        return Path(self.folder, stored_name(name, self.manifest.attachments[name]))

    def check(self) -> None:
        """Compare every file with the manifest, and the runtime with the one installed here.

        Not `REFERENCE`: no row is scored with it, and who reads it checks it.

        Raises:
            EngineCorruptError: A byte has changed, a file is gone, or the runtime is another one.
        """
        not_now = stored_name(REFERENCE, self.manifest.attachments.get(REFERENCE, ""))
        for name, sha256 in self.manifest.files.items():
            if name != not_now:
                self.check_file(name, sha256)
        self.check_runtime()

    def check_file(self, name: str, sha256: str) -> None:
        """Compare one file, by its name in the store, with its hash.

        Raises:
            EngineCorruptError: A byte has changed, or the file is gone.
        """
        path = Path(self.folder, name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise EngineCorruptError(
                f"engine {self.key[:12]}: {error.strerror}; expected {path}."
            ) from None
        check_content(self.key, name, data, sha256)

    def check_runtime(self) -> None:
        """Compare the version of the runtime with the one that the engine was built with.

        A store that was copied from another machine may hold engines of other versions.

        Raises:
            EngineCorruptError: They differ, or the runtime is not installed.
        """
        name, built_with = self.manifest.runtime, self.manifest.runtime_version
        installed = runtime_version(name)
        if installed != built_with:
            raise EngineCorruptError(
                f"engine {self.key[:12]}: built with {name} {built_with}; expected the version "
                f"here, {installed}. It cannot be used with another one."
            )


def check_content(key: str, name: str, data: bytes, sha256: str) -> None:
    """Compare one file of the engine `key` with its hash.

    Raises:
        EngineCorruptError: They differ.
    """
    found = digest_bytes(data)
    if found != sha256:
        raise EngineCorruptError(
            f"engine {key[:12]}, {name}: sha256 {found[:12]}; expected {sha256[:12]}. "
            "The file was changed after it was stored."
        )
