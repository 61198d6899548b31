"""What fp32's answers to real rows say of a model that no engine could score with."""

from __future__ import annotations

from engines.answer import no_logits
from engines.gate import Answers, finite_rows
from engines.model import ModelSpec
from engines.runner import LOGITS

SUM_TOLERANCE = 1e-3
"""Of a row's probabilities: some models clip them, and float32 rounds the sum of a thousand."""


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
