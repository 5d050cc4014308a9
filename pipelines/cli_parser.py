"""The command line's parser, and the options that several commands have."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from layerloop.components.runtime.parser import OneLineParser, meant
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.steps import STEPS


class Parser(OneLineParser):
    """The parser of `layerloop` and of its commands."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's; a command that there is none of is refused with the one that is close."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"no command {value!r}{meant(value, action.choices) or _step(value)}")
        super()._check_value(action, value)


def command(commands: Any, name: str, handler: Any, summary: str, examples: str = "") -> argparse.ArgumentParser:
    """Add a command: its handler is called with the parsed arguments, `summary` is its line in lists and its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def set_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """--set, of values of the recipe and the runtime."""
    help_ = f"change a value of the recipe or the runtime, such as judge.model=Qwen/Qwen3.5-9B{more} (may be repeated)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_)


def runtime_option(parser: argparse.ArgumentParser) -> None:
    """--runtime FILE."""
    help_ = "YAML: where and how fast, as `layerloop runtime` prints it (default: LAYERLOOP_RUNTIME, then its defaults)"
    parser.add_argument("--runtime", default="", metavar="FILE", help=help_)


WORKERS = 2  # where nobody says


def counts_options(parser: argparse.ArgumentParser, *, workers: int | None = WORKERS) -> None:
    """--iterations and --workers, which is `workers` where it is not given."""
    parser.add_argument(
        "--iterations", type=at_least_one, default=3, metavar="N", help="iterations of one run (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=at_least_one,
        default=workers,
        metavar="N",
        help=f"processes here, pods on a cluster, that share an iteration's rollouts (default: {WORKERS})",
    )


def need_kfp(command: str) -> None:
    """Refuse in one line where kfp is not installed, in an image of the steps for instance.

    Raises:
        LayerloopError: it is not.
    """
    for module in ("kfp", "kfp.kubernetes"):
        if importlib.util.find_spec("kfp") is None or importlib.util.find_spec(module) is None:
            raise LayerloopError(f"{command} needs {module}, which is not here: pip install 'layerloop[pipelines]'")


def at_least_one(text: str) -> int:
    """The value of an option that counts: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text}: choose 1 or more")
    return int(text)


def _step(word: str) -> str:
    """Where a step is that a command was taken for: `evaluate` for `evaluate_adapter`."""
    found = [name for name in STEPS if name.startswith(word.replace("-", "_"))]
    return f": that step is python -m layerloop.components.{found[0]}" if found else ""
