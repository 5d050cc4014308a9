"""`layerloop decompose`: pictures into layered files. Torch's work, so a process of its own does it."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli_parser import command

EXAMPLES = """\
examples:
  layerloop decompose photo.jpg -o layers                       with the model that can run here
  layerloop decompose posters/ -o layers --adapter owner/name   with an adapter of the Hugging Face hub
  layerloop decompose a.png b.png -o layers --adapter campaigns/mine --layers auto --drop-blank

A folder for each picture appears in OUT: PNG layers, recomposition.png, index.html, PSD, PPTX, ZIP and layers.json.
Run the same command again to continue; what is made is kept. Status 1: some pictures failed, the others are made.
"""


def add_decompose_command(commands: Any) -> None:
    """Add `decompose` to the command line."""
    from layerloop.components.schema.decomposition import FORMATS, MOST_LAYERS

    parser = command(commands, "decompose", _decompose, "decompose pictures into layered files", EXAMPLES)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders or s3:// URIs")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--adapter",
        metavar="FOLDER|ID",
        help="an adapter's folder or file, a campaign, s3://..., or a hub id owner/name",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--recipe", metavar="NAME|FILE", help="model, resolution and steps of a recipe")
    model.add_argument("--base", metavar="ID|FOLDER", help="the base model: tiny, a hub id, a folder or s3://...")
    parser.add_argument(
        "--layers", default="4", metavar="N|auto", help=f"1..{MOST_LAYERS}, or auto (default: %(default)s)"
    )
    parser.add_argument("--sampler", choices=("heun", "euler"), default="heun", help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="sampling steps (default: of the recipe; 50 for Qwen-Image-Layered)"
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance; 1 is none (default: 1)"
    )
    parser.add_argument(
        "--resolution", type=int, metavar="N", help="longest side for the model (default: of the recipe)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--drop-blank", action="store_true", help="leave blank layers out")
    parser.add_argument(
        "--formats",
        default=",".join(FORMATS),
        metavar="A,B",
        help="layers.json and some of these (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures of one size at once (default: by model)")


def _decompose(arguments: argparse.Namespace) -> int:
    from layerloop.components.schema.decomposition import DecomposeOptions
    from layerloop.pipelines.inputs import recipe_text

    names = (
        "adapter",
        "base",
        "sampler",
        "steps",
        "guidance",
        "resolution",
        "seed",
        "drop_blank",
        "batch_size",
        "layers",
    )
    recipe = recipe_text(arguments.recipe) if arguments.recipe else None
    try:
        options = DecomposeOptions.of(
            **{name: getattr(arguments, name) for name in names},
            recipe=recipe,
            formats=tuple(dict.fromkeys(arguments.formats.split(","))),
        )
    except LayerloopError as error:  # as they are typed, not as they are called in Python
        typed = re.sub(r"\boptions\.(\w+)", lambda found: f"--{found[1].replace('_', '-')}", str(error))
        raise LayerloopError(typed) from None
    line = [sys.executable, "-m", "layerloop.components.decompose", arguments.output, options.model_dump_json()]
    return subprocess.run([*line, *arguments.pictures], check=False).returncode
