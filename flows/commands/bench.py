"""The `score bench` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.terminal import (
    Date,
    JobPath,
    Json,
    Set,
    interruptible,
    load,
    number,
    observer,
    show,
)

BatchSizes = Annotated[
    str | None,
    typer.Option(help="Such as 1,8,32 (the default for pictures on a CPU); larger on a GPU."),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(help="Only variants with this in their name, such as int8; may be repeated."),
]


def bench(  # noqa: PLR0913  # each argument is an option of the command
    job: JobPath,
    date: Date,
    batch_sizes: BatchSizes = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 5,
    duration_s: Annotated[float, number("Of each measurement.", min=0.01)] = 2.0,
    warmup_s: Annotated[float, number("Before each measurement.")] = 0.5,
    variants: Variants = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each variant.", min=1)] = None,
    rows: Annotated[int | None, typer.Option(help="Rows to measure on.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Which rows are drawn.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for bench.json, .md and .svg; else bench-<job>-<date>."),
    ] = None,
    json: Json = False,
    set: Set = None,
) -> None:
    """Compare torch, ONNX Runtime, OpenVINO and TensorRT on the job's model and rows."""
    from flows.measuring.bench import BenchRequest, bench_facts
    from flows.measuring.bench_markdown import render_bench
    from pipeline.job_file import parse_date

    request = BenchRequest(
        batch_sizes=parse_sizes(batch_sizes),
        num_rounds=rounds,
        duration_s=duration_s,
        warmup_s=warmup_s,
        names=tuple(variants or ()),
        num_threads=threads,
        num_rows=rows,
        seed=seed,
        out=out,
    )
    with interruptible("nothing was written"):
        facts = bench_facts(load(job, set), parse_date(date), request, observer(quiet=json).say)
    show(facts, render_bench, as_json=json)


def parse_sizes(text: str | None) -> tuple[int, ...] | None:
    """Batch sizes from `1,8,32`; None for None.

    Raises:
        ConfigError: They are no positive whole numbers.
    """
    from pipeline.errors import ConfigError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--batch-sizes: {text!r}; expected whole numbers such as 1,8,32.")
    return tuple(sorted({int(part) for part in parts}))
