"""The job: all keys of its YAML file, with meanings and defaults; job_file.py reads it."""

from __future__ import annotations

from email.utils import parseaddr
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field

from pipeline.config_engine import MAX_BATCH_IMAGES, EngineSection, ModelSection
from pipeline.paths import is_listed_below, is_plain, stays_below
from pipeline.section import NAME, TEXTFILE, TIME_OF_DAY, Address, Section, Share, plain_address
from pipeline.time_zone import find_zone

OUTPUT_COLUMNS = {
    "classes": ("class_id", "class_name", "probability", "top_class_ids", "top_probabilities"),
    "scores": ("score",),
}
"""Columns that a part gets from the engine, by the model's head; see pipeline/part.py."""


class ImagesInput(Section):
    """Encoded images in a binary column."""

    column: str
    """Binary column with JPEG or PNG files, or a struct with them in a field `bytes`, as Hugging
    Face writes it."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the central square that is kept, relative to the image's shorter side."""
    interpolation: Literal["linear", "cubic", "lanczos3"] = "linear"
    """Resize filter, antialiased: the one that the model was trained or evaluated with."""
    max_pixels: Annotated[int, Field(gt=0)] = 40_000_000
    """Larger images are quarantined before they are decoded (decompression bombs)."""


class FeaturesInput(Section):
    """Numeric features: several columns, or one column of fixed-size lists."""

    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    """Column names or globs such as `f*`, expanded in the order of the file's schema: all files
    must have one order, the one in which the engine was built. Features become float32, which
    rounds integers beyond 16,777,216: ids that large belong in two columns, which the graph joins,
    or in a smaller index."""
    fill_missing: float | None = None
    """Value for nulls and NaN; without it such a row is quarantined."""


class InputSection(Section):
    """Where the rows are, and what of them is read."""

    uri: Address
    """Folder of the dataset, local or `s3://bucket/prefix`."""
    partition: str | None = "dt={date}"
    """Sub-folder of one night, with `{date}`; null: the whole folder is scored every time."""
    passthrough: Annotated[tuple[str, ...], Field(min_length=1)]
    """Columns copied to the output; they must tell rows apart there. One that files of a
    date have in several types gets the type that holds all values, such as int64 beside int32."""
    images: ImagesInput | None = None
    features: FeaturesInput | None = None

    _is_plain = pydantic.field_validator("uri")(plain_address)

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> InputSection:
        if (self.images is None) == (self.features is None):
            raise ValueError("expected exactly one of `images` and `features`")
        if self.partition is not None and "{date}" not in self.partition:
            raise ValueError(
                f"partition: {self.partition!r} has no {{date}}; expected `dt={{date}}`"
            )
        if self.partition is not None and not stays_below(self.partition):
            raise ValueError(f"partition: {self.partition!r} leaves `uri`; expected a sub-folder")
        if self.partition is not None and not is_plain(f"{self.uri.rstrip('/')}/{self.partition}"):
            raise ValueError(f"partition: {self.partition!r}; expected names only, no `//` or `.`")
        return self


class OutputSection(Section):
    """Where scores go: `<uri>/<job>/dt=<date>/`."""

    uri: Address
    """Folder, or `s3://bucket/prefix` of a store that honours conditional writes."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Of the Parquet parts."""
    delta: bool | Address = False
    """A Delta Lake table besides, partitioned by `dt`. `true`: `<uri>/<job>` is the table, and
    nothing is copied. An address: a table of its own there, with copies of the parts, in which
    earlier versions of a date stay readable. Dates that were published before are brought in by
    `score backfill` over them. Needs the extra `delta`."""

    _are_plain = pydantic.field_validator("uri", "delta")(plain_address)


