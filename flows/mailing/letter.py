"""What a mail says, before it is HTML or plain text: both are made of the same blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.report_tiles import Tile

Mood = Literal["good", "odd", "bad", ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names and their values."""

    title: str
    facts: tuple[tuple[str, str], ...]
    lead: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """Sentences, one below the other."""

    title: str
    notes: tuple[str, ...]
    mood: Mood = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One line of a chart."""

    name: str
    share: float
    """Length of the bar, from 0 to 1."""
    cells: tuple[str, ...]
    """The numbers behind the bar."""
    mood: Mood = ""
    is_strong: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Bars with their numbers."""

    title: str
    heads: tuple[str, ...]
    """Of the names, then of the cells; the bars have none."""
    bars: tuple[Bar, ...]
    lead: str = ""


Block = Facts | Notes | Chart


@dataclass(frozen=True, kw_only=True, slots=True)
class Letter:
    """A mail without addresses."""

    subject: str
    headline: str
    lead: str
    mood: Mood
    blocks: tuple[Block, ...]
    eyebrow: str
    """Above the headline: what the mail is about."""
    tiles: tuple[Tile, ...] = ()
