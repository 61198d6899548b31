"""Secrets are masked wherever an address or the environment could put one into a sentence."""

from __future__ import annotations

import pickle

import pytest

from engines.errors import EngineCorruptError
from engines.masking import SECRET_NAME, has_credentials, masked
from pipeline.config import Job
from pipeline.errors import StorageError

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://AKIA:{SECRET}@bucket/in", "s3://***@bucket/in"),
        ("at http://user:hunter2@host:9000/b?x=1: no", "at http://***@host:9000/b?x=1: no"),
        ("https://token@host/x", "https://***@host/x"),
        (
            "GET https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIA%2F1&X-Amz-Date=2026&"
            "X-Amz-Signature=0a1b2c",
            "GET https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Date=2026&"
            "X-Amz-Signature=***",
        ),
        ("'https://h/p?sig=ab%3D&se=2026'", "'https://h/p?sig=***&se=2026'"),
        ("https://h/p?a=1&access_token=abc", "https://h/p?a=1&access_token=***"),
    ],
)
def test_what_an_address_gives_away_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert has_credentials(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/in/dt=2026-11-20/a@b.parquet",
        "http://127.0.0.1:8333/bucket/a@b",
        "/data/a:b@c.parquet",
        "mail to ops@example.com about s3://bucket",
        "https://aws.amazon.com/ec2/pricing/?signed=no",
        "s3://bucket/a: 12 rows; expected 13@once",
    ],
)
def test_ordinary_addresses_stay_as_they_are(text: str) -> None:
    assert masked(text) == text
    assert not has_credentials(text)


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"],
)
def test_secrets_of_the_environment_are_masked_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    assert masked(f"the key {SECRET}, refused") == "the key ***, refused"


def test_a_secret_that_begins_with_another_one_is_masked_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_TOKEN", SECRET)
    monkeypatch.setenv("B_TOKEN", f"{SECRET}-and-more")
    assert masked(f"{SECRET}-and-more") == "***"


def test_where_a_secret_is_kept_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SHARED_CREDENTIALS_FILE", "TOKEN_URL"):
        monkeypatch.setenv(name, "/var/run/identity")
    monkeypatch.setenv("SHORT_PASSWORD", "rows")
    assert masked("12 rows of /var/run/identity") == "12 rows of /var/run/identity"


@pytest.mark.parametrize("kind", [StorageError, EngineCorruptError])
def test_errors_never_hold_a_secret_and_survive_the_way_to_the_parent(
    kind: type[Exception],
) -> None:
    error = kind(f"s3://AKIA:{SECRET}@bucket: refused.")
    assert str(error) == "s3://***@bucket: refused."
    assert SECRET not in repr(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_no_key_of_a_job_is_taken_for_a_secret() -> None:
    def names(model: type) -> list[str]:
        found = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            kinds = getattr(field.annotation, "__args__", (field.annotation,))
            found += [name, *(n for k in kinds if hasattr(k, "model_fields") for n in names(k))]
        return found

    keys = names(Job)
    assert "shard_rows" in keys
    assert not [key for key in keys if SECRET_NAME.search(key)]
