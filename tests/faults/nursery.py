"""Steps in forks of a process that has imported everything, so that an attempt costs a second and not five.

`python tests/faults/nursery.py` reads a request a line, {"step", "arguments", "environment", "log"}, runs the step's
own command in a fork, and answers its exit status: negative, the signal that ended it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

HOOK = Path(__file__).with_name("hook")
SECONDS = 240  # after which an attempt has hung
STEPS = ("shard_dataset", "generate_rollouts", "score_rollouts", "update_lora", "evaluate_adapter", "publish_adapter",
         "train_stretch")  # fmt: skip
# What the steps import when they need it.
LATER = (
    "boto3", "boto3.s3.transfer", "s3transfer.manager", "openai", "pyarrow.parquet", "safetensors.torch", "peft",
    "PIL.Image", "scipy.optimize", "skimage.metrics",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage", "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_layered", "transformers",
    "layerloop.components.policy.lora", "layerloop.components.policy.sampling", "layerloop.components.policy.tiny",
    "layerloop.components.generate_rollouts.candidates", "layerloop.components.generate_rollouts.sharing",
    "layerloop.components.update_lora.learner", "layerloop.components.update_lora.state",
    "layerloop.components.storage.s3",
    "layerloop.components.evaluate_adapter.decompose", "layerloop.components.publish_adapter.layouts",
    "layerloop.components.publish_adapter.card",
)  # fmt: skip


def attempt(request: dict[str, Any]) -> NoReturn:
    """Run a step in this process, which ends."""
    status = 1
    try:
        os.setsid()
        signal.alarm(SECONDS)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["environment"])
        if user := request.get("user"):
            os.setgid(user)
            os.setuid(user)
        import tempfile

        tempfile.tempdir = None  # as TMPDIR says now
        sys.path.insert(0, str(HOOK))
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")  # installs itself
        step = importlib.import_module(f"layerloop.components.{request['step']}.step")
        status = step.main(argv=request["arguments"])
    except BaseException as error:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        else:
            import traceback

            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in (*LATER, *(f"layerloop.components.{step}.step" for step in STEPS)):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            attempt(json.loads(line))
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()
    os._exit(0)  # nothing is left to do, and the libraries' own end takes seconds


if __name__ == "__main__":
    main()
