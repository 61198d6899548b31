"""What a report says of the engines that scored a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRung:
    """One candidate of the engine ladder as measured when the engine was built."""

    runtime: str
    precision: str
    rows_per_s: float
    agreement: float | None
    """Share of held-out rows with the fp32 answer, or variance explained; None: not run."""
    passed: bool
    error: str | None
    cosine: float | None = None
    """Between its logits and those of fp32, mean; None for scores."""
    divergence: float | None = None
    """Kullback-Leibler, of its probabilities from those of fp32, mean; None for scores."""
    metric_name: str | None = None
    """Of the task, where the job names a label column: `accuracy`, `AUC` or `R2`."""
    metric: float | None = None
    reference_metric: float | None = None
    """The same of fp32."""
    failures: tuple[str, ...] = ()
    """What of the gate was missed."""
    note: str | None = None
    """What was done otherwise than asked for, such as a smaller batch."""
    float_layers: tuple[str, ...] = ()
    """Layers that stay in float so that the gate is passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """The engine that scored the run, and why it was chosen."""

    key: str
    runtime: str
    precision: str
    batch_size: int
    agreement: float
    min_agreement: float
    num_held_out: int
    reason: str
    rungs: tuple[EngineRung, ...]
    built: bool
    """True: built during this run; False: taken from the store."""
    build_s: float
    """Seconds that this run spent building; 0 when the engine came from the store."""
    common: str = ""
    """What it has in common with engines for other devices; see pipeline/engine_pin.py. Empty: not
    known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRows:
    """One of the engines that scored a run, and how much of it."""

    key: str
    device: str | None
    """Name of what it was made for; None: it is not in the engine store any more."""
    rows: int
    """Of the shards that it scored, those in quarantine too."""
