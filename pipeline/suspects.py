"""Find the rows that kill a lane's process: what it was at is tried alone, by halves."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.lane_messages import PoisonRow, Suspect

MAX_UNEXPLAINED = 2
"""Deaths in a row that no rows explain and that are survived: the next one is no accident."""
MORE_PATIENCE = 8.0
"""Healthy rows may be slow: a death as `hung` that no row explains gives the next process so many
times as long. Three of them then cover a block of 64 rows that each take all the time there is."""
MAX_POISON_ROWS = 32
"""Rows of a lane that may kill its process: with more, it is not the rows."""


class Suspects:
    """What is known of the deaths of a lane's processes.

    The next process first tries `to_try`, each entry alone in one thread. What kills it again is
    halved, down to one row, which is poison: it is never tried again. Shards that were being read
    come first; of those a row group is tried alone, and lost if it kills. A process that is killed
    from outside costs no row: whatever it was at is cleared.

    Attributes:
        patience: Times as long as at first the next process may be at rows that are not tried.
    """

    def __init__(self) -> None:
        self.to_try: list[Suspect] = []
        self.poison: list[PoisonRow] = []
        self.patience = 1.0
        self._num_unexplained = 0

    def died(self, in_work: Sequence[Suspect], reason: str, message: str) -> None:
        """Learn from a death.

        Args:
            in_work: Rows that the process was at.
            reason: Short code for quarantined rows: `crashed`, `hung` or `out_of_memory`.
            message: What was seen.
        """
        if not self.to_try:
            self._num_unexplained += 1
            self.patience *= MORE_PATIENCE if reason == "hung" else 1.0
            self.to_try = sorted(in_work, key=lambda one: not one.is_read)
            return
        suspect = self.to_try[0]
        if suspect.is_read:
            groups = [one for one in in_work if one.is_read]
            self._num_unexplained = 0 if groups else self._num_unexplained + 1
            self.poison += [_poison(one, reason, message) for one in groups]
        elif suspect not in in_work:  # it did not come that far
            self._num_unexplained += 1
        elif suspect.num_rows > 1:
            self.to_try[:1] = suspect.halves()
        else:
            del self.to_try[0]
            self.poison.append(_poison(suspect, reason, message))
            self._num_unexplained, self.patience = 0, 1.0

    def cleared(self) -> None:
        """The first suspect was scored alone, and the process lives."""
        del self.to_try[0]

    def committed(self) -> None:
        """A shard was finished: deaths before and after it need not have one cause."""
        self._num_unexplained = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether another process would only die, too."""
        return self._num_unexplained > MAX_UNEXPLAINED or len(self.poison) > MAX_POISON_ROWS


def _poison(suspect: Suspect, reason: str, message: str) -> PoisonRow:
    return PoisonRow(
        shard=suspect.shard.index,
        row=suspect.first_row,
        reason=reason,
        message=message,
        group_rows=suspect.num_rows if suspect.is_read else None,
    )
