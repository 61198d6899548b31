"""The guards: what stops a run before it is published, what each says, and how it is overruled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

from pipeline.config import Job
from pipeline.errors import GuardError, known_guards
from pipeline.ledger import CommitRecord
from pipeline.plan import Plan
from pipeline.report import Drift, ScoreDistribution
from pipeline.report_words import usd

ROUNDING = 1e-9
"""Of a share of rows: 0.29 * 100 is less than 29."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LostFiles:
    """Input files that cannot be read."""

    num_files: int
    num_rows: int
    """Estimated: nobody has counted them."""

    def __str__(self) -> str:
        if not self.num_files:
            return ""
        what = "file that cannot" if self.num_files == 1 else "files that cannot"
        return f", with about {self.num_rows:,} in {self.num_files:,} {what} be read,"


NO_FILES = LostFiles(num_files=0, num_rows=0)


def lost_files(plan: Plan) -> LostFiles:
    """The files of a plan that cannot be read."""
    return LostFiles(num_files=len(plan.unreadable), num_rows=plan.num_unreadable_rows)


def accepting(command: str, guards: Iterable[str]) -> str:
    """A command that publishes although these guards would stop it."""
    return command + "".join(f" --accept {guard}" for guard in sorted(guards))


class Guards:
    """Stops a run where a limit is not kept; those that are accepted only note it.

    Args:
        accept: Names of guards that may not stop this run.
        command: That does the same again, and would take `--accept`.

    Raises:
        ConfigError: A name is none of `pipeline.errors.GUARDS`.
    """

    def __init__(self, accept: Iterable[str] = (), command: str = "score run JOB --date D") -> None:
        self._accept = known_guards(accept)
        self._command = command
        self._overruled: dict[str, str] = {}

    @property
    def accepted(self) -> tuple[str, ...]:
        """The guards that were overruled, each with what it had found."""
        return tuple(f"{guard}: {found}" for guard, found in self._overruled.items())

    def stop(self, guard: str, found: str, way_out: str) -> None:
        """Stop the run, unless the guard is accepted.

        Args:
            guard: Its name.
            found: What was found, and what was expected: a sentence.
            way_out: What is to be done about it: the beginning of one.

        Raises:
            GuardError: The guard is not accepted.
        """
        if guard in self._accept:
            self._overruled[guard] = found
            return
        command = accepting(self._command, {*self._accept, guard})
        how = f"or publish as it is with `{command}`."
        raise GuardError(guard, f"{found} {way_out}, {how}")

    def check_rows(self, job: Job, date: str, num_rows: int) -> None:
        """Whether the date has the rows that it should have."""
        if num_rows < job.limits.min_rows:
            self.stop(
                "rows",
                f"{job.input.uri.rstrip('/')}: {num_rows:,} rows for {date}; expected at least "
                f"{job.limits.min_rows:,} (limits.min_rows).",
                "Nothing was scored; wait for the rest",
            )

    def check_quarantine(
        self, job: Job, num_rows: int, reasons: Mapping[str, int], lost: LostFiles = NO_FILES
    ) -> None:
        """Whether few enough of a date's `num_rows` rows are in quarantine, by reason.

        Rows of files that cannot be read count as quarantined, as many as `LostFiles` says.
        """
        limits, num_bad = job.limits, sum(reasons.values())
        share = (num_bad + lost.num_rows) / (num_rows + lost.num_rows)
        allowed = max(
            limits.probation_rows,
            int(limits.max_quarantined * (num_rows + lost.num_rows) + ROUNDING),
        )
        if num_bad + lost.num_rows > allowed:
            worst = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()) or "none"
            self.stop(
                "quarantine",
                f"{num_bad:,} of {num_rows:,} rows{lost} ({share:.2%}) are in quarantine "
                f"({worst}); expected at most {allowed:,} (limits.max_quarantined "
                f"{limits.max_quarantined:.2%}, limits.probation_rows {limits.probation_rows:,}).",
                "Nothing was published, and what is scored is kept; mend the cause and try these "
                "rows again with `score requeue`, raise a limit and run the same command again",
            )

    def check_budget(self, job: Job, spent_usd: float, num_left: int) -> None:
        """Whether there is money left for the `num_left` rows that are not scored."""
        limit = job.limits.max_usd
        if limit is not None and num_left and spent_usd > limit:
            self.stop(
                "budget",
                f"{usd(spent_usd)} are spent and {num_left:,} rows left; expected to spend at most "
                f"{usd(limit)} (limits.max_usd).",
                "Nothing was published, and what is scored is kept; run the same command with a "
                "higher limit to go on",
            )

    def check_scores(self, job: Job, found: ScoreDistribution) -> None:
        """Whether the scores are distributed as in the last nights."""
        limit = job.limits.max_psi
        for name, psi in found.psi.items():
            if limit is not None and psi > limit + found.chance[name]:
                self.stop(
                    "scores",
                    f"{name}: a population stability index of {psi:.3g} against the last "
                    f"{len(found.nights)} nights ({found.nights[-1]} to {found.nights[0]}); "
                    f"expected at most {limit:g} (limits.max_psi) and {found.chance[name]:.2g} "
                    "that may be chance.",
                    "Nothing was published; look at the input and at the model",
                )

    def check_drift(self, head: str, min_agreement: float, found: Drift, engine: str) -> None:
        """Whether the engine still answers as fp32 does."""
        from pipeline.drift import is_too_far  # what judges a night is imported while it is scored

        if is_too_far(found, head, min_agreement):
            what = "share of rows with fp32's class" if head == "classes" else "share of variance"
            self.stop(
                "drift",
                f"engine {engine[:12]}: on {found.rows:,} rows of this night its {what} is "
                f"{found.agreement:.4g}; expected at least {min_agreement:g} "
                "(engine.gate.min_agreement) but for chance.",
                "Nothing was published; look at the device, and build another engine with `score "
                "engine build --force` or go back with `score engine rollback`",
            )


class NightWatch:
    """Counts what is committed, and stops scoring as soon as a limit cannot be kept any more.

    May be told of commits by several threads at once; a run that is stopped stays stopped.

    Args:
        guards: Of the run.
        job: The job.
        num_rows: Of the date.
        done: Records of earlier attempts.
        spent_usd: What the run has cost until now.
        lost: Files that cannot be read.
    """

    def __init__(
        self,
        guards: Guards,
        job: Job,
        num_rows: int,
        done: Iterable[CommitRecord],
        spent_usd: Callable[[], float],
        lost: LostFiles = NO_FILES,
    ) -> None:
        self._guards = guards
        self._job = job
        self._num_rows = self._num_left = num_rows
        self._lost = lost
        self._spent_usd = spent_usd
        self._reasons: Counter[str] = Counter()
        self._lock = Lock()
        for record in done:
            self._count(record)

    def _count(self, record: CommitRecord) -> None:
        self._num_left -= record.num_rows
        self._reasons.update(record.reasons)

    def committed(self, record: CommitRecord) -> None:
        """Another shard; GuardError when it was one too many."""
        with self._lock:
            self._count(record)
        self.check()

    def check(self) -> None:
        """GuardError when a limit is passed."""
        with self._lock:
            reasons = dict(self._reasons.most_common())
        self._guards.check_quarantine(self._job, self._num_rows, reasons, self._lost)
        self._guards.check_budget(self._job, self._spent_usd(), self._num_left)
