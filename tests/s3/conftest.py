"""A running S3 server, or a skip that says how to get one."""

import importlib.util
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

SERVERS = Path(__file__).resolve().parents[1] / "servers"
FOLDER = Path(os.environ.get("S3_DIR", "/tmp/granary-s3"))
ENDPOINT = f"http://127.0.0.1:{os.environ.get('S3_PORT', '18080')}"


def answers() -> bool:
    try:
        urllib.request.urlopen(ENDPOINT, timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


class Server:
    """The gateway in front of the storage: what a client sees die and come back."""

    @staticmethod
    def kill() -> None:
        pid_file = FOLDER / "run" / "client.rgw.pid"
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while answers() and time.monotonic() < deadline:
            time.sleep(0.05)

    @staticmethod
    def start() -> None:
        subprocess.run([SERVERS / "s3_up.sh", "gateway"], check=True, stdout=subprocess.DEVNULL, timeout=120)


@pytest.fixture(scope="session")
def server() -> Server:
    if not answers():
        pytest.skip(f"no S3 server at {ENDPOINT}: tests/servers/s3_up.sh starts one (make test-s3)")
    os.environ |= {
        "AWS_ENDPOINT_URL": ENDPOINT,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "GRANARY_RETRY_SECONDS": "60",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return Server()


@pytest.fixture(scope="session")
def bucket(server: Server) -> str:
    """A new bucket."""
    s3fs = pytest.importorskip("s3fs", reason="pip install 'granary-sae[s3]'")
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    return name


@pytest.fixture(params=["obstore", "fsspec"])
def url(request: pytest.FixtureRequest, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new folder in the bucket, reached through each of the two clients."""
    if request.param == "fsspec":
        find = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name == "obstore" else find(name, *rest)
        )
    else:
        pytest.importorskip("obstore", reason="pip install 'granary-sae[s3]'")
    return f"s3://{bucket}/{uuid.uuid4().hex[:8]}/store"
