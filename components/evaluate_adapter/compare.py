"""`python -m layerloop.components.evaluate_adapter.compare`: the work of `layerloop compare`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.cases import read_cases
from layerloop.components.evaluate_adapter.systems import (
    as_json,
    as_markdown,
    compare_systems,
    is_evaluation,
    measure_folder,
    read_evaluation,
    write_sources,
)
from layerloop.components.evaluate_adapter.systems_page import as_html
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.campaign import Campaign


def run(campaign: str, systems: Sequence[str], *, sources: str = "", output: str = "") -> None:
    """Print the table of some systems on a campaign's cases, or write the pictures for other programs.

    Args:
        campaign: root URI of the campaign whose held-out designs and pictures are the cases.
        systems: NAME=URI each, the folder of an evaluation or a local folder of layers (systems.py).
        sources: folder to write the cases' pictures into.
        output: file to write the table to as well: .json, a page (.html), or Markdown.

    Raises:
        LayerloopError: no system, a system that is none, or none that was evaluated.
    """
    opened = Campaign.open(campaign)
    given = dict(_named(text) for text in systems)
    if len(given) != len(systems):
        raise LayerloopError("two systems have one name: give each its own")
    if not given and not sources:
        raise LayerloopError("no system is given: name one or more as NAME=URI, or write the pictures with --sources")
    cases = read_cases(opened, opened.sources())
    if sources:
        print(f"{write_sources(cases, Path(sources))} pictures are in {sources}")
    if not given:
        return
    rows: dict[str, Sequence[Row]] = {}
    base: Sequence[Row] = ()
    for name, uri in given.items():
        if is_evaluation(uri):
            of_base, rows[name] = read_evaluation(uri)
            base = base or of_base
        else:
            rows[name] = measure_folder(Path(uri), cases, max_edits=opened.recipe.evaluation.max_edits)
    if not base:
        raise LayerloopError("none of the systems is an evaluation, which has the base's numbers: name one of them")
    table = compare_systems(base, rows, seed=opened.recipe.seed)
    text = as_markdown(table, list(rows))
    print(text, end="")
    if output:
        document = json.dumps(as_json(table), indent=2, sort_keys=True, allow_nan=False) + "\n"
        if output.endswith((".html", ".htm")):
            document = as_html(table, list(rows), campaign=opened.recipe.name).decode()
        elif not output.endswith(".json"):
            document = text
        Path(output).write_text(document, encoding="utf-8")


def _named(text: str) -> tuple[str, str]:
    name, equals, uri = text.partition("=")
    if not equals or not name or not uri:
        raise LayerloopError(f"system {text!r} is not NAME=URI: write it as LayerD=path/to/its/output")
    return name, uri


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="layerloop compare")
    parser.add_argument("campaign")
    parser.add_argument("systems", nargs="*")
    parser.add_argument("--sources", default="")
    parser.add_argument("--output", default="")
    arguments = parser.parse_args(argv)
    try:
        run(arguments.campaign, arguments.systems, sources=arguments.sources, output=arguments.output)
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
