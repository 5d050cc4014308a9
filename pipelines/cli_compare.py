"""`layerloop compare`: adapters and other programs' layers side by side on one campaign's cases."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from layerloop.pipelines.cli_parser import command

EXAMPLES = """examples:
  layerloop compare campaigns/mine --sources pictures
  layerloop compare campaigns/mine head=campaigns/mine/evaluations/iteration-000025 \\
      uncalibrated=campaigns/plain/evaluations/iteration-000025 \\
      released=StabilityLabs/Stable-Layers LayerD=layerd-output -o tables.md

A system is NAME=URI, one of
- the folder of an evaluation, of this campaign or of another one with the same images and seed;
- an adapter: a folder, a URI or an id of the hub. It is sampled on this campaign's base, on a GPU where there is one;
- a local folder with the layers that a program made of the pictures that --sources wrote. KEY is the name of such a
  file without its .png: KEY/0.png, KEY/1.png ... bottom first, or KEY.psd with normal layers, masks and opacities.

All are of one base and one way of sampling, measured by the same definitions: anything else is refused.

The output is one table of all measures, and tables in the shape of the paper's 1, 2 and 4.
"""


def add_compare_command(commands: Any) -> None:
    """Add `compare` to the command line."""
    summary = "adapters and other programs' layers side by side, in one table"
    parser = command(commands, "compare", compare_command, summary, EXAMPLES)
    parser.add_argument("campaign", metavar="CAMPAIGN", help="whose held-out designs and pictures are the cases")
    parser.add_argument("systems", nargs="*", metavar="NAME=URI", help="an evaluation, an adapter, or layers")
    parser.add_argument("--sources", default="", metavar="DIR", help="write the pictures here, for other programs")
    parser.add_argument(
        "-o", "--output", default="", metavar="FILE", help="also write the table here: .md, .json, or a page, .html"
    )
    parser.add_argument(
        "--runtime", default="", metavar="FILE", help="where and how fast to sample adapters: a YAML file"
    )


def compare_command(arguments: argparse.Namespace) -> int:
    """Run it, in a process of the step's: the command line knows a step only by its declaration."""
    line = [sys.executable, "-m", "layerloop.components.evaluate_adapter.compare"]
    options = [f"--{name}={getattr(arguments, name)}" for name in ("sources", "output", "runtime")]
    return subprocess.run([*line, *options, arguments.campaign, *arguments.systems], check=False).returncode
