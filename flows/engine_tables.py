"""How the facts of the `score engine` commands look on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Facts = dict[str, Any]


def render_engines(facts: Facts) -> RenderableType:
    """One line for each engine."""
    if not facts["engines"]:
        return Text("no engine is built yet; `score run` builds one when it needs it")
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "model", "engine", "agrees", "built", "version"):
        # On a narrow terminal the name of the model is shortened, and nothing else.
        table.add_column(heading, no_wrap=heading != "model", overflow="ellipsis")
    for engine in facts["engines"]:
        version = "-" if engine["version"] is None else str(engine["version"])
        table.add_row(
            engine["key"][:12],
            str(engine["model_source"]).rpartition(":")[2].rpartition("/")[2],
            f"{engine['runtime']} {engine['precision']}",
            f"{engine['accuracy']['agreement']:.4f}",
            engine["created_at"][:10],
            f"{version} current" if engine["current"] else version,
        )
    return table


def render_engine(engine: Facts) -> RenderableType:
    """What an engine is, and the ladder that it was chosen from."""
    about = Table(show_header=False, box=None, pad_edge=False)
    about.add_column()
    about.add_column(overflow="fold")  # keys are to be copied: no part of one may be left out
    for name in ("key", "model_source", "model_fingerprint", "created_at"):
        about.add_row(name.replace("_", " "), str(engine[name]))
    about.add_row("version", _version(engine))
    device = engine["device"]
    about.add_row("device", f"{device['name']}, {device['num_threads']} threads")
    runtime = f"{engine['runtime']} {engine['runtime_version']}, {engine['precision']}"
    about.add_row("runtime", f"{runtime}, batches of {engine['batch_size']}")
    about.add_row("chosen", engine["reason"])
    return Group(about, Text(), render_rungs(engine["rungs"]))


def _version(engine: Facts) -> str:
    if engine["version"] is None:
        return "none: no request names it"
    return f"{engine['version']}, {'current' if engine['current'] else 'not current'}"


def render_rungs(rungs: list[Facts]) -> RenderableType:
    """The ladder: every candidate with its speed and its accuracy."""
    ladder = Table(box=None, pad_edge=False)
    for heading in ("rung", "batch", "rows/s", "agreement", "cosine", "KL", "metric", "gate"):
        ladder.add_column(heading, overflow="fold")
    remarks = []
    for rung in rungs:
        name = f"{rung['runtime']} {rung['precision']}"
        accuracy = rung["accuracy"] or {}
        figures = ("agreement", "cosine", "divergence", "metric")
        verdict = "passed" if rung["passed"] else "failed" if rung["error"] else "missed"
        ladder.add_row(
            name,
            str(rung["batch_size"] or "-"),
            f"{rung['rows_per_s']:,.0f}",
            *(_figure(accuracy.get(figure)) for figure in figures),
            verdict,
        )
        remarks += [Text(f"{name}: {remark}") for remark in _remarks(rung)]
    return Group(ladder, *remarks)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _remarks(rung: Facts) -> list[str]:
    said = [rung["error"], ", ".join(rung["failures"]), rung["note"]]
    if rung["float_layers"]:
        said.append(f"in float: {', '.join(rung['float_layers'])}")
    return [remark for remark in said if remark]


def render_built(engine: Facts) -> RenderableType:
    """Whether an engine was built, and what it is."""
    if not engine["built"]:
        said = "found, nothing to build"
    elif engine["version_before"] is not None:
        said = f"built in {engine['took_s']:.0f} s; the same as version {engine['version_before']}"
    else:
        said = f"built in {engine['took_s']:.0f} s"
    return Group(Text(said, style="bold green"), render_engine(engine))


def render_verdicts(facts: Facts) -> RenderableType:
    """One line for each engine, and a sentence for each that is damaged."""
    if not facts["engines"]:
        return Text(f"{facts['store']}: no engine to verify")
    table = Table(show_header=False, box=None, pad_edge=False)
    for engine in facts["engines"]:
        if engine["damage"] is not None:
            verdict = Text(f"damaged: {engine['damage']}", style="bold red")
        elif engine["opened"]:
            verdict = Text(f"intact, {engine['files']} files; opened, the probe batch agrees")
        else:
            verdict = Text(f"intact, {engine['files']} files; not opened: {engine['not_opened']}")
        table.add_row(engine["key"][:12], verdict)
    return table


def render_rollback(facts: Facts) -> RenderableType:
    """What is current now."""
    return Text(
        f"engine {facts['engine'][:12]} is current again (version {facts['number']}), "
        f"in place of {facts['replaced'][:12]}"
    )


def render_garbage(facts: Facts) -> RenderableType:
    """What was removed, or would be."""
    done = "would remove" if facts["dry_run"] else "removed"
    lines = [f"{done} engine {key[:12]}" for key in facts["engines"]]
    lines += [f"{done} {path}" for path in facts["left_overs"]]
    engines, files = len(facts["engines"]), len(facts["left_overs"])
    lines.append(f"{done} {engines} engines, {files} left-over files, {facts['num_bytes']:,} bytes")
    return Text("\n".join(lines))
