"""The software that a run consists of, as a CycloneDX document: names, versions and licences.

Format: https://cyclonedx.org/docs/1.6/json
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

REQUIRED_NAME = re.compile(r"[A-Za-z0-9._-]+")
"""What a requirement begins with (PEP 508)."""
PRODUCT = "nightscore"
UNKNOWN_LICENCE = "NOASSERTION"
LICENCE_CLASSIFIER = "License :: OSI Approved :: "
MAX_LICENCE_NAME = 100
"""Some packages have the whole text where the name should be."""


def bill_of_materials() -> dict[str, Any]:
    """The product and all that is installed of what it requires, directly or not."""
    product = distribution(PRODUCT)
    found = {_name(PRODUCT): product}
    waiting = [product]
    while waiting:
        for name in _required(waiting.pop()):
            if name in found:
                continue
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:  # an extra that is not installed, or not for this system
                continue
            waiting.append(found[name])
    del found[_name(PRODUCT)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", **_component(product)}},
        "components": [{"type": "library", **_component(found[name])} for name in sorted(found)],
    }


def _required(package: Distribution) -> list[str]:
    """Names of what it requires; its extras count, where they are installed."""
    found = (REQUIRED_NAME.match(text) for text in package.requires or [])
    return [_name(match[0]) for match in found if match]


def _name(name: str) -> str:
    """As PyPI compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _component(package: Distribution) -> dict[str, Any]:
    name = _name(package.metadata["Name"])
    return {
        "name": name,
        "version": package.version,
        "purl": f"pkg:pypi/{name}@{package.version}",
        "licenses": [{"license": {"name": _licence(package)}}],
    }


def _licence(package: Distribution) -> str:
    fields = package.metadata.json
    if expression := fields.get("license_expression"):
        return str(expression)
    approved = [
        text.removeprefix(LICENCE_CLASSIFIER)
        for text in fields.get("classifier", [])
        if LICENCE_CLASSIFIER in text
    ]
    if approved:
        return "; ".join(approved)
    text = str(fields.get("license") or "").strip()
    return text if 0 < len(text) <= MAX_LICENCE_NAME else UNKNOWN_LICENCE
