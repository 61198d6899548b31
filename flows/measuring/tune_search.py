"""The search for faster settings: one at a time, from the defaults, in alternating trials.

Machines are noisy and drift. So a candidate is never compared with an old number: it and the best
settings until now take turns on the same rows. It is refused as soon as it loses a turn, and
accepted when it has won all of them by more than the noise. What is best in the end is compared
with the defaults once more, in trials that took no part in choosing it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from statistics import median
from typing import Any, Protocol

from engines.errors import EngineError
from pipeline.errors import PipelineError
from pipeline.tuning import LaneSettings

DEFAULTS = LaneSettings()
NUM_TURNS = 5
"""Equal settings win them all in 1 of 32 comparisons; fewer by more than the noise."""
NO_TIME, NOT_TRIED = "no time left", "not tried"
MIN_GAIN = 0.02
"""Less is not worth a setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One setting, and the values that may be tried."""

    setting: str
    """Field of `LaneSettings`."""
    values: tuple[float, ...]
    """In ascending order, the default among them."""
    default: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Turns of a candidate and of the best settings before it."""

    candidate: LaneSettings
    reference: LaneSettings
    rates: tuple[float, ...]
    """Rows per second of the candidate, turn by turn."""
    reference_rates: tuple[float, ...]
    verdict: str
    """`accepted`, `confirmed`, or why not."""

    @property
    def gain(self) -> float | None:
        """Median over the turns; 0.1 is 10 % faster. None: there was no turn."""
        gains = [a / b - 1 for a, b in zip(self.rates, self.reference_rates, strict=True)]
        return median(gains) if gains else None


class Trials(Protocol):
    """Measures settings; a test has another one than the command."""

    def measure(self, settings: LaneSettings) -> float:
        """Rows per second of one trial.

        Raises:
            EngineError, PipelineError: The settings do not work.
        """

    def setup_s(self, settings: LaneSettings) -> float:
        """Seconds that the first trial of settings takes longer than others: an engine's build."""


class _CandidateError(Exception):
    """The candidate does not work; of the reference's errors nothing is known here."""


