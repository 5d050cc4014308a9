"""Fixtures that several packages' tests share: a real S3 server, a store of either kind, and a tiny base model."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from warm_python import VARIABLE, WarmPython

from .campaigns import save_tiny_base


def _stack(context: int = 0) -> list[inspect.FrameInfo]:
    """The callers by name, `inspect.stack()` without their sources.

    Every setting of a KFP task asks for its caller's name with it (kfp 2.17). With every library loaded, looking up the
    source file of one of pytest-xdist's frames reads the names of six thousand modules.
    """
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames


inspect.stack = _stack

# Packages are compiled and read hundreds of times; libyaml writes and reads the same ten times as fast.
yaml.SafeDumper, yaml.Dumper = yaml.CSafeDumper, yaml.CDumper  # type: ignore[misc]
yaml.dump.__defaults__ = (None, yaml.CDumper)
yaml.dump_all.__defaults__ = (None, yaml.CDumper, *yaml.dump_all.__defaults__[2:])
yaml.safe_load = functools.partial(yaml.load, Loader=yaml.CSafeLoader)
yaml.safe_load_all = functools.partial(yaml.load_all, Loader=yaml.CSafeLoader)

BUCKET = "layerloop-tests"
# The fast half: folders whose tests need neither torch nor whole runs, without what needs an S3 server and two files of
# many seconds.
FAST = ("judge", "layers", "schema", "storage")
SERVERS = {"s3_environment", "rclone"}
NOT_FAST = ("test_judge_endpoints.py", "test_hostile.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="store the values of tests/invariant anew (make golden)")


def pytest_configure(config: pytest.Config) -> None:
    """One warm Python for all processes of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="warm-")  # a socket's path may have a hundred letters
        warm = WarmPython(folder)
        os.environ[VARIABLE] = warm.python
        config.add_cleanup(lambda: (warm.stop(), shutil.rmtree(folder)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Libraries and tests stay until the end: the collector of garbage need not go through them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast half, `make fast`. Whole runs go first: else one process ends alone with them."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in FAST and item.path.name not in NOT_FAST and not _needs_a_server(item):
            item.add_marker(pytest.mark.fast)


def _needs_a_server(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    of_s3 = call is not None and any(value == "s3" for value in call.params.values() if isinstance(value, str))
    return of_s3 or bool(SERVERS & set(getattr(item, "fixturenames", ())))


@contextlib.contextmanager
def served(arguments: list[str], port: int, log: Path, *, seconds: float = 150) -> Iterator[None]:
    """A server in its own process, from the moment it accepts connections until the end of the block."""
    with log.open("wb") as output, subprocess.Popen(arguments, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + seconds
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{arguments[0]} did not start: {log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(timeout=10)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that lead boto3, here and in subprocesses, to a moto server with an empty bucket."""
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing-id",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    server = str(Path(__file__).with_name("s3_server.py"))
    log = tmp_path_factory.mktemp("moto") / "server.log"
    with served([sys.executable, server, str(port)], port, log), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield environment


@pytest.fixture
def s3_bucket(s3_environment: dict[str, str]) -> Iterator[str]:
    """An `s3://bucket/prefix` URI that no other test uses.

    What the test leaves there goes with it: for a list of a few keys moto looks at every key of the bucket.
    """
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}"
    server = s3_environment["AWS_ENDPOINT_URL"]
    for method, path in (("POST", "moto-api/reset"), ("PUT", BUCKET)):
        with urllib.request.urlopen(urllib.request.Request(f"{server}/{path}", method=method)):
            pass


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty store: the test runs once in a local folder and once on S3."""
    return str(tmp_path / "store") if request.param == "folder" else str(request.getfixturevalue("s3_bucket"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained layered model, for tests that leave it as it is."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def draw_image() -> Callable[..., Image.Image]:
    """Smooth colour with shapes, another for every seed."""

    def make(seed: int = 0, width: int = 96, height: int = 64) -> Image.Image:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width] / max(height, width)
        image = np.stack([a * x + b * y + c for a, b, c in rng.uniform(-0.6, 0.6, (3, 3))], axis=-1) + 0.5
        for centre_x, centre_y, radius in rng.uniform(0.1, 0.6, (4, 3)):
            image[(x - centre_x) ** 2 + (y - centre_y) ** 2 < (radius / 3) ** 2] = rng.uniform(size=3)
        return Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))

    return make
