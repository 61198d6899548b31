"""The ladder: every candidate of a device judged against fp32 and raced; the fastest safe one wins.

From the top: int8; int8 but for the layers that cannot bear it (mixed), looked for only when int8
misses the gate; then fp16 on a GPU, and fp32 on a CPU or where nothing else passes. Nothing that
misses the gate is chosen, and nothing that is slower than a rung of higher precision.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from engines.candidates import Candidate, CandidateFactory, batch_size_for
from engines.devices import Device, this_cpu
from engines.errors import AccuracyError, OutOfDeviceMemoryError, raise_if_short
from engines.export import fixed_batch
from engines.fp32 import reference_answers
from engines.gate import (
    MIN_ROWS,
    Accuracy,
    Answers,
    GateSpec,
    answered,
    compare,
    race,
    run_rows,
    say_unanswered,
)
from engines.load import make_runner, probe_answer
from engines.manifest import Rung
from engines.model import ModelSpec, shown
from engines.runner import Array, Runner

log = logging.getLogger(__name__)

RUNGS = {
    "cpu": (
        ("openvino", "int8"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
        ("onnxruntime", "fp32"),
    ),
    "gpu": (
        ("tensorrt", "int8"),
        ("tensorrt", "fp16"),
        ("torch", "fp16"),
    ),
}
LAST_RUNGS = {"cpu": (), "gpu": (("tensorrt", "fp32"), ("torch", "fp32"))}
"""Tried one by one where nothing else passes: fp16 rounds the rows too, ids above 2,048 and
incomes, say."""
MOST_SHRUNK = 16
"""A batch that is so much smaller is no remedy for a lack of memory: a build takes minutes."""
FEWER_BITS = "weights of 7 bits: without VNNI, sums of products with 8 are cut off"
TOO_FEW = f"expected {MIN_ROWS} to judge int8 by. Later, `score engine build --force` builds again"
"""An engine serves all nights, also those with more rows."""
RANKING_ROWS = 16
"""Calibration rows on which layers are ranked; the order is all that is wanted of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Rows that no scale was taken from."""

    rows: Array
    labels: Array | None
    """float64 [rows], NaN where a row has none; None without a label column."""

    def take(self, wanted: Array) -> HeldOut:
        """Some of the rows: bool [rows]."""
        labels = None if self.labels is None else self.labels[wanted]
        return HeldOut(rows=self.rows[wanted], labels=labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The engine that is to be stored, and why."""

    candidate: Candidate
    rung: Rung
    rungs: tuple[Rung, ...]
    reason: str
    probe: tuple[float, ...]
    reference: Candidate
    """fp32, with which all were compared."""


@dataclass(kw_only=True, slots=True)
class _Step:
    """A candidate on its way: what is known of it so far."""

    runtime: str
    precision: str
    candidate: Candidate | None = None
    runner: Runner | None = None
    """Left open for the race, on a CPU."""
    accuracy: Accuracy | None = None
    probe: tuple[float, ...] = ()
    rows_per_s: float = 0.0
    error: str | None = None
    note: str | None = None
    float_layers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.precision}"


