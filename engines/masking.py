"""Secrets come from the environment only and go nowhere: where one could show, it is masked."""

from __future__ import annotations

import os
import re

MASK = "***"
SECRET_NAME = re.compile(
    r"secret|passw|token|credential|auth_string|(api|access|account|private)_?key", re.IGNORECASE
)
"""Names of job keys and environment variables that hold secrets."""
POINTER_NAME = re.compile(r"(file|path|ur[il]|endpoint|_id)$", re.IGNORECASE)
"""Variables that say where a secret is, or whose it is; they are none themselves."""
MIN_SECRET_CHARACTERS = 8
"""Shorter values would be found in ordinary words."""
USER_INFO = re.compile(
    r"(?<=://)([^\s/@'\"<>]+|[^\s/@:'\"<>]*:(?!\d+/)[^\s@'\"<>]*)@"  # a raw secret may have a `/`
)
QUERY_SECRET = re.compile(
    r"([?&;](?:x-amz-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid"
    r"|[\w-]*(?:token|secret|passw(?:or)?d|api_?key))=)[^&;\s'\"<>]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """`text` without what addresses tell beside a place, and without the environment's secrets.

    That is user names and passwords, and the signatures of presigned addresses.
    """
    text = USER_INFO.sub(f"{MASK}@", text)
    text = QUERY_SECRET.sub(rf"\1{MASK}", text)
    for value in _secrets_of_environment():
        text = text.replace(value, MASK)
    return text


def has_credentials(address: str) -> bool:
    """Whether a text holds an address with a password, a user name or a signature in it."""
    return bool(USER_INFO.search(address) or QUERY_SECRET.search(address))


def _secrets_of_environment() -> list[str]:
    """Longest first: one may be the beginning of another."""
    found = [
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and not POINTER_NAME.search(name)
    ]
    return sorted((v for v in found if len(v) >= MIN_SECRET_CHARACTERS), key=len, reverse=True)
