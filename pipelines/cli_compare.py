"""`layerloop compare`: adapters and other programs' layers side by side on one campaign's cases."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

EXAMPLES = """examples:
  layerloop compare campaigns/mine --sources pictures
  layerloop compare campaigns/mine head=campaigns/mine/evaluations/iteration-000025 \\
      early=campaigns/mine/evaluations/iteration-000005 uncalibrated=campaigns/plain/evaluations/iteration-000025 \\
      LayerD=layerd-output -o tables.md

A system is NAME=URI: the folder of an evaluation (of this campaign or of another one with the same images and seed), or
a local folder with the layers that a program made of each picture that --sources wrote: KEY/0.png, KEY/1.png ... bottom
first, or KEY.psd.
"""


def add_compare_command(commands: Any, command: Any) -> None:
    """Add `compare` to the command line."""
    summary = "adapters and other programs' layers side by side: one table, with wins and what is clear"
    parser = command(commands, "compare", compare_command, summary, EXAMPLES)
    parser.add_argument("campaign", metavar="CAMPAIGN", help="whose held-out designs and pictures are the cases")
    parser.add_argument("systems", nargs="*", metavar="NAME=URI", help="an evaluation, or a folder of layers")
    parser.add_argument("--sources", default="", metavar="DIR", help="write the pictures here, for other programs")
    parser.add_argument(
        "-o", "--output", default="", metavar="FILE", help="also write the table here: .md, .json, or a page, .html"
    )


def compare_command(arguments: argparse.Namespace) -> int:
    """Run it, in a process of the step's: the command line knows a step only by its declaration."""
    command = [sys.executable, "-m", "layerloop.components.evaluate_adapter.compare"]
    options = [f"--sources={arguments.sources}", f"--output={arguments.output}"]
    return subprocess.run([*command, *options, arguments.campaign, *arguments.systems], check=False).returncode
