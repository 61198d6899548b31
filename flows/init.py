"""`score init`: a job file with comments, from a look at the data and at the model."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from engines.onnx_facts import OnnxFacts, read_onnx_facts
from pipeline.errors import ConfigError
from pipeline.job_file import load_job
from pipeline.look import Dataset, Features, look_at
from pipeline.storage import open_storage

IMAGENET_MEAN, IMAGENET_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
"""What most torchvision and timm models were trained with, on values from 0 to 255."""
DEFAULT_SIDE = 224
CALLABLE = re.compile(r"[\w.]+:\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitRequest:
    """What the user said."""

    uri: str
    """Where the rows are."""
    model: str
    """An ONNX file, or `module:callable`."""
    name: str | None
    """Of the job; None: that of the data's folder."""
    output: str | None
    """Where scores go; None: beside the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A job file that is about to be written."""

    name: str
    text: str
    checks: tuple[str, ...]
    """What was guessed and decides the scores: for the user to look at."""
    dataset: Dataset


def write_job_file(request: InitRequest, path: str | None) -> dict[str, Any]:
    """Write a job file that `score plan` takes at once.

    Args:
        request: What the user said.
        path: Where it goes; None: `<name>.yaml`.

    Raises:
        ConfigError: The file exists, or the guesses make no job.
        InputError: There are no data, or none that can be scored.
        ModelError: The ONNX file cannot be read.
    """
    draft = draft_job(request)
    target = Path(path or f"{draft.name}.yaml")
    _check(draft.text)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(draft.text)
    except FileExistsError:
        raise ConfigError(
            f"{target}: exists; expected a new file. Name another one with --file, or remove it."
        ) from None
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}; expected a writable folder.") from None
    dates = draft.dataset.dates
    date = dates[-1] if dates else None
    return {
        "file": str(target),
        "job": draft.name,
        "dates": len(dates),
        "newest_date": date,
        "files": draft.dataset.num_files,
        "check": list(draft.checks),
        "next": [f"score plan {shlex.quote(str(target))} --date {date or '<date>'}"],
    }


