"""A state machine over small nights: they start, crash, fail, sleep, race, and files rot.

    python night_machine.py FOLDER NUM_EXAMPLES NUM_STEPS [MUTANT]

Each night is the product's own, from plan to report, in a forked process; its engine is a sum, and
the lane's process is left out. After every step a reader sees nothing or one whole run that never
changes (R3), which accounts for every row (R1) and had one publisher (R6); and no shard was scored
that had been committed when its night began (R4). Exits 1 with the steps where that is not so.

MUTANT names a mistake to make on purpose, which must be found.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from crash_night import CRASHED, disturb
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from night_cases import without_an_engine
from night_mutants import MUTANTS
from pipeline_cases import a_job, job_data, write_input
from small_night import (
    BAD_ID,
    IDS,
    NUM_SHARDS,
    SHARD_ROWS,
    Started,
    damage,
    end,
    fork,
    hashes,
    night,
    users,
    wait,
)

from pipeline.errors import InputError, VerifyError
from pipeline.gc import GcRules, collect, find_garbage
from pipeline.run import Again
from pipeline.storage import open_storage
from pipeline.verify import verify_published
from pipeline.versions import roll_back

NUM_VERSIONS = 3
"""Of the input file."""
MAX_OPERATION = 125
"""A night has a few operations on files less."""
MAX_ASLEEP = 3
BAD_SHARD = {(BAD_ID - 1) // SHARD_ROWS}
LEFTOVERS = ("_publishing-*/*", "_probe-*", ".*.tmp")
ROOT = Path(tempfile.gettempdir())

operations = st.integers(1, MAX_OPERATION)
failures = st.sampled_from(["once", "forever"])
choices = st.integers(0, 1_000_000)


def only_if(condition: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A step that does nothing otherwise.

    Not hypothesis's precondition: which steps may be chosen must not depend on what threads and
    processes happened to do, or it cannot repeat what it has drawn.
    """

    def decorate(step: Any) -> Any:
        @functools.wraps(step)
        def guarded(self: Any, **drawn: Any) -> None:
            if condition(self):
                step(self, **drawn)

        return guarded

    return decorate


@dataclass
class Rot:
    """What was damaged on purpose."""

    flipped: set[str] = field(default_factory=set)
    """Names of parts that are as long as before."""
    cut: set[str] = field(default_factory=set)
    """Names of parts that are not."""
    records: set[Path] = field(default_factory=set)


class NightMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=ROOT))
        self.output = self.folder / "out"
        self.job = a_job(
            job_data(self.folder),
            lanes={"shard_rows": SHARD_ROWS},
            limits={"max_quarantined": 0.5, "max_psi": None, "drift_rows": 0},
        )
        self.versions = [
            write_input(self.folder / str(version), users(version), rows_per_group=SHARD_ROWS)
            for version in range(NUM_VERSIONS)
        ]
        self.days = itertools.count(1)
        self.begin_day()
        self.numbers = itertools.count()
        self.asleep: list[tuple[Started, set[int]]] = []
        """With the versions of the input that they may have met."""
        self.rot = Rot()
        self.may_change = False
        """Whether the step was meant to replace what is published."""
        self.published_runs: set[str] = set()
        self.seen: dict[str, str] = {}
        """sha256 of each file that readers have seen."""

    # -- what a night is, and what is known of it

    @property
    def published(self) -> Path:
        return self.output / "users" / f"dt={self.date}"

    @property
    def is_published(self) -> bool:
        return (self.published / "_MANIFEST.json").exists()

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.published / "_MANIFEST.json").read_text())
        return found

    def put_input(self, version: int) -> None:
        """Make a version the input of the date, with its time stamp."""
        place = self.folder / "in" / f"dt={self.date}" / "part-0.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.hardlink_to(self.versions[version])

    def pinned_version(self, files: list[dict[str, Any]]) -> int:
        """The version of the input that a run or a manifest names."""
        (file,) = files
        times = [str(path.stat().st_mtime_ns) for path in self.versions]
        return times.index(file["version"])

    def start(self, *disturbance: Any, again: Again = "no") -> Started:
        log = self.folder / f"{self.date}-{again}-{next(self.numbers)}"
        committed = self.committed() - (BAD_SHARD if again == "quarantine" else set())

        def work() -> None:
            os.fsync = lambda _: None  # a crash of a process loses nothing that was written
            if disturbance:
                disturb(self.output, *disturbance)
            night(self.job, self.date, log, again)

        pid = fork(work, log.with_suffix(".error"))
        return Started(pid=pid, log=log, committed=committed)

    def committed(self) -> set[int]:
        """Shards of the present input with a record and parts that nobody has cut.

        Those of runs that were published are not meant: who scores them again was told to. Nor
        are those of a version whose number another has taken since.
        """
        found = set()
        version = self.manifest().get("version", 1) + 1 if self.is_published else 1
        for description in self.output.glob("users/_runs/*/run.json"):
            run = whole(description)
            is_ours = (run["date"], self.pinned_version(run["files"])) == (self.date, self.version)
            if not is_ours or run["version"] != version or run["run_id"] in self.published_runs:
                continue
            for path in description.parent.glob("commits/[!.]*.json"):
                record = {} if path in self.rot.records else whole(path)
                files = [
                    record[kind]["name"] for kind in ("part", "quarantine") if record.get(kind)
                ]
                if files and not self.rot.cut.intersection(files):
                    found.add(record["shard"])
        return found

    def check_end(self, started: Started, code: int | None, *allowed: int | None) -> None:
        assert code in allowed, f"exit code {code}: {started.why()}"
        twice = started.scored() & started.committed
        assert not twice, f"committed shards were scored again: {twice}"

    def run(self, *disturbance: Any, again: Again = "no") -> tuple[Started, int | None]:
        started = self.start(*disturbance, again=again)
        return started, wait(started.pid)

    def check_published(self) -> None:
        assert self.is_published, "it is over, and nothing is published"

    # -- what may happen

    @rule()
    @only_if(lambda self: not self.is_published)
    def a_night_runs(self) -> None:
        self.check_end(*self.run(), 0)
        self.check_published()

    @rule(number=operations)
    @only_if(lambda self: not self.is_published)
    def a_night_crashes(self, number: int) -> None:
        self.check_end(*self.run("exit", number), 0, CRASHED)

    @rule(number=operations, how=failures)
    @only_if(lambda self: not self.is_published)
    def an_operation_fails(self, number: int, how: str) -> None:
        self.check_end(*self.run(how, number), 0, 1)

    @rule(number=operations, how=st.sampled_from(["exit", "once"]))
    @only_if(lambda self: not self.is_published)
    def two_nights_at_once(self, number: int, how: str) -> None:
        whole, other = self.start(), self.start(how, number)
        codes = [wait(each.pid) for each in (whole, other)]
        self.check_end(whole, codes[0], 0)
        self.check_end(other, codes[1], 0, 1 if how == "once" else CRASHED)
        self.check_published()

    @rule(number=operations)
    @only_if(lambda self: not self.is_published and len(self.asleep) < MAX_ASLEEP)
    def a_night_falls_asleep(self, number: int) -> None:
        started, code = self.run("stop", number)
        self.check_end(started, code, 0, None)
        if code is None:
            self.asleep.append((started, {self.version}))

    @rule(which=choices)
    @only_if(lambda self: self.asleep)
    def a_night_wakes_up(self, which: int) -> None:
        started, versions = self.asleep.pop(which % len(self.asleep))
        os.kill(started.pid, signal.SIGCONT)
        has_changed = len(versions) > 1
        self.check_end(started, wait(started.pid), 0, 1 if has_changed else 0)
        if not has_changed:
            self.check_published()

    @rule(which=choices)
    @only_if(lambda self: self.asleep)
    def a_sleeping_night_dies(self, which: int) -> None:
        started, _ = self.asleep.pop(which % len(self.asleep))
        end(started.pid)

    @rule(version=st.integers(0, NUM_VERSIONS - 1))
    @only_if(lambda self: not self.is_published and self.parts())
    def the_input_changes(self, version: int) -> None:
        self.version = version
        self.put_input(version)
        for _, versions in self.asleep:
            versions.add(version)

    @rule()
    @only_if(lambda self: self.is_published and not self.asleep)
    def the_published_date_runs_again_and_a_new_day_comes(self) -> None:
        self.check_end(*self.run(), 0)
        self.begin_day()

    def begin_day(self) -> None:
        self.date = f"2026-11-{next(self.days):02d}"
        self.version = 0
        self.put_input(self.version)

    @rule(number=operations, how=st.sampled_from(["exit", "forever"]))
    @only_if(lambda self: self.is_published and not self.asleep)
    def it_is_scored_again_by_force(self, number: int, how: str) -> None:
        self.may_change = True
        self.check_end(*self.run(how, number, again="all"), 0, CRASHED if how == "exit" else 1)

    @rule(number=operations)
    @only_if(lambda self: not self.asleep)
    def its_quarantine_is_tried_again(self, number: int) -> None:
        self.may_change = True
        manifest = self.manifest() if self.is_published else None
        started, code = self.run("exit", number, again="quarantine")
        self.check_end(started, code, 0, CRASHED)
        if manifest and self.pinned_version(manifest["input"]["files"]) == self.version:
            more = started.scored() - BAD_SHARD
            assert not more, f"shards without quarantine were scored again: {more}"

    @rule()
    @only_if(lambda self: self.is_published and not self.asleep)
    def it_is_rolled_back(self) -> None:
        self.may_change = True
        with suppress(InputError):  # there is only one version, or gc has taken the other
            roll_back(open_storage(str(self.output)), "users", self.date)

    @rule()
    @only_if(lambda self: not self.asleep and self.output.exists())
    def garbage_is_collected(self) -> None:
        """As if everything had been left alone for long."""
        committed, output = self.committed(), open_storage(str(self.output))
        rules = GcRules(before=time.time() + 60, keep_versions=1, unfinished=False)
        collect(output, find_garbage(output, "users", rules))
        left = [
            path for pattern in LEFTOVERS for path in self.output.rglob(pattern) if path.is_file()
        ]
        assert left == [], left
        if not self.is_published:
            assert self.committed() == committed, "a shard of an unfinished run was taken away"

    @rule(which=choices, at=choices, cut=st.booleans())
    @only_if(lambda self: self.may_rot(self.parts()))
    def a_part_rots(self, which: int, at: int, cut: bool) -> None:
        found = self.parts()
        path = found[which % len(found)]
        (self.rot.cut if cut else self.rot.flipped).add(path.name)
        damage(path, at, cut=cut)

    @rule(which=choices, at=choices, cut=st.booleans())
    @only_if(lambda self: self.may_rot(self.records()))
    def a_record_rots(self, which: int, at: int, cut: bool) -> None:
        found = self.records()
        path = found[which % len(found)]
        self.rot.records.add(path)
        damage(path, at, cut=cut)

    def may_rot(self, files: list[Path]) -> bool:
        """Only before publication: a part is then the same file as what was published of it."""
        return bool(files) and not self.asleep and not self.is_published

    def parts(self) -> list[Path]:
        """Parts that are intact, orphans too."""
        found = sorted(self.output.glob(f"users/_runs/{self.date}-*/parts/[!.]*"))
        return [path for path in found if path.name not in self.rot.flipped | self.rot.cut]

    def records(self) -> list[Path]:
        found = sorted(self.output.glob(f"users/_runs/{self.date}-*/commits/[!.]*"))
        return [path for path in found if path not in self.rot.records]

    # -- what must always be so

    @invariant()
    def readers_see_nothing_or_one_whole_run_that_never_changes(self) -> None:
        parts = list(self.published.glob("*.parquet"))
        assert len(parts) == self.is_published * NUM_SHARDS, f"a reader sees {len(parts)} parts"
        seen = dict(hashes(self.output / "users", "dt=*/**/[!.]*"))
        path = str(self.published / "_MANIFEST.json")
        is_new = seen.get(path) != self.seen.get(path)
        if is_new and self.may_change:  # another version: nothing of the one before may be left
            known = {name for name in self.seen if name.startswith(str(self.published))}
            self.seen = {name: self.seen[name] for name in self.seen if name not in known}
        changed = {name for name, digest in self.seen.items() if seen.get(name) != digest}
        assert not changed, f"changed under a reader: {changed}"
        if is_new:
            self.check_content()
        self.seen, self.may_change = seen, False

    def check_content(self) -> None:
        """The independent recount, the values, and that they are of one version of the input."""
        manifest = self.manifest()
        self.published_runs.add(manifest["run_id"])
        version = self.pinned_version(manifest["input"]["files"])
        files = [path.name for path in self.published.rglob("*.parquet")]
        names = {re.sub(r"-v\d+(?=\.parquet$)", "", name) for name in files}  # as in the ledger
        assert not names & self.rot.cut, "a part that is cut off was published"
        self.put_input(version)
        try:
            verdict = verify_published(self.job.output.uri, "users", self.date)
        except VerifyError as error:
            if names & self.rot.flipped:
                return
            raise AssertionError("score verify is not content") from error
        finally:
            self.put_input(self.version)
        assert not names & self.rot.flipped, "score verify does not see a flipped byte"
        counted = (verdict["rows"], verdict["scored"], verdict["quarantined"])
        assert counted == (len(IDS), len(IDS) - 1, 1), counted
        table = pa.concat_tables(pq.read_table(path) for path in self.published.glob("*.parquet"))
        found = dict(zip(table["user_id"].to_pylist(), table["score"].to_pylist(), strict=True))
        expected = {each: each + 100.0 * version for each in IDS if each != BAD_ID}
        assert found == expected, f"scores of another input: {found}"

    @invariant()
    def at_most_one_night_has_published(self) -> None:
        publishers = list(self.folder.glob(f"{self.date}-no-*.published"))
        assert len(publishers) <= 1, f"published twice: {publishers}"

    def teardown(self) -> None:
        """Write down a broken promise where it is seen.

        Hypothesis repeats the steps, and where a race then goes another way, all it says is that.
        """
        if isinstance(sys.exc_info()[1], AssertionError):
            traceback.print_exc()
        for started, _ in self.asleep:
            end(started.pid)
        shutil.rmtree(self.folder, ignore_errors=True)


def whole(note: Path) -> Any:
    """What a file says that nobody has damaged."""
    try:
        return json.loads(note.read_text())
    except ValueError:
        raise AssertionError(f"half of {note} is there") from None


def main() -> None:
    """See above."""
    global ROOT
    ROOT, num_examples, num_steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    without_an_engine()
    for name in sys.argv[4:]:
        MUTANTS[name]()
    phases = [Phase.generate] if sys.argv[4:] else [Phase.generate, Phase.shrink]
    found = settings(
        max_examples=num_examples,
        stateful_step_count=num_steps,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(NightMachine, settings=found)


if __name__ == "__main__":
    main()
