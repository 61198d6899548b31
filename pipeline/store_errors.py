"""Which errors of a store mean what."""

from __future__ import annotations


def why(error: BaseException) -> str:
    """What went wrong, in a few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