def _check(text: str) -> None:
    """A draft that is no job, because of its name or output, say: nothing is written then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.yaml")
        path.write_text(text, encoding="utf-8")
        try:
            job = load_job(str(path))
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), "the new job file")) from None
    open_storage(job.output.uri)  # it takes addresses of stores that it knows


def draft_job(request: InitRequest) -> Draft:
    """Look at data and model, and write down what a job of them says."""
    is_onnx = request.model.endswith(".onnx")
    if not is_onnx and not CALLABLE.fullmatch(request.model):
        raise ConfigError(
            f"--model: {request.model!r}; expected an ONNX file (.onnx) or module:callable."
        )
    model = read_onnx_facts(request.model) if is_onnx else None
    dataset = look_at(open_storage(request.uri))
    name = request.name or _slug(request.uri)
    beside = _beside(request.uri)
    checks: list[str] = []
    lines = [
        "# Every key is described in docs/configuration.md; `score schema` prints it for editors.",
        f"name: {_yaml(name)}",
        "",
        *_input_lines(request, dataset, model, checks),
        "",
        *_model_lines(request, dataset, model, checks),
        "",
        "engine:",
        f"  store: {_yaml(f'{beside}/engines')}",
        "",
        "output:",
        f"  uri: {_yaml(request.output or f'{beside}/scores')}",
        "",
        "cost:",
        "  instance: c6i.large                # CHECK: your machine, from configs/prices.yaml",
        "  market: on_demand                  # or spot; `usd_per_hour: 0.1` is your own price",
    ]
    checks.append("cost.instance: c6i.large; expected the machine that runs the job")
    return Draft(name=name, text="\n".join(lines) + "\n", checks=tuple(checks), dataset=dataset)


def _input_lines(
    request: InitRequest, dataset: Dataset, model: OnnxFacts | None, checks: list[str]
) -> Iterator[str]:
    yield "input:"
    yield f"  uri: {_yaml(request.uri)}"
    if dataset.partition is None:
        yield "  partition: null                    # no folder has a date: all rows, every time"
        checks.append("input.partition: no folder is named by a date; each run scores all rows")
    else:
        yield f"  partition: {_yaml(dataset.partition)}"
    yield f"  passthrough: {_yaml(list(dataset.ids))}  # copied to the output, to join it"
    if _takes_images(dataset, model):
        if dataset.image_column is None:
            raise ConfigError(
                f"{request.uri}: no binary column with JPEG or PNG files; expected one, because "
                f"the model takes {_shape(model)}. Name another dataset or model."
            )
        yield "  images:"
        yield f"    column: {_yaml(dataset.image_column)}"
        yield "    crop: 0.875                      # CHECK: the central square, as in evaluation"
        return
    features = _chosen_features(request, dataset, model, checks)
    yield "  features:"
    yield f"    columns: {_yaml(list(features.patterns))}"
    yield "    # fill_missing: 0.0              # without it, rows with nulls go to quarantine"


def _takes_images(dataset: Dataset, model: OnnxFacts | None) -> bool:
    if model is None:
        return dataset.image_column is not None
    return len(model.row_shape) == 3


def _chosen_features(
    request: InitRequest, dataset: Dataset, model: OnnxFacts | None, checks: list[str]
) -> Features:
    """The likeliest columns that the model takes; the likeliest of all when none fits."""
    if not dataset.features:
        raise ConfigError(
            f"{request.uri}: no numeric columns; expected features, because the model takes "
            f"{_shape(model)}. Name another dataset or model."
        )
    width = model.row_shape[0] if model and len(model.row_shape) == 1 else None
    fitting = [each for each in dataset.features if width in (None, each.width)]
    chosen = (fitting or list(dataset.features))[0]
    patterns = ", ".join(chosen.patterns)
    if model and len(model.row_shape) > 1:
        checks.append(
            f"model.source: takes {_shape(model)}; expected batch x features: take rows of them "
            "and reshape in the graph"
        )
    if not fitting:
        checks.append(
            f"input.features.columns: {patterns} are {chosen.width} numbers; "
            f"the model takes {width}"
        )
    elif len(chosen.patterns) > 1 or width is None:
        checks.append(f"input.features.columns: {patterns}; expected the model's own order")
    return chosen


def _model_lines(
    request: InitRequest, dataset: Dataset, model: OnnxFacts | None, checks: list[str]
) -> Iterator[str]:
    yield "model:"
    takes = f"  # takes {_shape(model)}, ends in {model.last_operator}" if model else ""
    yield f"  source: {_yaml(request.model)}{takes}"
    if model and model.other_outputs:
        others = ", ".join(model.other_outputs)
        checks.append(f"model.source: output {model.output_name} is taken, not {others}")
    is_images = _takes_images(dataset, model)
    if is_images:
        told = model.row_shape[1:] if model else (None, None)
        size = [side or DEFAULT_SIDE for side in told]
        yield f"  size: {_yaml(size)}"
        if None in told:
            checks.append(f"model.size: {size}; the model does not say it")
        if model and model.row_shape[0] not in (None, 3):
            checks.append(
                f"model.source: takes {_shape(model)}; expected channels first: "
                "batch x 3 x height x width"
            )
        yield f"  mean: {IMAGENET_MEAN}    # CHECK: ImageNet's, of pixels from 0 to 255"
        yield f"  std: {IMAGENET_STD}      # CHECK: the graph computes (pixel - mean) / std"
        checks.append("model.mean, model.std: ImageNet's; expected those of your training")
    yield from _head_lines(is_images, model, checks)


def _head_lines(is_images: bool, model: OnnxFacts | None, checks: list[str]) -> Iterator[str]:
    """`classes` for logits of several classes or their softmax, `scores` for anything else."""
    outputs = model.output_shape[-1] if model and model.output_shape else None
    several = outputs != 1 if is_images else bool(outputs and outputs > 1)
    because = _why_scores(model) if model else ""
    if several and not because:
        yield f"  head: classes                      # {outputs or 'several'} logits: softmax, best"
        yield "  # class_names: classes.txt         # one name a line"
    else:
        yield "  head: scores                       # the output as it is"
    if several and because:
        checks.append(f"model.head: scores, because {because}; `classes` expects logits")


def _why_scores(model: OnnxFacts) -> str:
    """What makes an output no logits; empty: they may be logits."""
    if model.ranks_from:
        return f"{model.ranks_from} gives ranks"
    return f"{model.probabilities_from} makes probabilities" if model.probabilities_from else ""


def _shape(model: OnnxFacts | None) -> str:
    if model is None:
        return "something else"
    return " x ".join(["batch", *(str(dim or "?") for dim in model.row_shape)])


def _beside(uri: str) -> str:
    """The folder in which a dataset lies, or its bucket."""
    scheme, separator, path = uri.rstrip("/").rpartition("://")
    parent, slash, _ = path.rpartition("/")
    if not slash:
        return uri.rstrip("/") if separator else "."
    return f"{scheme}{separator}{parent}"


def _slug(uri: str) -> str:
    """A job's name from the last folder of an address."""
    last = uri.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9_-]+", "-", last).strip("-_") or "job"


def _yaml(value: Any) -> str:
    """A value on one line, quoted where YAML needs it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def render_init(facts: dict[str, Any]) -> RenderableType:
    """What was written, what to look at, and what to type next."""
    newest, files = facts["newest_date"], f"files: {facts['files']:,}"
    found = f"dates: {facts['dates']:,}, the newest {newest}; its {files}" if newest else files
    lines = [f"written: {facts['file']} ({found})"]
    lines += [f"check: {check}" for check in facts["check"]]
    lines += [f"next: {line}" for line in facts["next"]]
    return Group(*map(Text, lines))
