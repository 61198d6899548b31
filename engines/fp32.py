"""fp32 on the CPU: what all engines are compared with, and what is wrong with a model itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from engines.answer import no_logits
from engines.candidates import Candidate, CandidateFactory
from engines.devices import Cpu
from engines.errors import AccuracyError, ModelError, raise_if_short
from engines.gate import Answers, finite_rows, run_rows
from engines.load import make_runner
from engines.lone_rows import run_apart
from engines.model import ModelSpec, shown
from engines.runner import LOGITS, Array, Runner

REFERENCE = ("onnxruntime", "fp32")
"""On a CPU a candidate itself."""
SUM_TOLERANCE = 1e-3
"""Of a row's probabilities: some models clip them, and float32 rounds the sum of a thousand."""
NUM_AGAIN = 16
"""Rows that are answered again, or a few more."""
ROUNDING = (1e-3, 1e-5)
"""Of an answer: of what answers differ by, and of how large they are."""
DYNAMIC = "DynamicQuantize"
"""Begins the names of operators that take a scale from the whole batch."""
MOST_JUMPS = 0.25
"""Share of rows whose answer may jump by rounding alone, as a step function's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What all are compared with."""

    candidate: Candidate
    answers: Answers
    """To the rows that it could be run with."""
    ran: npt.NDArray[np.bool_]
    """Which of the rows these are: bool [rows]."""


def reference_answers(
    factory: CandidateFactory, rows: Array, batch_size: int, cpu: Cpu
) -> Reference:
    """fp32 on the CPU and its answers; whatever is wrong with the model shows here.

    Raises:
        ModelError: The model cannot be exported, does not fit its description, or answers what
            no head can read.
        AccuracyError: ONNX Runtime cannot run it with any row.
    """
    try:
        found = factory.make(*REFERENCE, batch_size)
        with make_runner(found.runtime, found.graph, found.input, found.outputs, cpu) as runner:
            answers, ran = run_apart(partial(run_rows, runner), rows)
            refuse_neighbours(factory, runner, rows[ran], answers)
        refuse_probabilities(factory.spec, answers)
        return Reference(candidate=found, answers=answers, ran=ran)
    except ModelError:
        raise
    except Exception as error:  # the runtime may raise anything
        raise_if_short(error)
        raise AccuracyError(
            f"{' '.join(REFERENCE)}: {shown(error)}; expected it to run, to compare with."
        ) from error


def refuse_probabilities(spec: ModelSpec, answers: Answers) -> None:
    """The head's softmax would make wrong probabilities of what are probabilities already.

    Whatever operators a model ends in, logits of real rows do not all add up to 1.

    Raises:
        ModelError: They do, and none is negative.
    """
    if LOGITS not in answers:
        return
    logits = answers[LOGITS][finite_rows(answers[LOGITS])]
    is_share = logits.min(initial=0) >= 0 and (abs(logits.sum(axis=1) - 1) <= SUM_TOLERANCE).all()
    if len(logits) and is_share:
        raise no_logits(spec, "its answers to each row add up to 1")


def refuse_neighbours(
    factory: CandidateFactory, runner: Runner, rows: Array, answers: Answers
) -> None:
    """Answer some rows again beside others: their answers must stay what they were.

    Args:
        factory: Of the model.
        runner: Of fp32.
        rows: That it can be run with.
        answers: What it answered to them.

    Raises:
        ModelError: They do not, as of a model that was exported in training mode: its BatchNorm
            takes the mean of the batch, and its dropout answers anew each time. Or as of one
            that ONNX Runtime's `quantize_dynamic` made: it rounds by the batch's range.
    """
    # At most half of the rows: among all of them, a row might meet the same ones again.
    some = slice(None, None, max(2, len(rows) // NUM_AGAIN))
    name = LOGITS if LOGITS in answers else "score"
    again = run_rows(runner, rows[some])[name]
    first, again = (
        np.where(np.isfinite(a), a, 0).astype(np.float64) for a in (answers[name], again)
    )
    tolerance = ROUNDING[0] * np.ptp(first, axis=0) + ROUNDING[1] * abs(first).max(axis=0)
    differs = (abs(again - first[some]) > tolerance).any(axis=1)
    if differs.mean() > MOST_JUMPS:
        why, what_to_do = ", or on chance", "Export the model in eval mode."
        if any(node.op_type.startswith(DYNAMIC) for node in factory.core.graph.node):
            why = f": its activations are scaled by batch ({DYNAMIC}Linear)"
            what_to_do = "Name the float model instead; int8 is made from it."
        raise ModelError(
            f"model {factory.spec.source}: a row's answer depends on the rows beside it{why}; "
            f"expected each row on its own. {what_to_do}"
        )
