"""What a backfill may spend, what it has spent, and what is set aside for dates at work."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from pipeline.report_words import usd


class Budget:
    """Dollars by date; several threads may share it.

    Args:
        max_usd: What all dates may cost; None: anything.
        spent: Dollars that were spent before, by date.
    """

    def __init__(self, max_usd: float | None, spent: Mapping[str, float]) -> None:
        self.max_usd = max_usd
        self._spent = dict(spent)
        self._reserved: dict[str, float] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"{usd(self.spent_usd)} of {usd(self.max_usd or 0)} are spent"

    @property
    def spent_usd(self) -> float:
        """On all dates."""
        with self._lock:
            return sum(self._spent.values())

    def reserve(self, date: str, expected_usd: float) -> bool:
        """Set aside what a date is expected to cost; False when there is not as much."""
        with self._lock:  # looked at and set aside at once: other threads do the same
            left_usd = self._left_for(date)
            earlier_usd = self._spent.get(date, 0.0)
            if left_usd is not None and left_usd <= earlier_usd + expected_usd:
                return False
            self._reserved[date] = expected_usd
            return True

    def left_for(self, date: str) -> float | None:
        """What all attempts at a date may cost together; None: anything."""
        with self._lock:
            return self._left_for(date)

    def _left_for(self, date: str) -> float | None:
        if self.max_usd is None:
            return None
        taken = [*self._spent.items(), *self._reserved.items()]
        return self.max_usd - sum(amount for other, amount in taken if other != date)

    def settle(self, date: str, cost_usd: float, *, is_whole: bool) -> None:
        """A date has ended.

        Args:
            date: ISO date.
            cost_usd: What it cost.
            is_whole: Whether that is what all attempts did, or to be added to earlier ones. What
                earlier ones cost is spent even if no report knows of them.
        """
        with self._lock:
            self._reserved.pop(date, None)
            earlier_usd = self._spent.get(date, 0.0)
            self._spent[date] = max(earlier_usd, cost_usd) if is_whole else earlier_usd + cost_usd
