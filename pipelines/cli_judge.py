"""`layerloop judge`: the reference judge, and a check of any judge."""

from __future__ import annotations

import argparse
from typing import Any

from layerloop.pipelines.cli_parser import command


def add_judge_commands(commands: Any) -> None:
    """Add them to the command line."""
    judge = commands.add_parser("judge", help="the reference judge, and a check of any judge").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    serve = command(judge, "serve", _judge_serve, "serve the reference judge, rules that stand in for a VLM")
    serve.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    serve.add_argument("--port", type=int, default=8788, metavar="N", help="0 takes a free one (default: %(default)s)")
    fine = "its full-range variant: all of 0..5 about a single candidate, model layerloop-reference-judge-fine"
    serve.add_argument("--fine", action="store_true", help=fine)
    check = command(
        judge,
        "check",
        _judge_check,
        "send known good and bad decompositions to a judge, and say if it is fit",
        "Status 1 where it is unfit.",
    )
    check.add_argument("--model", default="", help="model to ask for (default: the only one that it serves)")
    check.add_argument("url", metavar="URL", help="base URL; key: OPENAI_API_KEY")


def _judge_serve(arguments: argparse.Namespace) -> None:
    from layerloop.components.reference_judge.identity import FINE, NAME
    from layerloop.components.reference_judge.server import serve

    serve(arguments.host, arguments.port, model=FINE if arguments.fine else NAME)


def _judge_check(arguments: argparse.Namespace) -> int:
    from layerloop.components.judge.check import check
    from layerloop.pipelines.inputs import check_judge_url

    check_judge_url(arguments.url)
    report = check(arguments.url, model=arguments.model)
    print("\n".join(report.lines()))
    return 1 if report.verdict == "unfit" else 0
