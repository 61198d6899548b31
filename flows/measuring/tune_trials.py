"""Trials of settings: a real lane scores real rows, and its parts are thrown away.

The two lanes that were used last stay open, so that they can take turns; one stands still while the
other works.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from random import Random

from engines.build import EngineRequest
from engines.errors import BuildError
from engines.manifest import StoredEngine
from engines.model import fingerprint_model
from pipeline.config import Job
from pipeline.engine import get_engine, load_class_names, request_for, stored_engine
from pipeline.lane import Lane, LaneDevice
from pipeline.lane_messages import LaneSetup
from pipeline.ledger import CommitRecord
from pipeline.part import OutputLayout
from pipeline.plan import Plan, Shard, make_plan
from pipeline.run import watch_limits
from pipeline.storage import open_storage
from pipeline.tuning import LaneSettings, with_settings

Say = Callable[[str], None]

SHARD_ROWS = {"images": 256, "features": 1 << 18}
"""Rows of a shard on a CPU, about: a trial of some seconds should see several commits. On a GPU
they are the job's."""
MIN_MEASURED = 2
"""Shards of a trial that are measured at least."""
MAX_LANES = 2


class LaneTrials:
    """Measures settings on one device; see `flows.measuring.tune_search.Trials`.

    Args:
        job: The job, as its file says it.
        date: ISO date whose rows are scored.
        device: What the lanes run on.
        trial_s: Seconds that a trial measures, about.
        say: Is told what takes long.
    """

    def __init__(self, job: Job, date: str, device: LaneDevice, trial_s: float, say: Say) -> None:
        kind = "features" if job.input.images is None else "images"
        target = job.shard_rows if device.gpu else min(job.shard_rows, SHARD_ROWS[kind])
        lanes = job.lanes.model_copy(update={"shard_rows": target})
        self._job = job.model_copy(update={"lanes": lanes})
        self._device = device
        self._trial_s = trial_s
        self._say = say
        source = open_storage(job.input.uri)
        self._plan: Plan = make_plan(self._job, date, source)
        # The same rows in each trial, from all over the input.
        self._shards: Sequence[Shard] = Random(0).sample(self._plan.shards, len(self._plan.shards))
        self._num_shards = 0
        self._indices = itertools.count()
        """Of shards: one that is scored again must be another one to the ledger."""
        self._engines: dict[int | None, StoredEngine] = {}
        self._lanes: dict[LaneSettings, Lane] = {}
        self._layout = OutputLayout(
            head=job.model.head,
            class_names=load_class_names(job.model.class_names),
            compression=job.output.compression,
            metadata={},
        )

    def __enter__(self) -> LaneTrials:
        self._folder = Path(tempfile.mkdtemp(prefix="nightscore-tune-"))
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes.values():
            lane.abort()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def num_rows(self) -> int:
        """Rows that a trial measures."""
        measured = itertools.islice(self._cycle(), 1, self._num_shards - 1)
        return sum(shard.num_rows for shard in measured)

    def engine(self, settings: LaneSettings) -> StoredEngine:
        """The engine for the batch size of settings, built if need be.

        Raises:
            BuildError: The model is bound to another batch size.
        """
        wanted = settings.batch_size
        if wanted not in self._engines:
            job, request = self._asked(settings)
            engine = get_engine(job, self._plan, request, self._fingerprint, self._say).engine
            if wanted not in (None, found := engine.manifest.batch_size):
                raise BuildError(
                    f"engine for batches of {wanted:,}: it takes {found:,}; expected {wanted:,}. "
                    "Export the model with a batch that is not fixed."
                )
            self._engines[wanted] = engine
        return self._engines[wanted]

    def setup_s(self, settings: LaneSettings) -> float:
        """Seconds that building the settings' engine takes, about; 0 when it is there."""
        if settings.batch_size in self._engines:
            return 0.0
        if stored_engine(*self._asked(settings), self._fingerprint):
            return 0.0
        return self.engine(LaneSettings()).manifest.build_s

    def _asked(self, settings: LaneSettings) -> tuple[Job, EngineRequest]:
        job = with_settings(self._job, settings)
        return job, request_for(job, self._plan.num_features, self._device.engine_device)

    @cached_property
    def _fingerprint(self) -> str:
        """Of the model, which no setting changes: for one of torch it has to be made."""
        return fingerprint_model(self._asked(LaneSettings())[1].model)

    def measure(self, settings: LaneSettings) -> float:
        """Rows per second of a lane, from commit to commit, while the stages before are busy."""
        if settings not in self._lanes:
            self._open(settings)
        lane = self._lanes[settings] = self._lanes.pop(settings)  # the last one used comes last
        if not self._num_shards:
            records = self._score(lane, 2 + MIN_MEASURED)
            rows_per_shard = sum(r.num_rows for r in records) / len(records)
            self._num_shards = 2 + max(
                MIN_MEASURED, round(self._trial_s * rate_of(records) / rows_per_shard)
            )
        return rate_of(self._score(lane, self._num_shards))

    def _open(self, settings: LaneSettings) -> None:
        engine = self.engine(settings)
        while len(self._lanes) >= MAX_LANES:
            self._lanes.pop(next(iter(self._lanes))).abort()
        lane = Lane(self._device)
        self._lanes[settings] = lane
        job = with_settings(self._job, settings)
        output = job.output.model_copy(update={"uri": str(self._folder)})
        lane.open(
            LaneSetup(
                job=job.model_copy(update={"output": output}),
                engine=engine,
                feature_columns=self._plan.feature_columns,
                num_features=self._plan.num_features,
                layout=self._layout,
                run_id="tune",
                attempt="tune",
                num_threads=self._device.num_threads,
                limits=watch_limits(job, engine.manifest, self._device, MAX_LANES),
            )
        )
        self._score(lane, 1)  # caches, and memory that is asked for once

    def _cycle(self) -> Iterator[Shard]:
        return itertools.cycle(self._shards)

    def _score(self, lane: Lane, num_shards: int) -> list[CommitRecord]:
        shards = itertools.islice(self._cycle(), num_shards)
        try:
            return lane.score(
                [dataclasses.replace(shard, index=next(self._indices)) for shard in shards]
            )
        finally:
            shutil.rmtree(self._folder / self._job.name, ignore_errors=True)


def rate_of(records: Sequence[CommitRecord]) -> float:
    """Rows per second between the first commit and the last but one.

    Before the first the stages fill; after the last but one they run empty.
    """
    first, *measured = records[:-1]
    times = [datetime.datetime.fromisoformat(r.committed_at) for r in (first, measured[-1])]
    return sum(r.num_rows for r in measured) / (times[1] - times[0]).total_seconds()
