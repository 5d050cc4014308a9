"""pytest in a fork of a process that has imported the large libraries already; see __main__.py.

This module is imported by the server that forks, so it imports neither layerloop nor pytest's plugins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Seconds of importing that each fault would pay again. Only those that the checkout imports are loaded.
PRELOADED = (
    "pytest", "yaml", "numpy", "pydantic", "PIL.Image", "torch", "safetensors.torch", "peft", "transformers",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage", "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_layered", "kfp.compiler", "kfp.kubernetes", "boto3", "openai",
    "pyarrow.parquet", "scipy.optimize", "skimage.metrics", "webdataset",
)  # fmt: skip


def run_pytest(root: str, arguments: Sequence[str], temporary: str, output: str) -> NoReturn:
    """Run pytest in the checkout copied to `root`, its packages before the installed ones; ends the process.

    Args:
        temporary: folder for the tests' own temporary folders; emptied first.
        output: file for what they print.
    """
    os.setsid()  # with the servers that tests start: one signal ends them all
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(root)
    os.environ["PYTHONPATH"] = root  # of the processes that tests start
    os.environ.pop("PYTHONWARNINGS", None)
    own = str(Path(__file__).parent)
    sys.path[:] = [root, *(path for path in sys.path if path not in (own, root))]
    sys.argv = ["pytest"]
    import pytest

    every = ["-m", "slow or not slow"]  # a fault may name a test that `make test` leaves out
    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={temporary}", *every, *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))  # threads that a test left behind hold nobody up
