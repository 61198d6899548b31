"""What the `mail` section of a job file may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.job_file import load_job
from tests.conftest import write_job
from tests.pipeline.pipeline_cases import job_data

SECTION = {"to": ["me@example.com"], "from": "score@example.com", "host": "mail.example.com"}


def load(folder: Path, **changes: Any) -> Any:
    section = {key: value for key, value in {**SECTION, **changes}.items() if value is not None}
    return load_job(str(write_job(folder / "job.yaml", {**job_data(folder), "mail": section}))).mail


def test_three_keys_are_enough(tmp_path: Path) -> None:
    mail = load(tmp_path)
    assert (mail.to, mail.sender) == (("me@example.com",), "score@example.com")
    assert (mail.security, mail.port) == ("starttls", None)
    assert mail.when == ("published", "failed", "warning")


@pytest.mark.parametrize(
    "address",
    [
        "me@example.com",
        "Me <me@example.com>",
        '"Me, myself" <me@example.com>',
        "M\N{LATIN SMALL LETTER E WITH ACUTE} <me@example.com>",
    ],
)
def test_an_address_may_have_a_name(tmp_path: Path, address: str) -> None:
    assert load(tmp_path, to=[address]).to == (address,)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "me",
        "me@",
        "@example.com",
        "me@example.com, you@example.com",
        "me@example.com\r\nBcc: you@example.com",
        "Me\nBcc: you <me@example.com>",
        "m\N{LATIN SMALL LETTER E WITH ACUTE}@example.com",
    ],
)
@pytest.mark.parametrize("key", ["to", "from"])
def test_what_is_no_address_or_more_than_one_is_refused(
    tmp_path: Path, key: str, address: str
) -> None:
    with pytest.raises(ConfigError, match=rf"mail\.{key}.*expected one address"):
        load(tmp_path, **{key: [address] if key == "to" else address})


def test_it_names_a_server_or_a_block_and_not_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exactly one of `host` and `prefect_block`"):
        load(tmp_path, host=None)
    with pytest.raises(ConfigError, match="exactly one of `host` and `prefect_block`"):
        load(tmp_path, prefect_block="night")
    assert load(tmp_path, host=None, prefect_block="night").prefect_block == "night"


def test_a_password_does_not_belong_into_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mail\.password: a secret in the job"):
        load(tmp_path, password="horse")


def test_keys_are_known_by_the_names_that_the_file_uses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Known keys: to, from, host"):
        load(tmp_path, sender="me@example.com")
