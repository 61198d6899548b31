"""What a run did, as one value: what `score run --json` prints and `_report.json` keeps."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.report_engine import EngineFacts, EngineRows, EngineRung


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """How one stage of the overlapped pipeline spent its time, summed over lanes."""

    busy_s: float
    """Working. The stage with the largest share is the bottleneck."""
    wait_s: float
    """Blocked: its input was empty (the stage before is slow) or its output full (that after).
    Where cores both decode and infer, each of the two has its part of the time that they wait."""
    items: int
    """Rows that passed; for `write` the rows of committed parts."""
    cpu_s: float = 0.0
    """CPU seconds of the stage's own threads; of `infer` on cores, those too of threads that are no
    stage's. 0 where threads of others do the work."""

    @property
    def busy_share(self) -> float:
        """Share of its time in which it worked."""
        total_s = self.busy_s + self.wait_s
        return self.busy_s / total_s if total_s else 0.0

    def __add__(self, other: StageTimes) -> StageTimes:
        return StageTimes(
            busy_s=self.busy_s + other.busy_s,
            wait_s=self.wait_s + other.wait_s,
            items=self.items + other.items,
            cpu_s=self.cpu_s + other.cpu_s,
        )


NO_TIME = StageTimes(busy_s=0.0, wait_s=0.0, items=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Rows per second of single stages alone, measured on this run's own rows and device.

    Of all lanes together: one that had nothing to score counts as the others do on average. Where
    cores both decode and infer, by the CPU seconds of each over the run: what cores would do that
    did only that, and that nobody else took. The engine's are with those of threads that no stage
    owns: OpenVINO's, and where a lane has eight threads or more, those that decode Parquet.
    """

    decode_per_sec: float
    """Decoding only: reading, inference and writing stand still."""
    engine_per_sec: float
    """The engine on one prepared batch, again and again: no copying, no decoding."""
    engine_with_copies_per_sec: float
    """The engine fed as in the run: blocks cut into batches, outputs copied out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What the run's own stages allow together, and how near it came; see pipeline/limit.py.

    All of the attempt that published the run.
    """

    per_sec: float
    """Rows per second that decoder, engine, reading and writing allow on this device."""
    rate_per_sec: float
    """Rows per second of all lanes together from the first row to the last commit: start-up is left
    out, and so are rows of damaged row groups, which were not decoded."""
    reached: float
    """rate_per_sec / per_sec."""
    bound_by: str
    """Stage that takes the largest part of the limit; or `read` or `write` where decoder and
    engine waited for it nearly all the time: the limit is then that of the device's work only."""
    gap_usd: float
    """What the attempt that published would have cost less at its limit."""
    gap_usd_per_100k: float
    """The same for 100,000 of all the run's rows, as for `usd_per_100k`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceUse:
    """What one device did while rows were scored; None where it does not tell.

    Shares are from 0 to 1.
    """

    name: str
    kind: str
    """`gpu` or `cpu`."""
    num_samples: int
    duration_s: float
    """Between the first and the last sample."""
    uuid: str | None = None
    """Of the GPU or MIG slice."""
    utilisation_mean: float | None = None
    """Cores busy with anything, of those that the run may use; or time in which any kernel ran,
    which does not say how full the GPU was. None for MIG slices."""
    utilisation_max: float | None = None
    cpu_s: float | None = None
    """CPU seconds of the run's processes, lanes included; CPU only."""
    memory_peak_bytes: int | None = None
    """Largest sample, whoever used the memory; GPU only."""
    power_mean_w: float | None = None
    energy_j: float | None = None
    energy_meter: str | None = None
    """What the power and energy are those of: a physical GPU, which slices share, or the CPU
    packages. Sums count each meter once."""
    sm_clock_mean_mhz: float | None = None
    sm_clock_min_mhz: float | None = None
    memory_clock_mean_mhz: float | None = None
    temperature_max_c: float | None = None
    throttled: dict[str, float] = field(default_factory=dict)
    """Share of samples with lowered clocks, by reason."""
    jpeg_utilisation_mean: float | None = None
    """Share of time in which the GPU's JPEG decoders worked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What an hour of the machine costs, and who says so."""

    instance: str
    market: str
    """`on_demand`, `spot` or `own`."""
    usd_per_hour: float
    source: str
    as_of: str
    """ISO date on which the price was read."""
    currency: str = "USD"
    machine_share: float = 1.0
    """Of the machine that `usd_per_hour` is for: less where a backfill's dates share it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Wall-clock seconds of the machine times its price; all attempts of the run count.

    But for those that were stopped before they had an engine: no run knows of them.
    """

    price: Price
    usd: float
    usd_per_100k: float
    scoring_usd: float
    building_usd: float
    other_usd: float
    """Start-up, planning, publishing."""
    replay_usd: float = 0.0
    """Scoring rows that had been scored before, because of interruptions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """Wall-clock seconds of this attempt, one after the other."""

    startup_s: float
    plan_s: float
    engine_s: float
    score_s: float
    publish_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineSample:
    """One quarantined row, to show what was odd."""

    file: str
    row: int
    """Row index within `file`; of a range, the first one."""
    reason: str
    message: str
    num_rows: int = 1
    """More than 1: a range of rows that could not be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnreadableFile:
    """An input file without a footer that can be read: nobody knows how many rows it has."""

    path: str
    """Relative to the input's root."""
    num_bytes: int
    version: str
    """ETag, or modification time in ns."""
    message: str
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How what was committed compares with fp32 on a few of the night's own rows."""

    rows: int
    """0: not measured."""
    agreement: float | None = None
    """Classes: share of rows with fp32's best class. Scores: share of variance explained. None when
    it was not measured, or when the rows' scores do not vary."""
    mean_abs_diff: float | None = None
    """Of the best class's probability, or of the scores."""
    at_best: float | None = None
    """Scores: what `agreement` may be over all rows, and is less for these by chance. None for
    classes, and in reports of versions of this program that knew no more."""
    note: str = ""
    """Why it was not measured, or not judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreDistribution:
    """The night's scores, and how they compare with those of the last nights."""

    counts: str
    """Rows by bin and by class, as text; see pipeline/distribution.py."""
    num_values: int
    """Values that the counts rest on."""
    model: str
    """Fingerprint of the model."""
    head: str
    nights: tuple[str, ...] = ()
    """Dates of the nights that it was compared with; empty: there was none of this model."""
    psi: dict[str, float] = field(default_factory=dict)
    """Population stability index, of `scores`, or of `probability` and `classes`."""
    chance: dict[str, float] = field(default_factory=dict)
    """What of each chance explains: values are few."""
    before: str = ""
    """The counts of `nights` together; empty without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowOutcome:
    """Whether the night was published by its deadline."""

    deadline: str
    """ISO 8601, in the time zone of the job's `window`."""
    met: bool
    margin_s: float
    """Seconds between publication and the deadline; negative when it was missed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """What is odd beside the nights before; it stops nothing. See pipeline/alerts.py."""

    name: str
    """`rate`, `cost`, `quarantine`, `scores` or `price`."""
    text: str
    """One sentence, with the numbers and the key of the job file that says what is odd."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """Everything that the morning wants to know about one run."""

    run_id: str
    job: str
    date: str
    status: str
    """`published`, or `already_published` when the command found the work done."""
    rows: int
    scored: int
    quarantined: int
    quarantined_by_reason: dict[str, int]
    quarantine_samples: tuple[QuarantineSample, ...]
    shards: int
    shards_reused: int
    """Shards whose parts an earlier, interrupted attempt had committed."""
    attempts: int
    """That came as far as to have an engine; those stopped before are in no figure."""
    examples_per_sec: float
    """Rows that were scored for it / wall_s: everything included, engine build too."""
    wall_s: float
    """Wall-clock seconds of all `attempts`, from process start to publication."""
    phases: Phases
    usd_per_100k: float
    cost: Cost
    engine: EngineFacts
    """Of several, the one that scored most rows; see `engines`."""
    stages: dict[str, StageTimes]
    ceilings: Ceilings | None
    """None when no row was scored in this attempt."""
    bottleneck: str
    """The stage with the largest busy share, or `none`; see pipeline/limit.py."""
    device: str
    """Name of the CPU or GPU, with the number of lanes and threads."""
    started_at: str
    finished_at: str
    """ISO 8601, UTC."""
    output: str
    manifest: str
    devices: tuple[DeviceUse, ...] = ()
    """What the devices did while this attempt scored; empty when it scored nothing."""
    joules_per_1000_rows: float | None = None
    """Of this attempt's rows, by the meters that `devices` names; None when unknown."""
    settings: dict[str, float] = field(default_factory=dict)
    """How the lanes worked where it was not by default: from the job file, or from its tuning."""
    limit: Limit | None = None
    """None when no row was scored in this attempt."""
    num_lanes: int = 1
    """Worker processes on the machine that `cost.price` is that of."""
    degraded: bool = False
    """Whether rows are missing because a file is damaged: whole row groups are in quarantine, or
    files cannot be read."""
    unreadable_files: tuple[UnreadableFile, ...] = ()
    """Nobody knows how many rows they have: they are in none of the sums above."""
    drift: Drift | None = None
    """None when the job measures none."""
    distribution: ScoreDistribution | None = None
    """None when no row was scored."""
    accepted: tuple[str, ...] = ()
    """Guards that `--accept` overruled, each with what it had found."""
    interruptions: int = 0
    """Earlier attempts that began to score and ended without publishing."""
    rows_replayed: int = 0
    """Rows that were scored, or begun, more than once: what interruptions and lanes' processes that
    died had not committed."""
    replay_is_exact: bool = True
    """False: an attempt was killed before it could say what it was at; `rows_replayed`, `replay_s`
    and `cost.replay_usd` are then the most that it can be."""
    replay_s: float = 0.0
    """Wall-clock seconds for those rows, at the rate of all attempts."""
    window: WindowOutcome | None = None
    """None when the job, or a date that is caught up with, has no deadline."""
    rows_taken_over: int = 0
    """Rows that `score requeue` left as the version before had scored them: in no rate or price."""
    scoring_s: float = 0.0
    """Wall-clock seconds of scoring, of all attempts; `replay_s` is a part of it."""
    building_s: float = 0.0
    """Wall-clock seconds of building the engine, of all attempts."""
    alerts: tuple[Alert, ...] = ()
    engines: tuple[EngineRows, ...] = ()
    """All that scored it, `engine` first: more than one on unlike devices of a cluster. Empty: only
    `engine`, in reports of versions of this program that knew no more."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def report_from_dict(data: dict[str, Any]) -> RunReport:
    """The inverse of `RunReport.to_dict`; KeyError or TypeError when `data` is something else."""
    engine = data["engine"]
    cost = data["cost"]
    ceilings = data["ceilings"]
    return RunReport(
        **{
            **data,
            "phases": Phases(**data["phases"]),
            "cost": Cost(**{**cost, "price": Price(**cost["price"])}),
            "engine": EngineFacts(**{**engine, "rungs": tuple(map(_rung, engine["rungs"]))}),
            "stages": {name: StageTimes(**times) for name, times in data["stages"].items()},
            "ceilings": Ceilings(**ceilings) if ceilings else None,
            "limit": Limit(**data["limit"]) if data.get("limit") else None,
            "devices": tuple(DeviceUse(**use) for use in data.get("devices", ())),
            "drift": Drift(**data["drift"]) if data.get("drift") else None,
            "distribution": _distribution(data.get("distribution")),
            "window": WindowOutcome(**data["window"]) if data.get("window") else None,
            "accepted": tuple(data.get("accepted", ())),
            "alerts": tuple(Alert(**alert) for alert in data.get("alerts", ())),
            "engines": tuple(EngineRows(**engine) for engine in data.get("engines", ())),
            "unreadable_files": tuple(
                UnreadableFile(**file) for file in data.get("unreadable_files", ())
            ),
            "quarantine_samples": tuple(
                QuarantineSample(**sample) for sample in data["quarantine_samples"]
            ),
        }
    )


def _distribution(data: dict[str, Any] | None) -> ScoreDistribution | None:
    return ScoreDistribution(**{**data, "nights": tuple(data["nights"])}) if data else None


def _rung(data: dict[str, Any]) -> EngineRung:
    lists = {name: tuple(data.get(name, ())) for name in ("failures", "float_layers")}
    return EngineRung(**{**data, **lists})
