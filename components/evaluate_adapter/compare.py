"""`python -m layerloop.components.evaluate_adapter.compare`: the work of `layerloop compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.cases import Cases, read_cases
from layerloop.components.evaluate_adapter.comparable import check_comparable, identity
from layerloop.components.evaluate_adapter.other_adapters import BASE, is_adapter, sample_adapters
from layerloop.components.evaluate_adapter.paper_tables import paper_tables, tables_markdown
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
from layerloop.components.runtime.parser import OneLineParser
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.campaign import Campaign

OUTPUTS = (".md", ".json", ".html")


def run(campaign: str, systems: Sequence[str], *, sources: str = "", output: str = "", runtime: str = "") -> None:
    """Print the table of some systems on a campaign's cases, and tables in the shape of the paper's; or write the
    pictures for other programs.

    Args:
        campaign: root URI of the campaign whose held-out designs and pictures are the cases.
        systems: NAME=URI each: the folder of an evaluation, an adapter (a folder, a URI or an id of the hub), which is
            sampled on the campaign's base, or a local folder of layers (systems.py).
        sources: folder to write the cases' pictures into.
        output: file to write the tables to as well: .json, a page (.html), or Markdown.
        runtime: where and how fast to sample; it changes no result.

    Raises:
        LayerloopError: no system, or a system that is none, or nothing that has the base's numbers, or an output of a
            kind that is not written.
    """
    opened = Campaign.open(campaign, runtime)
    given = dict(_named(text) for text in systems)
    if len(given) != len(systems):
        raise LayerloopError("two systems have one name: give each its own")
    if BASE in given:
        raise LayerloopError(f"system {BASE} is the campaign's base itself: give {given[BASE]} another name")
    if not given and not sources:
        raise LayerloopError("no system is given: name one or more as NAME=URI, or write the pictures with --sources")
    if output and Path(output).suffix not in OUTPUTS:
        raise LayerloopError(f"--output is {output}: give it one of the suffixes {', '.join(OUTPUTS)}")
    if output and not Path(output).absolute().parent.is_dir():
        raise LayerloopError(f"--output is {output}: its folder is not there, make it first")
    cases = read_cases(opened, opened.sources())
    if sources:
        with _written(sources):
            print(f"{write_sources(cases, Path(sources))} pictures are in {sources}")
    if not given:
        return
    rows, base = _rows_of(opened, cases, given)
    table = compare_systems(base, rows, seed=opened.recipe.seed)
    shaped = paper_tables(table, list(rows))
    text = f"{as_markdown(table, list(rows))}\n{tables_markdown(shaped)}"
    print(text, end="")
    if output:
        document = json.dumps(as_json(table), indent=2, sort_keys=True, allow_nan=False) + "\n"
        if output.endswith(".html"):
            document = as_html(table, list(rows), shaped, campaign=opened.recipe.name).decode()
        elif not output.endswith(".json"):
            document = text
        with _written(output):
            Path(output).write_text(document, encoding="utf-8")


@contextmanager
def _written(path: str) -> Iterator[None]:
    """Raises LayerloopError where what is written within this context cannot be."""
    try:
        yield
    except OSError as error:
        raise LayerloopError(f"{path} cannot be written ({error.strerror}): give another path") from None


def _rows_of(
    campaign: Campaign, cases: Cases, given: Mapping[str, str]
) -> tuple[dict[str, Sequence[Row]], Sequence[Row]]:
    """The rows of every system, and those of the base. What cannot be compared is refused before anything is measured
    or sampled."""
    adapters = {name: uri for name, uri in given.items() if is_adapter(uri)}
    evaluations = {
        name: read_evaluation(uri) for name, uri in given.items() if name not in adapters and is_evaluation(uri)
    }
    measured = len(evaluations) < len(given)
    expected = _settings(campaign) if adapters else None
    for note in check_comparable(evaluations, cases, measured_now=measured, sampled=expected):
        log(note)
    rows: dict[str, Sequence[Row]] = {}
    base: Sequence[Row] = ()
    wanted = {(case.kind, case.key, case.layers, case.seed) for case in cases.cases}
    for name, uri in given.items():
        if name in evaluations:
            rows[name] = [row for row in evaluations[name].tuned if identity(row) in wanted]
            base = base or [row for row in evaluations[name].base if identity(row) in wanted]
        elif name not in adapters:
            rows[name] = measure_folder(Path(uri), cases, max_edits=campaign.recipe.evaluation.max_edits)
    if adapters:
        sampled = sample_adapters(campaign, cases, adapters)
        base = base or sampled.pop(BASE)
        rows |= {name: sampled[name] for name in adapters}
    if not base:
        raise LayerloopError(
            "none of the systems is an evaluation or an adapter, with which the base's numbers come: name one of them"
        )
    return {name: rows[name] for name in given}, base


def _settings(campaign: Campaign) -> dict[str, Any]:
    """How the campaign samples, as an evaluation's provenance says it; the base where a policy says which it was."""
    recipe = campaign.recipe
    known = {"dtype": recipe.model.dtype, "prompt": recipe.model.prompt, "steps": recipe.evaluation.steps}
    fingerprint = campaign.policy(campaign.head()).metadata.get("base_fingerprint")
    return known | ({"base_fingerprint": fingerprint} if fingerprint else {})


def _named(text: str) -> tuple[str, str]:
    name, equals, uri = text.partition("=")
    if not equals or not name or not uri:
        raise LayerloopError(f"system {text!r} is not NAME=URI: write it as LayerD=path/to/its/output")
    return name, uri


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = OneLineParser(prog="layerloop compare")
    parser.add_argument("campaign")
    parser.add_argument("systems", nargs="*")
    parser.add_argument("--sources", default="")
    parser.add_argument("--output", default="")
    parser.add_argument("--runtime", default="")
    arguments = parser.parse_args(argv)
    try:
        run(
            arguments.campaign, arguments.systems,
            sources=arguments.sources, output=arguments.output, runtime=arguments.runtime,
        )  # fmt: skip
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
