"""The part of a job file about the model and its engines; see config.py for the others."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from pipeline.section import Address, Section, Share, plain_address

MAX_BATCH_IMAGES = 16_384
"""Such a batch takes gigabytes already, and is beyond what makes any device faster."""

Rgb = tuple[float, float, float]


class ModelSection(Section):
    """The model and what its graph does before and after it."""

    source: str
    """An ONNX file, or `module:callable` that returns a `torch.nn.Module`."""
    size: tuple[int, int] = (224, 224)
    """Height and width of the model's input (images)."""
    mean: Rgb = (0.0, 0.0, 0.0)
    """The graph computes (pixel - mean) / std on RGB values from 0 to 255."""
    std: Rgb = (255.0, 255.0, 255.0)
    """As above: what training used, times 255 where it counted from 0 to 1."""
    head: Literal["classes", "scores"] = "classes"
    """`classes`: the best k by the softmax of several logits, which may be in the model already.
    `scores`: the output as it is."""
    top_k: Annotated[int, Field(ge=1, le=100)] = 1
    """Classes of each row that are written; above 1 `top_class_ids` and `top_probabilities` too."""
    class_names: str | None = None
    """A text file with one name a line, or `module:callable` that returns the names."""

    @pydantic.field_validator("source")
    @classmethod
    def _is_here(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("expected a file on this machine, or `module:callable`")
        return value


class CalibrationSection(Section):
    """The rows of the job's own input from which int8 scales are taken."""

    rows: Annotated[int, Field(ge=8)] = 256
    """How many; more make ranges steadier and the build longer."""
    seed: int = 0
    """Which rows: the same seed takes the same rows of the same input."""
    method: Literal["max", "percentile", "entropy"] = "max"
    """`max`: the range of all values. `percentile`: without the largest 0.01 %, for models with
    outliers. `entropy`: what loses the least information, as TensorRT's calibrator did."""


class GateSection(Section):
    """What an engine must reach on held-out rows, against fp32, before it may score."""

    rows: Annotated[int, Field(ge=8)] = 512
    """How many rows are held out for it; of a date with too few rows, at least half."""
    min_agreement: Share = 0.97
    """Share of rows with the same top-1 class; for scores the explained variance."""
    min_cosine: Share = 0.98
    """Mean cosine between a row's logits and fp32's (classes)."""
    max_divergence: Annotated[float, Field(ge=0)] = 0.05
    """Mean Kullback-Leibler divergence of a row's probabilities from fp32's, nats (classes)."""
    label: str | None = None
    """Column with the true class index, or with the target of a score. With it the task's own
    metric must hold too: accuracy, AUC (two labels) or R2."""
    max_metric_loss: Share = 0.005
    """What that metric may lose against fp32: 0.005 is half a point."""


class TensorRtSection(Section):
    """What is asked of TensorRT's builder; a GPU is needed for it to matter."""

    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    """Higher takes longer to build (minutes to more than an hour), and may run faster."""
    workspace_bytes: Annotated[int, Field(gt=0)] | None = None
    """Most scratch memory of a layer; null: all of the device's memory."""


class EngineSection(Section):
    """Where engines are kept, and how they are built."""

    store: Address = ".nightscore/engines"
    """Folder, or `s3://bucket/prefix` that several machines share."""
    batch_size: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """Rows per engine call, of images at most 16,384; null: what suits the device."""
    calibration: CalibrationSection = CalibrationSection()
    gate: GateSection = GateSection()
    tensorrt: TensorRtSection = TensorRtSection()

    _is_plain = pydantic.field_validator("store")(plain_address)