class LimitsSection(Section):
    """Guards: beyond these, nothing is published (exit 3)."""

    max_quarantined: Share = 0.01
    """Share of rows that may be quarantined; scoring stops as soon as there are more."""
    probation_rows: Annotated[int, Field(ge=0)] = 0
    """So many rows may be quarantined whatever their share: for small dates."""
    min_rows: Annotated[int, Field(ge=0)] = 0
    """Rows that a date has at least; with fewer, something is missing upstream."""
    max_usd: Annotated[float, Field(gt=0)] | None = None
    """What a date may cost, all attempts together; scoring stops when it is spent. Null: anything.
    What is scored by then stays; with a higher limit the same command goes on."""
    drift_rows: Annotated[int, Field(ge=0)] | None = None
    """Rows whose published answers are compared with fp32's, each night whose engine comes from the
    store; below `engine.gate.min_agreement` by more than chance, nothing is published. Null: 32,
    or from 100,000 rows on a 3,000th of them, at most 512. 0: none."""
    max_psi: Annotated[float, Field(ge=0)] | None = 0.25
    """Population stability index of a night's scores against those of the last seven nights of the
    same model, besides what chance explains. Above 0.25 is a major shift by the usual reading
    (Siddiqi, Credit Risk Scorecards, 2006). Null: only reported."""
    max_group_gib: Annotated[float, Field(gt=0)] | None = None
    """Row groups whose columns, those of the job, promise more than this are quarantined unread;
    null: half of a lane's memory, and at most 4."""


class AlertsSection(Section):
    """What is odd in a published night beside the last seven: told in the report and in the mail.

    Each limit may be null: never odd. Rates and costs are compared with the median of those nights,
    once there are three.
    """

    max_rate_fall: Share | None = 0.2
    """Examples per second, engine build left out: 0.2 is a fifth slower."""
    max_cost_rise: Annotated[float, Field(ge=0)] | None = 0.25
    """Dollars per 100,000 rows: 0.25 is a quarter dearer."""
    max_quarantine_rise: Share | None = 0.001
    """Share of quarantined rows: 0.001 is one more row of a thousand."""
    max_psi: Annotated[float, Field(ge=0)] | None = 0.1
    """Population stability index of the scores besides what chance explains; above 0.1 is a minor
    shift by the usual reading. `limits.max_psi` stops publication."""
    max_price_age_days: Annotated[int, Field(ge=0)] | None = 180
    """Days since the price of the machine was read."""


class GpuDecodeSection(Section):
    """How a lane on a GPU decodes images."""

    enabled: bool = True
    """False: images are decoded on the lane's CPU threads, as on a machine without a GPU."""
    hardware_decoder_load: Share = 0.65
    """Share of JPEGs that go to the GPU's own decoder; its CUDA cores take the others. `score tune`
    finds the best value for a machine."""


class LanesSection(Section):
    """How the machine is used."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: every GPU or MIG slice when there is one, the CPU otherwise."""
    runner: Literal["local", "ray"] = "local"
    """`local`: lanes on this machine. `ray`: lanes on a Ray cluster, each with a GPU or `threads`
    CPUs of a node; nodes may join and leave meanwhile. Needs the extra `ray`, and storage that all
    nodes share; see docs/cluster.md."""
    ray_address: str | None = None
    """Head of the Ray cluster, such as `ray-head:6379`; `auto`: the cluster that this machine is a
    node of. Null: what `RAY_ADDRESS` says, or else a cluster of this machine alone, for as long as
    the night takes."""
    mix_devices: bool = True
    """On Ray: whether lanes on unlike devices score one night, each with an engine of its kind that
    passed the gate. False: all have the kind of the first one, as on one machine, where scores of
    two engines never meet in a run."""
    count: Annotated[int, Field(ge=1)] = 1
    """Lanes on a CPU, which share its cores: more than one where a single process does not keep
    many cores busy. A GPU or MIG slice is always one lane. On Ray: how many to ask the cluster for,
    so that it may grow; when not given, as many as it has room for at any time."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """Seconds that shards in work get to finish after SIGTERM, Ctrl-C or a spot notice."""
    hang_s: Annotated[float, Field(gt=0)] = 4.0
    """Seconds that a lane may be at a block besides twenty times what its engine and decoder should
    take; then its process is ended, and the row that it hangs on goes to quarantine."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of a lane's process, beyond which it is ended, and the row that takes so much goes to
    quarantine; null: its share of four fifths of the machine's."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of a lane; null: its share of the cores that this process may use."""
    cpu_decoder: Literal["window", "dali"] = "window"
    """What decodes images for a CPU. `window`: nvImageCodec and a SIMD resize, on each core with
    the engine. `dali`: DALI's pipeline, a stage of its own; pixels differ by a level or two. For a
    GPU whose `gpu_decode` is off it is always DALI."""
    decode_threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads that decode images for a GPU, or by DALI; null: as `threads`. `score tune` finds
    the best value of this and of the next three for a machine."""
    engine_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of a CPU lane, each of which takes a block from decoding to scores; null: as
    `threads`."""
    block_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows that a core takes at once; null: 16 images (64 by DALI) or 65,536
    feature rows."""
    queue_depth: Annotated[int, Field(ge=1)] | None = None
    """Blocks that may wait between two stages; null: 2."""
    shard_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a shard, about: what a crash costs at most per lane, besides the blocks behind it
    (three a core). Null: 1,024 images or 1,048,576 feature rows. A shard never splits a row
    group."""
    gpu_decode: GpuDecodeSection = GpuDecodeSection()

    @property
    def has_several_engines(self) -> bool:
        """Whether a run may have an engine for each kind of device."""
        return self.runner == "ray" and self.mix_devices


