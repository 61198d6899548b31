"""What a backfill has done and spent, so that the same command goes on where it stopped.

    <job>/_backfills/<first>_<last>/begun.json           when it began, and the dates that it lacked
                                    <date>-<token>.json  how one try at a date ended, and its cost

All of it is create-only. The try that published a date says what all of its attempts cost. The
report says it where nobody noted such a try; a version that is scored later is not the backfill's.
Where the tries before say more than either, they count.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.ledger import list_notes, read_notes, utc_now
from pipeline.publish import find_report
from pipeline.storage import Storage

BEGUN = "begun.json"
DONE = frozenset({"published", "already_published"})
"""How tries end that find their date published, or publish it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """One try at a date that ended."""

    date: str
    status: str
    usd: float
    """That it cost; of a published date, that all of its attempts did."""
    ended_at: str
    """ISO 8601, UTC."""


class BackfillLog:
    """The log of the backfill of a period; any number of processes may write to it.

    Args:
        output: Of the job.
        job: Its name.
        first: ISO date.
        last: ISO date.
    """

    def __init__(self, output: Storage, job: str, first: str, last: str) -> None:
        self._output = output
        self._job = job
        self._folder = f"{job}/_backfills/{first}_{last}"

    def begin(self, missing: Sequence[str]) -> str:
        """Write down that a backfill begins that lacks these dates, unless one has begun.

        Returns:
            When it began.
        """
        begun = {"began_at": utc_now(), "dates": list(missing)}
        self._output.create(f"{self._folder}/{BEGUN}", json.dumps(begun).encode())
        return str(self._begun()["began_at"])

    def note(self, date: str, status: str, usd: float) -> None:
        """Write down how a try at a date ended."""
        entry = Try(date=date, status=status, usd=usd, ended_at=utc_now())
        path = f"{self._folder}/{date}-{uuid.uuid4().hex[:12]}.json"
        self._output.create(path, json.dumps(asdict(entry)).encode())

    def spent(self) -> dict[str, float]:
        """Dollars by date, since it began; dates that were published before are not in it."""
        tried: defaultdict[str, float] = defaultdict(float)
        whole: dict[str, float] = {}
        for entry in self._tries():
            if entry.status in DONE:
                whole[entry.date] = max(entry.usd, whole.get(entry.date, 0.0))
            else:
                tried[entry.date] += entry.usd
        for date in set(self._begun()["dates"]) - set(whole):
            report = find_report(self._output, self._job, date)
            if report is not None:
                whole[date] = report.cost.usd
        # Tries that ended before they had an engine are in no report.
        return {date: max(tried[date], whole.get(date, 0.0)) for date in {*tried, *whole}}

    def _begun(self) -> dict[str, Any]:
        data = self._output.read(f"{self._folder}/{BEGUN}")
        return dict(json.loads(data)) if data else {"began_at": "", "dates": []}

    def _tries(self) -> list[Try]:
        paths = [info.path for info in list_notes(self._output, self._folder)]
        paths = [path for path in paths if not path.endswith(BEGUN)]
        return list(read_notes(self._output, paths, Try).values())