class Search:
    """Looks for the fastest settings; `best` is right at any moment, also after an interruption.

    Args:
        trials: Measures.
        axes: What is searched, in this order, again and again until nothing gets better.
        budget_s: Ends the search; the last trial may exceed it.
        say: Is told of every comparison.
        clock: Seconds.
    """

    def __init__(
        self,
        trials: Trials,
        axes: Sequence[Axis],
        budget_s: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.best = DEFAULTS
        self.comparisons: list[Comparison] = []
        self.is_out_of_time = False
        """Whether settings were left untried because the budget was used."""
        self._trials = trials
        self._axes = axes
        self._say = say
        self._clock = clock
        self._end = clock() + budget_s
        self._baseline = 0.0
        """Rows per second of the defaults in the beginning."""
        self._comparison_s = 0.0
        """What a comparison with all its turns takes, about."""

    @property
    def num_trials(self) -> int:
        """Trials in all comparisons."""
        return sum(2 * len(comparison.rates) for comparison in self.comparisons)

    @property
    def has_judged(self) -> bool:
        """Whether anything was compared to the end; if not, the defaults are no finding."""
        return any(not c.verdict.startswith((NO_TIME, NOT_TRIED)) for c in self.comparisons)

    @property
    def confirmed(self) -> bool:
        """Whether the last comparison has confirmed `best`."""
        return bool(self.comparisons) and self.comparisons[-1].verdict == "confirmed"

    @property
    def rates(self) -> tuple[float, float]:
        """Rows per second of the defaults and of the best settings."""
        if self.confirmed:
            last = self.comparisons[-1]
            return median(last.reference_rates), median(last.rates)
        factor = 1.0
        if self.best != DEFAULTS:
            accepted = [c.gain or 0.0 for c in self.comparisons if c.verdict == "accepted"]
            factor = prod(1 + gain for gain in accepted)
        return self._baseline, self._baseline * factor

    def run(self, seeds: Sequence[LaneSettings] = ()) -> None:
        """Search until nothing gets better or the budget is used, then confirm.

        Args:
            seeds: Settings to try before all others, such as those of an earlier tuning.
        """
        self._begin()
        for seed in seeds:
            self._try(seed)
        refused: set[LaneSettings] = set()
        while self._pass(refused):
            pass
        if self.best != DEFAULTS:
            self._confirm()

    def _begin(self) -> None:
        """See that the defaults work, and what a trial takes: the first includes a start."""
        started = self._clock()
        self._trials.measure(DEFAULTS)
        warm = self._clock()
        self._baseline = self._trials.measure(DEFAULTS)
        trial_s = self._clock() - warm
        self._comparison_s = (warm - started) + 2 * NUM_TURNS * trial_s
        self._say(f"{DEFAULTS}: {self._baseline:,.0f} rows/s")

    def _pass(self, refused: set[LaneSettings]) -> bool:
        """Every axis once, uphill from where it stands; whether anything got better."""
        before = self.best
        for axis in self._axes:
            for values in _directions(axis, getattr(self.best, axis.setting)):
                start = self.best
                for value in values:
                    change: dict[str, Any] = {
                        axis.setting: None if value == axis.default else value
                    }
                    candidate = replace(self.best, **change)
                    if candidate in refused or not self._try(candidate):
                        refused.add(candidate)
                        break
                if self.best != start:
                    break  # uphill this way: the other way is down
        return self.best != before

    def _try(self, candidate: LaneSettings) -> bool:
        """Compare with the best; the candidate is the best afterwards if it is accepted."""
        confirmation_s = self._comparison_s
        needed_s = self._comparison_s + confirmation_s
        if candidate == self.best or self.is_out_of_time:
            return False
        if not self._is_time_for(needed_s):
            self.is_out_of_time = True
            self._say(f"the budget does not hold another comparison of {self._comparison_s:.0f} s")
            return False
        if not self._is_time_for(needed_s + (setup_s := self._trials.setup_s(candidate))):
            self._note(candidate, [], f"{NOT_TRIED}: its engine takes about {setup_s:,.0f} s")
            return False
        turns: list[tuple[float, float]] = []
        try:
            for turn in islice(self._turns(candidate, self.best), NUM_TURNS):
                turns.append(turn)
                if turn[0] <= turn[1] or not self._is_time_for(confirmation_s):
                    break
        except _CandidateError as error:
            self._note(candidate, turns, f"failed: {error}")
            return False
        verdict = judge(turns)
        self._note(candidate, turns, verdict)
        if verdict == "accepted":
            self.best = candidate
        return verdict == "accepted"

    def _confirm(self) -> None:
        """Compare the best with the defaults, whatever the turns bring."""
        turns = []
        for turn in islice(self._turns(self.best, DEFAULTS), NUM_TURNS):
            turns.append(turn)
            if not self._is_time_for(0):
                break
        is_confirmed = len(turns) > NUM_TURNS // 2 and exceeds_noise(turns)
        verdict = "confirmed" if is_confirmed else "not confirmed"
        self._note(self.best, turns, verdict, DEFAULTS)
        if verdict != "confirmed":
            self.best = DEFAULTS

    def _turns(
        self, candidate: LaneSettings, reference: LaneSettings
    ) -> Iterator[tuple[float, float]]:
        """Rates of candidate and reference; who goes first alternates: machines warm up."""
        while True:
            theirs = self._trials.measure(reference)
            yield self._measure(candidate), theirs
            ours = self._measure(candidate)
            yield ours, self._trials.measure(reference)

    def _measure(self, candidate: LaneSettings) -> float:
        try:
            return self._trials.measure(candidate)
        except (EngineError, PipelineError) as error:
            raise _CandidateError(str(error)) from error

    def _is_time_for(self, seconds: float) -> bool:
        return self._clock() + seconds < self._end

    def _note(
        self,
        candidate: LaneSettings,
        turns: Sequence[tuple[float, float]],
        verdict: str,
        reference: LaneSettings | None = None,
    ) -> None:
        comparison = Comparison(
            candidate=candidate,
            reference=self.best if reference is None else reference,
            rates=tuple(ours for ours, _ in turns),
            reference_rates=tuple(theirs for _, theirs in turns),
            verdict=verdict,
        )
        self.comparisons.append(comparison)
        gain = "" if comparison.gain is None else f"{comparison.gain:+.1%}, "
        self._say(f"{candidate}: {gain}{verdict}")


def judge(turns: Sequence[tuple[float, float]]) -> str:
    """`accepted` when a candidate won all turns by more than the noise; else why not.

    Args:
        turns: Rates of the candidate and of the reference; it ends with the first lost turn.
    """
    if turns and turns[-1][0] <= turns[-1][1]:
        return "lost a turn"
    if len(turns) < NUM_TURNS:
        return NO_TIME
    return "accepted" if exceeds_noise(turns) else "within the noise"


def exceeds_noise(turns: Sequence[tuple[float, float]]) -> bool:
    """Whether the median gain is larger than what the reference differs from itself."""
    reference = [theirs for _, theirs in turns]
    noise = (max(reference) - min(reference)) / 2 / median(reference)
    return median(ours / theirs - 1 for ours, theirs in turns) > max(noise, MIN_GAIN)


def _directions(axis: Axis, given: float | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Values above the present one, nearest first, and those below it."""
    present = axis.default if given is None else given
    above = tuple(value for value in axis.values if value > present)
    below = tuple(value for value in reversed(axis.values) if value < present)
    return above, below