class WindowSection(Section):
    """By when a night must be published. One that will not make it warns early, and goes on."""

    deadline: Annotated[str, Field(pattern=TIME_OF_DAY)] | None = None
    """Time of day, such as `"07:00"`, in `timezone`, `days_after` days after the date that is
    scored. A date that is caught up with more than a day later has no deadline any more."""
    timezone: str = "UTC"
    """Such as `Europe/Zurich`."""
    days_after: Annotated[int, Field(ge=0, le=3_650)] = 1
    """1: yesterday's rows are due this morning."""
    max_hours: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Hours that a night may take from the start of its first attempt. With a deadline as well,
    what comes first counts."""

    @pydantic.field_validator("deadline", mode="before")
    @classmethod
    def _not_in_base_sixty(cls, value: Any) -> Any:
        """YAML 1.1 takes an unquoted 10:30 for the number 630."""
        if type(value) is int and 0 <= value < 24 * 60:  # and not YAML's `off`
            return f"{value // 60:02}:{value % 60:02}"
        return value

    @pydantic.model_validator(mode="after")
    def _is_known(self) -> WindowSection:
        find_zone(self.timezone)
        if self.deadline is None and self.max_hours is None:
            raise ValueError("expected `deadline`, `max_hours` or both")
        return self


class CostSection(Section):
    """What an hour of this machine costs: an entry of configs/prices.yaml, or your own price."""

    instance: str
    """Name in the price list; any name, with a price of your own."""
    market: Literal["on_demand", "spot"] = "on_demand"
    """How the machine is paid. `spot` also watches for the provider's notices."""
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Your own price: used instead of the price list."""


def _one_address(text: str) -> str:
    person, _, place = parseaddr(text)[1].rpartition("@")
    # A line break in a name would begin another header of the mail.
    is_one = person and place and text.count("@") == 1 and text.isprintable()
    if not is_one or not f"{person}{place}".isascii() or {*person, *place} & {*" ,;:<>()[]"}:
        raise ValueError("expected one address, such as me@example.com or Me <me@example.com>")
    return text


MailAddress = Annotated[str, AfterValidator(_one_address)]


class MailSection(Section):
    """The mail about each night. A mail that cannot be sent never touches the run.

    The login is none of the job file's business: it is in NIGHTSCORE_SMTP_USER and
    NIGHTSCORE_SMTP_PASSWORD; without them the server is asked for none.
    """

    to: Annotated[tuple[MailAddress, ...], Field(min_length=1)]
    """Who gets it, such as `[me@example.com]`."""
    sender: Annotated[MailAddress, Field(alias="from")]
    """Address that it comes from."""
    host: str | None = None
    """SMTP server; exactly one of this and `prefect_block`."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Null: 587 for `starttls`, 465 for `tls`, 25 for `none`."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """`starttls`: begins in clear and goes on encrypted, or not at all. `tls`: encrypted from the
    start. `none`: in clear, and without a login. The server's certificate is always checked."""
    ca_file: str | None = None
    """PEM file with the authority of your own server's certificate; null: those of the system."""
    prefect_block: str | None = None
    """Name of an EmailServerCredentials block on the Prefect server, which has host, port, security
    and login (needs the extra `mail`)."""
    when: Annotated[tuple[Literal["published", "failed", "warning"], ...], Field(min_length=1)] = (
        "published",
        "failed",
        "warning",
    )
    """`published`: the report of each night. `failed`: nights that failed, were stopped by a guard
    or interrupted. `warning`: a deadline in danger, and nights that were published with alerts."""

    deadline_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Seconds that a night that has ended waits for its mail; a server that does not take it is
    asked again until then. `score report JOB --date D --send` sends it later."""

    @pydantic.model_validator(mode="after")
    def _one_server(self) -> MailSection:
        if (self.host is None) == (self.prefect_block is None):
            raise ValueError("expected exactly one of `host` and `prefect_block`")
        return self


class MetricsSection(Section):
    """Figures of a run for Prometheus, during the run and after it."""

    textfile: Annotated[str, Field(pattern=TEXTFILE)]
    """File that is replaced every ten seconds, for node_exporter's textfile collector, such as
    `/var/lib/node_exporter/nightscore-users.prom`: each job has one of its own."""


class Job(Section):
    """One job file."""

    name: Annotated[str, Field(pattern=NAME)]
    """Folder below the output and name in reports: lower case, digits, `-` and `_`."""
    description: str = ""
    """For people."""
    input: InputSection
    model: ModelSection
    output: OutputSection
    engine: EngineSection = EngineSection()
    limits: LimitsSection = LimitsSection()
    alerts: AlertsSection = AlertsSection()
    lanes: LanesSection = LanesSection()
    window: WindowSection | None = None
    """Null: nothing warns, and the report says nothing of a deadline."""
    cost: CostSection
    mail: MailSection | None = None
    """Null: no mail."""
    metrics: MetricsSection | None = None
    """Null: none are written."""

    @pydantic.model_validator(mode="after")
    def _columns_differ(self) -> Job:
        names = self.input.passthrough
        taken = set(names) & set(OUTPUT_COLUMNS[self.model.head])
        if taken:
            raise ValueError(
                f"input.passthrough: `{min(taken)}` is the name of an output column; expected "
                "other names"
            )
        if self.output.delta and "dt" in names:
            raise ValueError(
                "input.passthrough: `dt` is the date in a Delta table; expected other names"
            )
        if len(set(names)) < len(names):
            raise ValueError("input.passthrough: a column twice; expected each once")
        return self

    @pydantic.model_validator(mode="after")
    def _input_without_output(self) -> Job:
        read = f"{self.input.uri.rstrip('/')}/{self.input.partition or ''}"
        written = {"output.uri": f"{self.output.uri.rstrip('/')}/{self.name}/dt={{date}}"}
        if isinstance(self.output.delta, str):
            written["output.delta"] = f"{self.output.delta.rstrip('/')}/dt={{date}}"
        for key, address in written.items():
            if is_listed_below(address, read):
                raise ValueError(
                    f"{key}: below what `input` reads: yesterday's scores would be taken for rows; "
                    "expected a folder elsewhere, or one that begins with `_`"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _batch_of_images_is_small(self) -> Job:
        num_rows = self.engine.batch_size or 1
        if self.input.images and num_rows > MAX_BATCH_IMAGES:
            raise ValueError(
                f"engine.batch_size: {num_rows:,} images; expected at most {MAX_BATCH_IMAGES:,}"
            )
        return self

    @property
    def shard_rows(self) -> int:
        """Rows that a shard aims at."""
        default = 1_024 if self.input.images else 1_048_576
        return self.lanes.shard_rows or default
