"""Who runs: the peers, each in its environment, and the product; and what they all score."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
PRODUCT = "nightscore"
DATE = "2026-11-20"
"""The product scores a date; the whole input folder belongs to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is scored, and how an output is read."""

    name: str
    num_rows: int
    model: str
    """File that the peers run: int8, as they run it fastest."""
    product_model: str
    """File that the product makes its own engine of."""
    quality: str
    """Heading of the column that proves that the work was done."""
    peer_columns: tuple[str, ...]
    product_columns: tuple[str, ...]
    """Columns of an output: id and answer, and the label last where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A script of benchmarks/peers; each of its variants is a contender."""

    name: str
    environment: str
    script: str
    variants: tuple[str, ...]
    max_rows: int = 0
    """Most rows that it is given; 0: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A command; {input}, {model} and {output} in it are filled in for each run."""

    name: str
    command: tuple[str, ...]
    columns: tuple[str, ...]
    """As `Workload.peer_columns`."""
    max_rows: int = 0
    """Most rows that it scores; 0: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Folders that are made once and used by every run."""

    venvs: Path
    data: Path
    engines: Path


WORKLOADS = {
    "photos": Workload(
        name="photos",
        num_rows=4_000,
        model="lite0-int8-u8s8.onnx",
        product_model="lite0-fp32.onnx",
        quality="top-1 accuracy",
        peer_columns=("id", "top1", "label"),
        product_columns=("id", "class_id", "label"),
    ),
    "features": Workload(
        name="features",
        num_rows=10_000_000,
        model="ranking-int8.onnx",
        product_model="ranking-fp32.onnx",
        quality="weighted score",
        peer_columns=("user_id", "score"),
        product_columns=("user_id", "score"),
    ),
}
PEERS = {
    "photos": (
        Peer(name="script", environment="base", script="script.py", variants=("naive", "tuned")),
        Peer(
            name="expert_script",
            environment="base",
            script="expert_script.py",
            variants=("threads", "procs"),
        ),
        *(
            Peer(name=name, environment=env, script=script, variants=("docs", "tuned", "fast"))
            for name, env, script in (
                ("ray_data", "ray", "ray_data.py"),
                ("daft", "daft", "daft_peer.py"),
                ("spark", "spark", "spark_peer.py"),
                ("hf_datasets", "hf", "hf_datasets.py"),
            )
        ),
        # some 20 times slower than the others: a quarter of the rows is long enough
        Peer(
            name="torch_loader",
            environment="torch",
            script="torch_loader.py",
            variants=("eager", "compile"),
            max_rows=1_000,
        ),
    ),
    "features": tuple(
        Peer(name=name, environment=env, script="features_peers.py", variants=(name,))
        for name, env in (
            ("pandas_ort", "base"),
            ("arrow_ort", "base"),
            ("polars_ort", "base"),
            ("ray_data", "ray"),
            ("daft", "daft"),
            ("spark", "spark"),
        )
    ),
}


def choose_peers(workload: str, names: Sequence[str]) -> tuple[list[Peer], list[str]]:
    """The peers of a workload by `peer` or `peer/variant`, and why some were left out.

    Args:
        workload: A key of PEERS.
        names: Those wanted; none: all.
    """
    chosen, reasons = [], []
    for peer in PEERS[workload]:
        variants = tuple(
            v for v in peer.variants if not names or {peer.name, _title(peer, v)} & {*names}
        )
        if not variants:
            continue
        if peer.environment == "spark" and shutil.which("java") is None:
            reasons.append(f"{peer.name} was left out: there is no `java` on PATH (Java 17)")
            continue
        chosen.append(replace(peer, variants=variants))
    return chosen, reasons


def contenders(workload: Workload, peers: Sequence[Peer], places: Places) -> list[Contender]:
    """The product, and every variant of the peers."""
    return [_product(workload, places), *_variants(workload, peers, places)]


def product_command(verb: Sequence[str], workload: str, places: Places, source: str) -> list[str]:
    """A `score` command on the job of a workload, whose rows are in `{input}`."""
    return [
        *(str(Path(sys.executable).with_name("score")), *verb),
        *(str(HERE / "jobs" / f"{workload}.yaml"), "--date", DATE, "--json"),
        *("--set", "input.uri={input}", "--set", f"engine.store={places.engines}"),
        *("--set", f"model.source={source}"),
    ]


def _product(workload: Workload, places: Places) -> Contender:
    source = str(places.data / "models" / workload.product_model)
    command = product_command(["run"], workload.name, places, source)
    return Contender(
        name=PRODUCT,
        command=(*command, "--set", "output.uri={output}"),
        columns=workload.product_columns,
    )


def _variants(workload: Workload, peers: Sequence[Peer], places: Places) -> Iterator[Contender]:
    for peer in peers:
        python = places.venvs / peer.environment / "bin" / "python"
        for variant in peer.variants:
            yield Contender(
                name=_title(peer, variant),
                command=(
                    *(str(python), str(HERE / "peers" / peer.script), "--variant", variant),
                    *("--rows", str(peer.max_rows), "--input", "{input}"),
                    *("--model", "{model}", "--output", "{output}"),
                ),
                columns=workload.peer_columns,
                max_rows=peer.max_rows,
            )


def _title(peer: Peer, variant: str) -> str:
    return peer.name if peer.name == variant else f"{peer.name}/{variant}"
