"""The tuning of a job on a device: settings that `score tune` found, kept beside its engines.

    tunings/<key>/<number>.json     create-only; the highest number that can be read counts

A setting that the job file gives wins over a tuned one. Of all settings only the batch size decides
what is computed: it is part of the engine's request, and so of the run's id.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from engines.devices import Device
from engines.keys import digest
from pipeline.config import Job
from pipeline.storage import Storage, open_storage

log = logging.getLogger(__name__)

FOLDER = "tunings"
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSettings:
    """How a lane works; None: the default. See the sections `engine` and `lanes` of a job."""

    batch_size: Count | None = None
    decode_threads: Count | None = None
    engine_threads: Count | None = None
    block_rows: Count | None = None
    queue_depth: Count | None = None
    hardware_decoder_load: Annotated[float, Field(ge=0, le=1)] | None = None

    def __str__(self) -> str:
        """`decode_threads 1, queue_depth 4`; or `the defaults`."""
        return ", ".join(f"{name} {value:,}" for name, value in self.given().items()) or (
            "the defaults"
        )

    def given(self) -> dict[str, Any]:
        """Those that are not left at their default."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What `score tune` found for a job on a device, and how."""

    key: str
    """Of job and device; see `tuning_key`."""
    job: str
    device: str
    """Name of the processor or GPU."""
    num_threads: int
    """CPU threads of the lane."""
    settings: LaneSettings
    rows_per_s_default: Rate
    """End to end with the defaults: median of the last trials."""
    rows_per_s_tuned: Rate
    """The same with the settings, in trials that alternated with the others."""
    confirmed: bool
    """Whether trials that took no part in the search have confirmed the gain; False: the search
    was stopped before them, and only its own trials speak for the settings."""
    num_rows: int
    """Rows of a trial."""
    num_trials: int
    budget_s: float
    took_s: float
    versions: dict[str, str]
    """Of what was measured; for the record: with others the settings may not be the best."""
    host: str
    tuned_at: str
    """ISO 8601, UTC."""

    def __str__(self) -> str:
        """`queue_depth 4 (+5.3% end to end on 2026-11-20)`."""
        if not self.settings.given():
            return f"{self.settings}, than which {self.tuned_at[:10]} found nothing faster"
        return f"{self.settings} ({self.gain:+.1%} end to end on {self.tuned_at[:10]})"

    @property
    def gain(self) -> float:
        """0.1 is 10 % faster than with the defaults."""
        return self.rows_per_s_tuned / self.rows_per_s_default - 1


def tuning_key(job: Job, device: Device) -> str:
    """Names what a tuning is for: what is read, decoded and computed, and on what.

    Not the model's weights: other weights take the same time.
    """
    return digest(
        {
            "job": job.name,
            "input": job.input.model_dump(exclude={"uri", "partition"}),
            "model": job.model.model_dump(),
            "device": device.identity,
            "num_threads": device.num_threads,
        }
    )


def is_free(job: Job, setting: str) -> bool:
    """Whether the job file leaves a setting of `LaneSettings` open."""
    lanes = job.lanes
    match setting:
        case "batch_size":
            return job.engine.batch_size is None
        case "hardware_decoder_load":
            return setting not in lanes.gpu_decode.model_fields_set
        case "decode_threads" | "engine_threads":
            return lanes.threads is None and getattr(lanes, setting) is None
    return getattr(lanes, setting) is None


def settings_of(job: Job) -> LaneSettings:
    """What a job says of its lanes, by its file or by a tuning that was filled in."""
    lanes, decode = job.lanes, job.lanes.gpu_decode
    load = "hardware_decoder_load"
    return LaneSettings(
        batch_size=job.engine.batch_size,
        decode_threads=lanes.decode_threads,
        engine_threads=lanes.engine_threads,
        block_rows=lanes.block_rows,
        queue_depth=lanes.queue_depth,
        hardware_decoder_load=None if is_free(job, load) else decode.hardware_decoder_load,
    )


def with_settings(job: Job, settings: LaneSettings) -> Job:
    """The job with the settings that its file leaves open."""
    free = {name: value for name, value in settings.given().items() if is_free(job, name)}
    engine, decode = {}, {}
    if "batch_size" in free:
        engine["batch_size"] = free.pop("batch_size")
    if "hardware_decoder_load" in free:
        decode["hardware_decoder_load"] = free.pop("hardware_decoder_load")
    gpu_decode = job.lanes.gpu_decode.model_copy(update=decode)
    return job.model_copy(
        update={
            "engine": job.engine.model_copy(update=engine),
            "lanes": job.lanes.model_copy(update={**free, "gpu_decode": gpu_decode}),
        }
    )


def tuned(job: Job, device: Device, say: Callable[[str], None] = lambda _: None) -> Job:
    """The job with the settings of its tuning for a device, if there is one; says which."""
    tuning = find_tuning(job, device)
    if tuning is None or tuning.settings == LaneSettings():
        return job
    say(f"tuned: {tuning}")
    return with_settings(job, tuning.settings)


def find_tuning(job: Job, device: Device) -> Tuning | None:
    """The newest tuning of a job on a device that can be read; others are warned of."""
    store, key = open_storage(job.engine.store), tuning_key(job, device)
    for _, path in reversed(_versions(store, key)):
        try:
            found = TypeAdapter(Tuning).validate_json(store.read(path) or b"")
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            why = f"{where}: {problem['msg']}" if where else problem["msg"]
        else:
            if found.key == key:
                return found
            why = "for another job or device"
        log.warning("%s/%s: %s; it is not used. Run `score tune` again.", store.uri, path, why)
    return None


def write_tuning(job: Job, tuning: Tuning) -> str:
    """Keep a tuning; from here on it counts.

    Returns:
        Its path in the job's engine store.
    """
    store = open_storage(job.engine.store)
    # The writer: after a lost reply it tells our file from another's.
    data = json.dumps({**asdict(tuning), "writer": uuid.uuid4().hex}, indent=1).encode()
    number = max((number for number, _ in _versions(store, tuning.key)), default=0)
    while True:
        number += 1
        path = f"{FOLDER}/{tuning.key}/{number:04d}.json"
        if store.create(path, data):
            return path


def forget_tuning(job: Job, device: Device) -> int:
    """Go back to the defaults: remove all tunings of a job on a device; how many there were."""
    store = open_storage(job.engine.store)
    versions = _versions(store, tuning_key(job, device))
    for _, path in versions:
        store.delete(path)
    return len(versions)


def _versions(store: Storage, key: str) -> list[tuple[int, str]]:
    """Number and path of each version, oldest first."""
    paths = [info.path for info in store.list_files(f"{FOLDER}/{key}")]
    stems = {path: path.rpartition("/")[2].removesuffix(".json") for path in paths}
    return sorted((int(stem), path) for path, stem in stems.items() if stem.isdecimal())
