"""Time zones by their names."""

from __future__ import annotations

from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


def find_zone(name: str) -> ZoneInfo:
    """The time zone of a name.

    Raises:
        ValueError: There is none; in words that go on after the name of a section.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # the last: a folder of zones
        raise ValueError(
            f"timezone: {name!r}; expected a name such as Europe/Zurich or UTC"
        ) from None
