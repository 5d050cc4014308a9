"""Requests to the judge: pictures with labels in words, a question, and the JSON that must come back.

The order inside a request is: the rubric (the same for a campaign), the source picture (the same for a group), then
what is the candidate's own. So a server with prefix caching encodes the shared part of a group once. Nothing
that a picture shows is ever copied into the words.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from layerloop.components.judge.pictures import CandidatePictures, Picture
from layerloop.components.judge.rubric import TOP, Rubric
from layerloop.components.schema.errors import LayerloopError

Kind = Literal["phase1", "checklist", "phase2", "pairwise"]

SOURCE = "Source picture:"
RECOMPOSITION = "Recomposition of all layers:"
LAYER = "Layer {index} of {count} ({place}), on {backdrop}:"
GRID = "Grid on {backdrop}: {rows} rows, the decompositions 1 to {rows} from top to bottom; {columns} columns, {names}:"
FIRST = "First judgements:"
FORM = "Answer with one JSON object of this form and nothing else:"
WORDING = (SOURCE, RECOMPOSITION, LAYER, GRID, FIRST, FORM)


@dataclass(frozen=True)
class Request:
    """One question to the judge.

    `parts` are the user message in order, words and pictures; `names` are the criteria; `rows` is the number of
    candidates asked about; `questions` is the number of checklist questions of each criterion.
    """

    kind: Kind
    label: str  # for people: which candidate or group; not sent
    system: str
    parts: tuple[str | Picture, ...]
    schema: dict[str, Any]
    names: tuple[str, ...]
    rows: int = 1
    questions: dict[str, int] = field(default_factory=dict)
    max_tokens: int = 1024

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what is asked: words, picture hashes and schema (not model or sampling, which the client adds)."""
        parts = [part if isinstance(part, str) else {"png": part.sha256} for part in self.parts]
        text = json.dumps([self.kind, self.system, parts, self.schema, self.max_tokens], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def pictures(self) -> int:
        return sum(isinstance(part, Picture) for part in self.parts)

    def payload(self, options: dict[str, Any]) -> bytes:
        """The JSON body of a chat completion request: `options` and the messages, pictures as data URLs.

        Put together from bytes, because base64 needs no escaping and a megabyte of it takes json 2 ms.
        """
        system = json.dumps({"role": "system", "content": self.system})
        head = f'{json.dumps(options)[:-1]}{", " if options else ""}"messages": [{system}'
        pieces = [head.encode(), b', {"role": "user", "content": [']
        for index, part in enumerate(self.parts):
            if index:
                pieces.append(b", ")
            if isinstance(part, str):
                pieces.append(json.dumps({"type": "text", "text": part}).encode())
            else:
                pieces += [b'{"type": "image_url", "image_url": {"url": "', part.url, b'"}}']
        pieces.append(b"]}]}")
        return b"".join(pieces)


def prompt_sha256(rubric: Rubric) -> str:
    """Of all the words that a judge is told: the rubric's file, and the labels around pictures and numbers."""
    return hashlib.sha256(json.dumps([rubric.sha256, *WORDING]).encode()).hexdigest()


def alone(
    rubric: Rubric,
    source: Picture,
    candidate: CandidatePictures,
    *,
    label: str,
    checklist: bool = False,
    observations: bool = False,
    max_tokens: int = 1024,
) -> Request:
    """Phase 1: one candidate, by the anchors or by the yes/no questions of the rubric."""
    parts: list[str | Picture] = [SOURCE, source, RECOMPOSITION, candidate.recomposition]
    for backdrop, layers in candidate.layers.items():
        for index, picture in enumerate(layers):
            place = "background" if index == 0 else "top" if index == len(layers) - 1 else "middle"
            parts += [LAYER.format(index=index, count=len(layers), place=place, backdrop=backdrop), picture]
    asked: dict[str, tuple[str, ...]] = {}
    shape: dict[str, Any]
    if checklist:
        asked = {c.name: c.checklist for c in rubric.criteria}
        if empty := [name for name, questions in asked.items() if not questions]:
            raise LayerloopError(
                f"rubric {rubric.name} has no checklist for {empty[0]}: add questions, or choose method rubric"
            )
        answer = _object(
            {name: _object({f"q{i + 1}": {"type": "boolean"} for i in range(len(q))}) for name, q in asked.items()}
        )
        shape = {name: {f"q{i + 1}": "true or false" for i in range(len(q))} for name, q in asked.items()}
        lines = [f"{name}.q{i + 1}: {text}" for name, q in asked.items() for i, text in enumerate(q)]
        words = rubric.checklist.strip() + "\n" + "\n".join(lines)
        key = "answers"
    else:
        answer = _object({name: {"type": "integer", "enum": list(range(TOP + 1))} for name in rubric.names})
        shape = dict.fromkeys(rubric.names, f"0 to {TOP}")
        words, key = rubric.phase1.strip(), "scores"
    schema, form = _answer(key, answer, shape, observations)
    return Request(
        kind="checklist" if checklist else "phase1",
        label=label,
        system=rubric.system_text(),
        parts=(*parts, f"{words}\n{form}"),
        schema=schema,
        names=rubric.names,
        questions={name: len(q) for name, q in asked.items()},
        max_tokens=max_tokens,
    )


def side_by_side(
    rubric: Rubric,
    source: Picture,
    grids: Mapping[str, Picture],
    *,
    first: Sequence[dict[str, float]],
    layers: int,
    label: str,
    observations: bool = False,
    max_tokens: int = 1024,
) -> Request:
    """Phase 2: the rows of a grid scored together.

    Args:
        rubric: What is judged.
        source: The group's source picture.
        grids: Backdrop -> the same grid on that backdrop.
        first: Phase-1 scores of each row in [0, 1], in the order of the rows.
        layers: Layers of every row.
        label: For people.
        observations: Let the judge write what it sees first.
        max_tokens: For one row; the reply's limit grows with the rows.
    """
    rows = len(first)
    names = [f"candidate_{row + 1}" for row in range(rows)]
    number = {"type": "number", "minimum": 0, "maximum": TOP}
    answer = _object({name: _object(dict.fromkeys(rubric.names, number)) for name in names})
    shape = {name: dict.fromkeys(rubric.names, f"0.0 to {TOP}.0") for name in names}
    lines = [
        f"candidate {row + 1}: " + ", ".join(f"{name} {scores[name] * TOP:.1f}" for name in rubric.names)
        for row, scores in enumerate(first)
    ]
    words = rubric.phase2.strip() + f"\n{FIRST}\n" + "\n".join(lines)
    schema, form = _answer("scores", answer, shape, observations)
    return Request(
        kind="phase2",
        label=label,
        system=rubric.system_text(),
        parts=(SOURCE, source, *_grid_parts(grids, rows, layers), f"{words}\n{form}"),
        schema=schema,
        names=rubric.names,
        rows=rows,
        max_tokens=max_tokens * rows,
    )


def pair(
    rubric: Rubric, source: Picture, grids: Mapping[str, Picture], *, layers: int, label: str, max_tokens: int = 1024
) -> Request:
    """Which of two rows is better, criterion by criterion: 1, 2, or 0 for no difference."""
    answer = _object({name: {"type": "integer", "enum": [0, 1, 2]} for name in rubric.names})
    schema, form = _answer("better", answer, dict.fromkeys(rubric.names, "0, 1 or 2"), False)
    return Request(
        kind="pairwise",
        label=label,
        system=rubric.system_text(),
        parts=(SOURCE, source, *_grid_parts(grids, 2, layers), f"{rubric.pairwise.strip()}\n{form}"),
        schema=schema,
        names=rubric.names,
        rows=2,
        max_tokens=max_tokens,
    )


def _grid_parts(grids: Mapping[str, Picture], rows: int, layers: int) -> list[str | Picture]:
    columns = ", ".join(["the recomposition", *(f"layer {i}" for i in range(layers))])
    parts: list[str | Picture] = []
    for backdrop, grid in grids.items():
        parts += [GRID.format(backdrop=backdrop, rows=rows, columns=layers + 1, names=columns), grid]
    return parts


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _answer(key: str, answer: dict[str, Any], shape: Any, observations: bool) -> tuple[dict[str, Any], str]:
    """The JSON schema of the reply, and the same in words for judges that are not held to a schema."""
    properties: dict[str, Any] = {"observations": {"type": "string"}} if observations else {}
    example: dict[str, Any] = {"observations": "what you see, in at most 60 words"} if observations else {}
    return _object({**properties, key: answer}), f"{FORM}\n{json.dumps({**example, key: shape})}"
