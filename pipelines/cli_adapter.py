"""`layerloop publish` and `adapter`: trained adapters. Torch's work, so processes of their own do it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from layerloop.pipelines.cli_parser import command


def add_adapter_commands(commands: Any) -> None:
    """Add them to the command line."""
    publish = command(commands, "publish", _publish, "publish a campaign's adapter, also to the Hugging Face hub")
    publish.add_argument("campaign", metavar="URI", help="folder or s3://bucket/prefix of the campaign")
    publish.add_argument(
        "--publish-as", default="", metavar="NAME", help="folder under published/ (default: campaign and iteration)"
    )
    publish.add_argument("--iteration", type=int, default=None, metavar="N", help="whose adapter (default: the head)")
    publish.add_argument(
        "--hub", default="", metavar="OWNER/NAME", help="upload it there; HF_TOKEN has the token (default: no upload)"
    )
    publish.add_argument("--private", action="store_true", help="a repository that is made is private")
    adapter = commands.add_parser("adapter", help="work with trained adapters").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    merge = command(adapter, "merge", _adapter_merge, "write the weighted sum of adapters as one, in both layouts")
    merge.add_argument(
        "out", metavar="OUT", help="folder to make, with peft/ and diffusers' pytorch_lora_weights.safetensors"
    )
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="folder, file or URI, either layout; weight 1 if none"
    )
    merge.add_argument("--rank", type=int, default=None, metavar="N", help="cut the sum to this rank (default: exact)")


def _publish(arguments: argparse.Namespace) -> int:
    line = [sys.executable, "-m", "layerloop.components.publish_adapter.hub", arguments.campaign]
    line += ["--publish-as", arguments.publish_as] if arguments.publish_as else []
    line += [] if arguments.iteration is None else ["--iteration", str(arguments.iteration)]
    line += ["--hub", arguments.hub] if arguments.hub else []
    return subprocess.run(line + ["--private"] * arguments.private, check=False).returncode


def _adapter_merge(arguments: argparse.Namespace) -> int:
    adapters = [_fetched(text) for text in arguments.adapters]
    line = [sys.executable, "-m", "layerloop.components.policy.merge", arguments.out, *adapters]
    rank = [] if arguments.rank is None else ["--rank", str(arguments.rank)]
    return subprocess.run([*line, *rank], check=False).returncode


def _fetched(adapter: str) -> str:
    """`URI=WEIGHT` with a local copy in the URI's place; anything else as it is, for the merge to judge."""
    from layerloop.components.storage.folders import local_adapter

    uri, mark, weight = adapter.rpartition("=")
    if not mark:
        uri, weight = adapter, "1"
    try:
        float(weight)
    except ValueError:
        return adapter
    if "://" not in uri:
        return adapter
    folder = local_adapter(uri)
    print(f"{uri} is in {folder}", flush=True)
    return f"{folder}={weight}"
