"""The `layerloop` command. It parses, imports what the command needs, and turns refusals into one line and a status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from layerloop.components.runtime.environment import open_streams, usable_environment
from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.cli_adapter import add_adapter_commands
from layerloop.pipelines.cli_campaign import add_campaign_commands
from layerloop.pipelines.cli_cluster import add_cluster_commands
from layerloop.pipelines.cli_compare import add_compare_command
from layerloop.pipelines.cli_compile import add_compile_command
from layerloop.pipelines.cli_decompose import add_decompose_command
from layerloop.pipelines.cli_judge import add_judge_commands
from layerloop.pipelines.cli_parser import Parser, command
from layerloop.pipelines.cli_recipe import add_recipe_commands
from layerloop.pipelines.cli_run import add_run_commands

DESCRIPTION = """\
Fine-tune an image layer decomposition model by reinforcement learning, as a Kubeflow pipeline or on this machine.

  layerloop demo                                     everything on embedded defaults, on this machine
  layerloop judge serve                              a judge to try with, at http://127.0.0.1:8788/v1
  layerloop run --images photos --campaign mine --judge-url http://127.0.0.1:8788/v1
                                                     the same on your own images
  layerloop continue mine --judge-url URL            more iterations of a campaign
  layerloop campaign show mine                       how far a campaign is, and its rewards
  layerloop decompose photo.jpg -o layers --adapter mine
                                                     pictures into layered files
  layerloop plan paper                               what a recipe costs: hours, GPUs, memory, judge
  layerloop compile -o pipeline.yaml                 the pipeline for a Kubeflow cluster
  layerloop submit pipeline.yaml --wait              a run of it there
"""


# What a file system says of a path that was given to write to or to read from, and the remedy.
_REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), "give another path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give one that this user may write"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 a failure, 2 bad input (one `error: ...` line), 130 interrupted."""
    open_streams()
    if argv is None:  # else `random.py` in the user's folder is what the processes that we start import
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # of nohup; else steps would outlive their terminal
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        with usable_environment():
            status = int(arguments.handler(arguments) or 0)
        sys.stdout.flush()
        return status
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "status", 2))
    except BrokenPipeError:  # `layerloop ... | head`: nobody reads on, which is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _REMEDIES or error.filename is None:
            raise
        print(f"error: {error.filename} cannot be used ({error.strerror}): {_REMEDIES[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was done is kept, run the same command to continue", file=sys.stderr)
        return 130


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def build_parser() -> argparse.ArgumentParser:
    """The command line; also what the README's commands are tested against."""
    parser = Parser(prog="layerloop", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    version = "print the version and those of what it builds on"
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_run_commands(commands)
    add_decompose_command(commands)
    add_compare_command(commands)
    campaign = add_campaign_commands(commands)
    add_adapter_commands(commands)
    add_judge_commands(commands)
    add_recipe_commands(commands)
    _add_study_command(commands)
    add_compile_command(commands)
    add_cluster_commands(commands, campaign)
    return parser


def _add_study_command(commands: Any) -> None:
    study = command(commands, "study", _study, "does it learn? arms and seeds on the tiny policy, resumable")
    study.add_argument("--folder", default="build/study", metavar="DIR", help="campaigns (default: %(default)s)")
    study.add_argument("--docs", default="docs", metavar="DIR", help="where results go (default: %(default)s)")
    study.add_argument("--arms", default="", metavar="A,B", help="only these arms (default: all)")
    study.add_argument("--iterations", type=int, default=25, metavar="N", help="of each run (default: %(default)s)")
    study.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side (default: %(default)s)")
    study.add_argument("--hours", type=float, default=4.0, metavar="X", help="stop after these (default: %(default)s)")


def _study(arguments: argparse.Namespace) -> int:
    import importlib.util

    if importlib.util.find_spec("layerloop.pipelines.research") is None:
        raise LayerloopError(
            "`layerloop study` is not installed here: run it in a checkout of layerloop, as `make study`"
        )
    from layerloop.pipelines.research.arms import ARMS
    from layerloop.pipelines.research.study import study

    return study(
        folder=Path(arguments.folder),
        docs=Path(arguments.docs),
        arms=arguments.arms.split(",") if arguments.arms else list(ARMS),
        iterations=arguments.iterations,
        jobs=arguments.jobs,
        hours=arguments.hours,
    )


class _Version(argparse.Action):
    """Print what a report of a fault needs: layerloop's version, Python's, and those of the packages it builds on."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata
        import platform

        print(f"layerloop {importlib.metadata.version('layerloop')}")
        found = [f"Python {platform.python_version()}"]
        for name in ("torch", "diffusers", "peft", "transformers", "kfp", "openai", "boto3"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{name} {importlib.metadata.version(name)}")
        print(f"{', '.join(found)}; {platform.platform()}")
        parser.exit()


if __name__ == "__main__":
    raise SystemExit(main())
