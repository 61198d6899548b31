"""What is made once, before any clock starts: environments, rows, models and our engine."""

from __future__ import annotations

import compileall
import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contenders import HERE, WORKLOADS, Places, Workload, product_command
from benchmarks.rounds import ROOT, Facts

PEERS_FOLDER = HERE / "peers"
SHARED_PHOTOS = ROOT.parent / "shared" / "data" / "photos"
UNKNOWN_LABEL = -1
Say = Callable[[str], None]


class PrepareError(Exception):
    """Something that the benchmark needs cannot be made."""


def make_environments(names: Iterable[str], places: Places, say: Say) -> None:
    """Virtual environments of the peers; one that is ready for this setup.sh is left alone."""
    script = PEERS_FOLDER / "setup.sh"
    for name in names:
        ready = places.venvs / name / ".ready"
        if not ready.exists() or ready.read_text() != script.read_text():
            say(f"making the environment {name} in {places.venvs}")
            _run(["bash", str(script), str(places.venvs), name])
            ready.write_text(script.read_text())


def make_rows(
    workload: Workload, num_rows: int, photos: Path | None, places: Places, say: Say
) -> Path:
    """The folder of the rows to score, with `<folder>-startup` beside it.

    Args:
        workload: Which.
        num_rows: How many.
        photos: Folder of photographs with a labels.csv; None: see `find_photos`.
        places: Where the rows go.
        say: Is told what takes long.
    """
    is_standard = num_rows == workload.num_rows
    rows = places.data / (workload.name if is_standard else f"{workload.name}-{num_rows}")
    if rows.exists():
        say(f"the rows are in {rows}; remove it and {rows.name}-startup to make them again")
        return rows
    say(f"making {num_rows:,} rows in {rows}")
    with _unfinished(places.data) as folder:
        made = folder / rows.name
        what = ["--photos", str(find_photos(photos, folder))]
        source = what if workload.name == "photos" else ["--features"]
        script = [str(places.venvs / "base/bin/python"), str(PEERS_FOLDER / "make_data.py")]
        _run([*script, *source, "--rows", str(num_rows), "--out", str(made)])
        for name in (f"{rows.name}-startup", rows.name):
            os.rename(folder / name, places.data / name)
    return rows


def find_photos(wanted: Path | None, scratch: Path) -> Path:
    """A folder of photographs with their labels.csv.

    Those asked for; else the labelled ones beside the checkout, where there are any; else the
    demo's, written to `scratch`, whose labels nobody knows.
    """
    if wanted is not None and not (wanted / "labels.csv").exists():
        raise PrepareError(
            f"{wanted}: no labels.csv; expected photographs and that file, with the columns path "
            "and class_index. Name another folder with PHOTOS=, or none for the demo's."
        )
    if wanted is None and not SHARED_PHOTOS.exists():
        return _write_demo_photos(scratch / "photographs")
    return wanted or SHARED_PHOTOS


def _write_demo_photos(folder: Path) -> Path:
    from flows.demo_data import load_photos

    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "class_index"])
        for name, photo in sorted(load_photos().items()):
            photo.save(folder / f"{name}.png", compress_level=1)
            lines.writerow([f"{name}.png", UNKNOWN_LABEL])
    return folder


def make_models(photos: Path | None, places: Places, say: Say) -> Path:
    """The folder of models; they are calibrated with the first of the standard pictures."""
    models = places.data / "models"
    if models.exists():
        return models
    make_environments(["torch"], places, say)
    pictures = WORKLOADS["photos"]
    rows = make_rows(pictures, pictures.num_rows, photos, places, say)
    say(f"making the models in {models}")
    with _unfinished(places.data) as folder:
        script = [str(places.venvs / "torch/bin/python"), str(PEERS_FOLDER / "make_model.py")]
        _run([*script, "--data", str(rows), "--out", str(folder / "models")])
        os.rename(folder / "models", models)
    return models


def build_engine(
    workload: Workload, rows: Path, places: Places, say: Say, settings: Sequence[str] = ()
) -> str:
    """Find or build the product's engine, as any night but the first finds it; what it took.

    Args:
        workload: Whose.
        rows: It is calibrated on these.
        places: Where engines are kept.
        say: Is told that it may take long.
        settings: More options of `score`, for a job that differs.
    """
    say(f"finding or building the engine of {workload.name}")
    compile_modules()
    source = places.data / "models" / workload.product_model
    command = product_command(["engine", "build"], workload.name, places, str(source))
    done = _run([word.replace("{input}", str(rows)) for word in [*command, *settings]])
    facts: Facts = json.loads(done.splitlines()[-1])
    return f"built in {facts['took_s']:.0f} s" if facts["built"] else "found in the store"


def compile_modules() -> None:
    """Keep the bytecode of the product and of the peers' scripts, as pip does where it installs.

    An editable install whose environment says PYTHONDONTWRITEBYTECODE would compile in every run.
    """
    for folder in ("engines", "pipeline", "flows", "benchmarks/peers"):
        compileall.compile_dir(ROOT / folder, quiet=1)


@contextmanager
def _unfinished(parent: Path) -> Iterator[Path]:
    """A folder on the same disk, for what is renamed once it is whole."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".unfinished-") as folder:
        yield Path(folder)


def _run(command: Sequence[str]) -> str:
    """What a command prints.

    Raises:
        PrepareError: It fails; with the end of what it says.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout)[-800:].split())
        raise PrepareError(f"{' '.join(command[:3])}: exit status {done.returncode}: {said}")
    return done.stdout
