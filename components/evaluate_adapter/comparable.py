"""Whether evaluations belong into one table: the same base, sampled the same way, by the same definitions, on the
campaign's cases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.cases import Cases
from layerloop.components.layers.columns import DEFINITIONS
from layerloop.components.schema.errors import LayerloopError

# Of an evaluation's provenance what its base's numbers follow from, in a reader's words.
_SETTINGS: Mapping[str, str] = {
    "base_fingerprint": "base",
    "dtype": "dtype",
    "prompt": "prompt",
    "sampler": "sampler",
    "steps": "number of steps",
    "guidance": "guidance",
}
NOW = "this version of layerloop"


@dataclass(frozen=True)
class Evaluation:
    """A committed evaluation as it was read: its rows, and what its `metrics.json` says of how they came about."""

    base: Sequence[Row]
    tuned: Sequence[Row]
    definitions: Mapping[str, str]
    provenance: Mapping[str, Any]


def parse_metrics(data: bytes, *, where: str) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """(definitions, provenance) of a `metrics.json`.

    Raises:
        LayerloopError: it is none.
    """
    try:
        document: Any = json.loads(data)
        definitions, provenance = document["definitions"], document["provenance"]
    except (ValueError, KeyError, TypeError):
        definitions = provenance = None
    if not isinstance(definitions, dict) or not isinstance(provenance, dict):
        raise LayerloopError(f"{where} says nothing of definitions and base: give the folder of a whole evaluation")
    return definitions, provenance


def identity(row: Row) -> tuple[Any, ...]:
    """What pairs the rows of two systems: kind, image, layers and seed."""
    return tuple(row[name] for name in ("kind", "key", "layers", "seed"))


def check_comparable(
    evaluations: Mapping[str, Evaluation], cases: Cases, *, measured_now: bool, sampled: Mapping[str, Any] | None
) -> list[str]:
    """Notes on evaluations that can be compared, a line each: cases that one lacks, definitions of before.

    Args:
        evaluations: by the system's name.
        cases: of the campaign.
        measured_now: whether other systems are measured by this version's definitions.
        sampled: what is known of the settings by which other systems are sampled on the campaign's base; None where
            none is.

    Raises:
        LayerloopError: another base, settings, definitions, or none of the cases; the line names both systems.
    """
    settings = {name: evaluation.provenance for name, evaluation in evaluations.items()}
    if sampled is not None:
        settings["the campaign"] = sampled
    for key, words in _SETTINGS.items():
        _same({name: some[key] for name, some in settings.items() if key in some}, words)
    texts = {name: evaluation.definitions for name, evaluation in evaluations.items()}
    if measured_now:
        texts[NOW] = DEFINITIONS
    _same_definitions(texts)
    notes = list(_cases_lacking(evaluations, cases))
    first = next(iter(evaluations.values()), None)
    if first is not None and (changed := _changed(first.definitions, DEFINITIONS)):
        notes.append(
            f"measured by earlier definitions of {', '.join(changed)}: see each metrics.json, not this version"
        )
    return notes


def _same(values: Mapping[str, Any], words: str) -> None:
    names = list(values)
    for name in names[1:]:
        if values[name] != values[names[0]]:
            one, other = (str(values[which])[:12] for which in (names[0], name))
            raise LayerloopError(
                f"{names[0]} and {name} have another {words} ({one} and {other}): a table is of one base, sampled one "
                "way; compare them apart"
            )


def _same_definitions(texts: Mapping[str, Mapping[str, str]]) -> None:
    names = list(texts)
    for name in names[1:]:
        if changed := _changed(texts[names[0]], texts[name]):
            old = next((which for which in (names[0], name) if _changed(texts[which], DEFINITIONS)), name)
            raise LayerloopError(
                f"{names[0]} and {name} have other definitions of {', '.join(changed)}: evaluate {old} again"
            )


def _changed(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What both define, and not alike."""
    return [name for name in one if name in other and one[name] != other[name]]


def _cases_lacking(evaluations: Mapping[str, Evaluation], cases: Cases) -> Iterable[str]:
    """A line for each evaluation without some of the campaign's cases, or with others.

    Raises:
        LayerloopError: one has none of them.
    """
    wanted = {(case.kind, case.key, case.layers, case.seed) for case in cases.cases}
    for name, evaluation in evaluations.items():
        found = {identity(row) for row in evaluation.tuned}
        if not found & wanted:
            raise LayerloopError(
                f"{name} has none of the campaign's {len(wanted)} cases: evaluate it on the same images and seed"
            )
        if found != wanted:
            others = f" and {len(found - wanted)} others" if found - wanted else ""
            yield f"{name} has {len(found & wanted)} of the campaign's {len(wanted)} cases{others}"
