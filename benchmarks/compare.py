"""Run the peers and the product side by side; write records, plots and the README's tables.

    python -m benchmarks.compare [--workloads photos] [--peers script expert_script/procs]
                                 [--rounds 3] [--rows 200] [--photos DIR]

What is missing is made first, once: environments, rows, models and our engine. A smoke test (other
rows, some peers only, fewer than three rounds) writes its record below `.peers`, and no README.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import HERE, WORKLOADS, Peer, Places, choose_peers, contenders
from benchmarks.prepare import (
    PrepareError,
    build_engine,
    make_environments,
    make_models,
    make_rows,
)
from benchmarks.process_tree import adopt_orphans
from benchmarks.record import Comparison, MarkerError, readme_section, replace_section, write_record
from benchmarks.rounds import ROOT, Course, Run, run_rounds, to_json
from engines.devices import this_cpu
from flows.devices import num_cores
from flows.measuring.bench_setup import machine_facts

WORK = HERE / ".peers"
MIN_ROUNDS = 3


def main() -> None:
    """Measure each workload, and write what was found."""
    options = parse_options()
    adopt_orphans()
    try:
        for name in options.workloads:
            publish(compare(name, options), options)
    except (PrepareError, MarkerError) as error:
        sys.exit(f"benchmarks: {error}")


def compare(name: str, options: argparse.Namespace) -> Comparison:
    """Make what one workload needs, and measure it."""
    peers, left_out = choose_peers(name, options.peers)
    for reason in left_out:
        say(reason)
    course, note = prepare(name, peers, options)
    machine = machine_facts(this_cpu(num_cores()), None)  # before anything is at work here
    field = contenders(WORKLOADS[name], peers, options.places)
    kept = options.work / f"runs-{name}.jsonl"
    kept.write_text("")

    def keep(run: Run) -> None:
        with kept.open("a") as file:
            print(to_json(run), file=file)

    return Comparison(
        workload=WORKLOADS[name],
        runs=run_rounds(field, course, options.rounds, keep, say),
        num_rounds=options.rounds,
        machine=machine,
        command=command_line(options),
        notes=[note, *left_out],
    )


def prepare(name: str, peers: Sequence[Peer], options: argparse.Namespace) -> tuple[Course, str]:
    """What the contenders are given, and a note on what was made for it."""
    workload, places = WORKLOADS[name], options.places
    make_environments(dict.fromkeys(["base", *(p.environment for p in peers)]), places, say)
    num_rows = options.rows or workload.num_rows
    rows = make_rows(workload, num_rows, options.photos, places, say)
    models = make_models(options.photos, places, say)
    engine = build_engine(workload, rows, places, say)
    course = Course(
        rows=rows,
        startup_rows=rows.with_name(f"{rows.name}-startup"),
        model=models / workload.model,
        timeout_s=options.timeout,
    )
    size = sum(path.stat().st_size for path in rows.glob("*.parquet")) / 1e6
    made = "made before the clock: the peers' models, and the product's engine"
    return course, f"input: {num_rows:,} rows, {size:,.0f} MB of Parquet; {made} ({engine})"


def publish(comparison: Comparison, options: argparse.Namespace) -> None:
    """Write the record, and README.md's table when the whole comparison was made."""
    whole = not (options.rows or (options.peers and not options.publish))
    whole = whole and options.rounds >= MIN_ROUNDS
    record = write_record(comparison, HERE if whole else options.work)
    say(record.read_text(encoding="utf-8"))
    say(f"written: {record}")
    if not whole:
        say("README.md is as it was: that takes all peers, all rows and three rounds or more")
        return
    readme = ROOT / "README.md"
    section = readme_section(comparison, record.relative_to(ROOT).as_posix())
    text = replace_section(readme.read_text(encoding="utf-8"), comparison.workload.name, section)
    readme.write_text(text, encoding="utf-8")


def command_line(options: argparse.Namespace) -> str:
    """The `make` command that does the same; without paths, which belong to a machine."""
    asked = {
        "ROUNDS": options.rounds if options.rounds != MIN_ROUNDS else None,
        "WORKLOADS": " ".join(options.workloads) if len(options.workloads) == 1 else None,
        "PEERS": " ".join(options.peers) or None,
        "ROWS": options.rows or None,
        "PUBLISH": int(options.publish),
    }
    words = [f"{name}={shlex.quote(str(value))}" for name, value in asked.items() if value]
    return " ".join(["make bench", *words])


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(WORKLOADS)
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--peers", nargs="*", default=[], help="peer or peer/variant; none: all")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--rows", type=int, default=0, help="smoke test: sets of this many rows")
    parser.add_argument("--publish", action="store_true", help="write README.md for some peers too")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run")
    add_places(parser)
    options = parser.parse_args(arguments)
    options.places = find_places(options)
    return options


def add_places(parser: argparse.ArgumentParser) -> None:
    """Arguments that say where things are; benchmarks/scaling.py has them too."""
    parser.add_argument("--photos", type=Path, help="photographs with a labels.csv")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of all that is made once")
    parser.add_argument("--venvs", type=Path, help="the peers' environments (default WORK/venvs)")


def find_places(options: argparse.Namespace) -> Places:
    """Folders below WORK, absolute; WORK is made."""
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    return Places(
        venvs=(options.venvs or options.work / "venvs").resolve(),
        data=options.work / "data",
        engines=options.work / "engines",
    )


def say(line: str) -> None:
    """Tell how it goes, on standard error."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
