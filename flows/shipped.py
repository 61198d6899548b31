"""Find the YAML files that come with the product, in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def shipped_config(name: str) -> str:
    """Path of `configs/<name>`; the wheel carries that folder as `flows/configs`."""
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / name).is_file():
            return str(folder / name)
    raise ConfigError(
        f"{name}: not among the shipped configs; expected it. Install nightscore again."
    )