class Ladder:
    """One climb.

    Args:
        spec: The model.
        factory: Makes its candidates.
        gate: What must be reached.
        held_out: Rows to judge with.
        device: What the engine is for.
        opened: Closes the runners that the climb leaves open.
    """

    def __init__(
        self,
        spec: ModelSpec,
        factory: CandidateFactory,
        gate: GateSpec,
        held_out: HeldOut,
        device: Device,
        opened: ExitStack,
    ) -> None:
        self._spec = spec
        self._factory = factory
        self._gate = gate
        self._held_out = held_out
        self._device = device
        self._opened = opened
        self._steps: list[_Step] = []

    def climb(self, batch_size: int | None) -> Choice:
        """Try every rung, and choose; int8 only where there are rows enough to judge it by.

        Args:
            batch_size: Rows of a batch; None: what suits the device.

        Raises:
            ModelError: The model cannot be exported, or does not fit its description.
            AccuracyError: No candidate passes, or fp32 itself has no answer to any row.
            MemoryError, OSError: The machine is short of something just now.
        """
        wanted = batch_size_for(self._spec, self._device, batch_size, self._factory.core)
        cpu = this_cpu(self._device.num_threads)
        reference_batch = batch_size_for(self._spec, cpu, None, self._factory.core)
        found = reference_answers(self._factory, self._held_out.rows, reference_batch, cpu)
        self._held_out = self._held_out.take(found.ran)
        reference = found.answers
        num_rows, rungs = self._look_at(reference), RUNGS[self._device.kind]
        self._factory.say(f"measuring {len(rungs)} candidates on {num_rows:,} held-out rows")
        for runtime, precision in rungs:
            step = _Step(runtime=runtime, precision=precision)
            if precision == "int8" and num_rows < MIN_ROWS:
                step.error = f"{num_rows} held-out rows; {TOO_FEW}"
                self._steps.append(step)
            else:
                self._climb_to(step, wanted, reference)
        self._mix(wanted, reference)
        for runtime, precision in LAST_RUNGS[self._device.kind]:
            if not any(map(self._passes, self._steps)):
                self._climb_to(_Step(runtime=runtime, precision=precision), wanted, reference)
        self._race()
        return self._choose(found.candidate)

    def _look_at(self, reference: Answers) -> int:
        """Count the rows that can be judged by, and say once what cannot.

        Raises:
            AccuracyError: There is no such row.
        """
        known, labels = answered(reference), self._held_out.labels
        say_unanswered(known, "held-out")
        against_itself = compare(self._spec.head, reference, reference, labels)
        if labels is not None and against_itself.metric is None:
            log.warning(
                "labels (%s): fp32 tells them no better than chance, so that the task's metric is "
                "not judged; expected labels of what the model answers.",
                self._gate.label,
            )
        return against_itself.num_rows

    def _runner(self, candidate: Candidate, device: Device) -> Runner:
        return make_runner(
            candidate.runtime, candidate.graph, candidate.input, candidate.outputs, device
        )

    def _climb_to(self, step: _Step, batch_size: int, reference: Answers) -> None:
        """Make, open and judge a candidate, in smaller batches where memory is short."""
        self._steps.append(step)
        if step.precision in ("int8", "mixed") and self._device.weight_bits == 7:
            step.note = FEWER_BITS
        smallest = max(1, batch_size // MOST_SHRUNK)
        while True:
            try:
                self._judge(step, batch_size, reference)
                return
            except OutOfDeviceMemoryError as error:
                if batch_size // 2 < smallest or fixed_batch(self._factory.core) is not None:
                    step.error = shown(error)
                    return
                step.note = f"batches of {batch_size // 2}: {batch_size} do not fit into memory"
                log.warning("%s: %s", step.name, step.note)
                batch_size //= 2
            except Exception as error:  # a runtime may refuse a graph in its own way
                raise_if_short(error)
                step.error = shown(error)
                log.warning("%s: left out: %s", step.name, step.error)
                return

    def _judge(self, step: _Step, batch_size: int, reference: Answers) -> None:
        held_out = self._held_out
        step.candidate = self._factory.make(
            step.runtime, step.precision, batch_size, step.float_layers
        )
        with ExitStack() as opened:
            runner = opened.enter_context(self._runner(step.candidate, self._device))
            answers = run_rows(runner, held_out.rows)
            step.probe = probe_answer(runner)
            step.accuracy = compare(self._spec.head, reference, answers, held_out.labels)
            if self._device.kind == "cpu":  # a GPU's memory is for one candidate at a time
                step.runner = runner
                self._opened.push(opened.pop_all())

    def _race(self) -> None:
        """Measure the rates: on a CPU in turns, as its cores are shared; on a GPU one by one."""
        rows = self._held_out.rows
        ran = [step for step in self._steps if step.accuracy is not None]
        together = {step.name: step.runner for step in ran if step.runner is not None}
        rates = race(together, rows, self._device.num_threads) if together else {}
        for step in ran:
            assert step.candidate is not None
            if step.name in rates:
                step.rows_per_s = rates[step.name]
                continue
            try:
                with self._runner(step.candidate, self._device) as runner:
                    step.rows_per_s = race({step.name: runner}, rows)[step.name]
            except Exception as error:  # as above
                raise_if_short(error)
                step.accuracy, step.error = None, shown(error)

    def _passes(self, step: _Step) -> bool:
        return step.accuracy is not None and not step.accuracy.failures(self._gate)

    def _mix(self, batch_size: int, reference: Answers) -> None:
        """Where int8 runs but misses the gate: keep the worst layers in float until it passes."""
        int8 = [step for step in self._steps if step.precision == "int8" and step.accuracy]
        if not int8 or any(map(self._passes, int8)):
            return
        layers: tuple[str, ...] = ()
        problem = None
        try:
            layers = self._find_float_layers(reference) or ()
        except Exception as error:  # a graph that cannot be made or run must not end the climb
            raise_if_short(error)
            problem = shown(error)
        for step in int8:
            mixed = _Step(runtime=step.runtime, precision="mixed", float_layers=layers)
            if layers:
                self._climb_to(mixed, batch_size, reference)
            else:
                mixed.error = problem or "half of the layers in float are not enough"
                self._steps.append(mixed)

    def _find_float_layers(self, reference: Answers) -> tuple[str, ...] | None:
        from engines.sensitivity import fewest_float_layers

        factory = self._factory
        ranked = factory.ranked_layers(RANKING_ROWS)
        cpu = this_cpu(self._device.num_threads)
        batch_size = batch_size_for(self._spec, cpu, None, factory.core)

        def passes(layers: Sequence[str]) -> bool:
            with factory.simulation(self._device, batch_size, layers) as runner:
                answers = run_rows(runner, self._held_out.rows)
            accuracy = compare(self._spec.head, reference, answers, self._held_out.labels)
            return not accuracy.failures(self._gate)

        factory.say("int8 misses the gate: looking for the layers that cannot bear it")
        return fewest_float_layers(ranked, passes)

    def _choose(self, reference: Candidate) -> Choice:
        rungs = tuple(self._rung(step) for step in self._steps)
        passed = [step for step in self._steps if self._passes(step)]
        if not passed:
            failed = "; ".join(f"{rung.name}: {rung.error or 'missed the gate'}" for rung in rungs)
            raise AccuracyError(
                f"no engine passes the gate ({failed}); expected one. Look at these reasons, the "
                "model's answers (all finite?) and `engine.gate`."
            )
        best = max(passed, key=lambda step: step.rows_per_s)
        assert best.candidate is not None
        rung = self._rung(best)
        return Choice(
            candidate=best.candidate,
            rung=rung,
            rungs=rungs,
            reason=explain(rung, rungs),
            probe=best.probe,
            reference=reference,
        )

    def _rung(self, step: _Step) -> Rung:
        failures = step.accuracy.failures(self._gate) if step.accuracy else ()
        return Rung(
            runtime=step.runtime,
            precision=step.precision,
            batch_size=step.candidate.input.shape[0] if step.candidate else 0,
            rows_per_s=step.rows_per_s,
            accuracy=step.accuracy,
            passed=step.accuracy is not None and not failures,
            failures=failures,
            error=step.error,
            note=step.note,
            float_layers=step.float_layers,
        )


def explain(chosen: Rung, rungs: Sequence[Rung]) -> str:
    """Why a rung was chosen, in one sentence."""
    others = [rung for rung in rungs if rung.passed and rung.precision != chosen.precision]
    text = f"{chosen.name}, the fastest of {sum(rung.passed for rung in rungs)} that pass the gate"
    text += f" ({chosen.rows_per_s:,.0f} rows/s"
    if others:
        next_best = max(others, key=lambda rung: rung.rows_per_s)
        if next_best.rows_per_s > 0:
            text += f", {chosen.rows_per_s / next_best.rows_per_s:.2f} x {next_best.name}"
    text += ")"
    if chosen.float_layers:
        text += f"; in float: {', '.join(chosen.float_layers)}"
    for rung in rungs:
        if rung.failures:
            text += f"; {rung.name} missed the gate: {', '.join(rung.failures)}"
        elif rung.error:
            text += f"; {rung.name} failed: {rung.error}"
    return text
