"""What a forecast is made of besides rates: the work, the machines, and what they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.footers import NUM_FOOTER_READERS
from pipeline.rates import OBJECT_PUBLISH_S, Rates


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The rows of a night, and how they are cut."""

    rows: int
    rows_per_shard: float
    rows_at_risk: float
    """That a lane may have begun and not committed, at most; see pipeline/block_size.py."""
    files_per_shard: float = 1.0

    @property
    def shards(self) -> int:
        """At least one."""
        return max(1, round(self.rows / self.rows_per_shard))


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """What the requests of a shard cost where all lanes share them."""

    name: str
    reads_per_shard: float = 0.0
    """GET, HEAD and LIST, while it is scored."""
    writes_per_shard: float = 0.0
    """PUT, COPY, POST and DELETE, while it is scored."""
    publish_reads_per_shard: float = 0.0
    publish_writes_per_shard: float = 0.0
    max_reads_per_s: float = math.inf
    max_writes_per_s: float = math.inf
    latency_s: float = 0.0
    """Of a small request. A lane reads, scores and writes at the same time; of the requests of one
    shard, those that read wait for each other, and so do those that write."""
    publish_s_per_shard: float = 0.0
    """Of the one process that reads the ledger and publishes."""
    reads_per_footer: float = 0.0

    @property
    def service_s_per_shard(self) -> float:
        """Seconds for which a shard takes all that the store allows, while it is scored."""
        return self._service_s(self.reads_per_shard, self.writes_per_shard)

    @property
    def lane_s_per_shard(self) -> float:
        """Seconds that a lane takes for a shard at least, however few rows it has."""
        return self.latency_s * max(self.reads_per_shard, self.writes_per_shard)

    def plan_s_per_shard(self, files_per_shard: float) -> float:
        """Seconds of planning that the requests for footers take."""
        return files_per_shard * self.reads_per_footer * self.latency_s / NUM_FOOTER_READERS

    @property
    def least_publish_s_per_shard(self) -> float:
        """Seconds of publishing: what the process takes, or what the store allows."""
        reads, writes = self.publish_reads_per_shard, self.publish_writes_per_shard
        return max(self.publish_s_per_shard, self._service_s(reads, writes))

    def _service_s(self, reads: float, writes: float) -> float:
        return max(reads / self.max_reads_per_s, writes / self.max_writes_per_s)


S3 = Store(
    name="Amazon S3",
    reads_per_shard=6,
    writes_per_shard=2,
    publish_reads_per_shard=3,
    publish_writes_per_shard=1,
    reads_per_footer=3,
    max_reads_per_s=5_500,
    max_writes_per_s=3_500,
    latency_s=0.1,
    publish_s_per_shard=OBJECT_PUBLISH_S,
)
"""Requests: of one more shard of a features job on SeaweedFS, counted by tests/s3_fault_proxy.py on
2026-11-21; a shard with quarantined rows writes once more. Input and output have prefixes of their
own: these are the requests of the busier one. Limits: of each partitioned prefix
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html); S3 splits a
prefix that is used for long, so that they are those of a first night. Latency: the lower end of the
100 to 200 ms that
https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html
names. Amazon S3 itself was not measured."""
RAY_TASK_S, THREAD_TASK_S = 0.1, 0.003
"""Seconds a task that Prefect maps onto Ray, and onto threads: measured with Prefect 3.8,
prefect-ray 0.6 and a server on SQLite, on two cores."""
MAX_TASKS = 2_000
"""So many mapped tasks upset a self-hosted Prefect server
(https://github.com/PrefectHQ/prefect/issues/18883)."""

MEASURED = Store(name="as measured")
"""Whatever it costs is in the rates already: nights on the machine that was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Machines of one kind, how they fail, and who hands out their work."""

    lanes: int
    groups_per_lane: int
    """In which shards are handed out."""
    interruptions_per_h: float = 0.0
    """How often each machine is taken away: exponential times between."""
    replacement_s: float = 0.0
    """From then until another is there; it is not paid meanwhile."""
    machine_spread: float = 0.0
    """Standard deviation of the machines' speeds for a whole night, relative to their mean."""
    task_s: float = 0.0
    """Between two groups that the one process hands out which has them all."""
    store: Store = field(default=MEASURED)

    def machines(self, rates: Rates) -> int:
        """The last one may have idle lanes."""
        return math.ceil(self.lanes / rates.lanes_per_machine)


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPhases:
    """Seconds of a night in which no lane is at its rate, however many lanes there are."""

    startup_s: float
    plan_s: float
    engine_s: float
    warmup_s: float
    publish_s: float
    """Reading the ledger is in it."""

    @property
    def before_s(self) -> float:
        """From process start until lanes are at their rate."""
        return self.startup_s + self.plan_s + self.engine_s + self.warmup_s

    @property
    def all_s(self) -> float:
        return self.before_s + self.publish_s


def phases_of(rates: Rates, work: Workload, store: Store) -> FixedPhases:
    """The phases of a night that are not scoring."""
    plan_s = max(rates.plan_s_per_shard, store.plan_s_per_shard(work.files_per_shard))
    publish_s = max(rates.publish_s_per_shard, store.least_publish_s_per_shard)
    return FixedPhases(
        startup_s=rates.startup_s,
        plan_s=rates.plan_s + work.shards * plan_s,
        engine_s=rates.engine_s,
        warmup_s=rates.warmup_s,
        publish_s=rates.publish_s + work.shards * publish_s,
    )
