"""Requests to the judge: labelled images, a question, and the JSON that must come back.

The question and the reading of its answer belong to a judge method (`methods/`); here is the part that all methods
share. The order inside a request is: the rubric (the same for a campaign), the source image (the same for a group),
then the candidate's own images. So a server whose prefix caching works for its model computes the shared part of a
group once (`layerloop judge check` measures it). Nothing that an image shows is ever copied into the words.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerloop.components.judge.images import EncodedImage
from layerloop.components.judge.logprobs import TokenProbabilities
from layerloop.components.judge.rubric import Rubric

# These words are hashed into `prompt_sha256` and into the keys of stored replies: a change makes campaigns pay again.
SOURCE = "Source picture:"
RECOMPOSITION = "Recomposition of all layers:"
LAYER = "Layer {index} of {count} ({place}), on {backdrop}:"
GRID = "Grid on {backdrop}: {rows} rows, the decompositions 1 to {rows} from top to bottom; {columns} columns, {names}:"
FIRST = "First judgements:"
FORM = "Answer with one JSON object of this form and nothing else:"
WORDING = (SOURCE, RECOMPOSITION, LAYER, GRID, FIRST, FORM)

Scores = list[dict[str, float]]  # one dict per row, criterion -> [0, 1]


@dataclass(frozen=True)
class AnswerFormat:
    """Where the answer to a request is in a reply and how it is read: the reading half of a judge method.

    Attributes:
        key: Of the answer in the reply's JSON object.
        read: The JSON value under `key` -> scores of every row. Raises UnusableError.
        by_candidate: The value holds an entry per row ({"candidate_1": ...} or a list), not one per criterion.
        decimals: Numbers may have decimals, so that one at the end of a truncated reply may lack digits.
        expected: Replaces sampled scores by their expected values under the tokens' probabilities, and counts those
            that it could not; None where scores span several tokens.
    """

    key: str
    read: Callable[[Request, Any], Scores]
    by_candidate: bool = False
    decimals: bool = False
    expected: Callable[[Request, TokenProbabilities, Scores], tuple[Scores, int]] | None = None


@dataclass(frozen=True)
class Request:
    """One question to the judge.

    `parts` are the user message in order, words and images; `names` are the criteria; `rows` is the number of
    candidates asked about; `questions` is the number of checklist questions of each criterion.
    """

    kind: str  # name of the JSON schema; hashed
    label: str  # human-readable: which candidate or group; not sent
    system: str
    parts: tuple[str | EncodedImage, ...]
    schema: dict[str, Any]
    names: tuple[str, ...]
    answer: AnswerFormat
    rows: int = 1
    questions: dict[str, int] = field(default_factory=dict)
    max_tokens: int = 1024

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what is asked: words, image hashes and schema (not model or sampling, which the client adds)."""
        parts = [part if isinstance(part, str) else {"png": part.sha256} for part in self.parts]
        text = json.dumps([self.kind, self.system, parts, self.schema, self.max_tokens], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(isinstance(part, EncodedImage) for part in self.parts)

    def payload(self, options: dict[str, Any]) -> bytes:
        """The JSON body of a chat completion request: `options` and the messages, images as data URLs.

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


def prompt_sha256(rubric: Rubric, wording: Iterable[str] = ()) -> str:
    """Hash of all words that a judge is sent: the rubric's file, the labels, and `wording` that methods add to them."""
    return hashlib.sha256(json.dumps([rubric.sha256, *WORDING, *wording]).encode()).hexdigest()


# ---------------------------------------------------------------------------------- parts that several methods build on


def grid_parts(grids: Mapping[str, EncodedImage], rows: int, layers: int) -> list[str | EncodedImage]:
    """Each grid after its label; `grids` is backdrop -> the same grid on that backdrop."""
    columns = ", ".join(["the recomposition", *(f"layer {i}" for i in range(layers))])
    parts: list[str | EncodedImage] = []
    for backdrop, grid in grids.items():
        parts += [GRID.format(backdrop=backdrop, rows=rows, columns=layers + 1, names=columns), grid]
    return parts


def json_object(properties: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def answer_schema(
    key: str, answer: dict[str, Any], shape: Any, *, observations: bool = False
) -> tuple[dict[str, Any], str]:
    """The JSON schema of the reply, and the same in words for judges that are not held to a schema.

    Args:
        key: Of the answer in the reply.
        answer: JSON schema of the answer.
        shape: The answer's form as an example.
        observations: Let the judge write what it sees first.
    """
    properties: dict[str, Any] = {"observations": {"type": "string"}} if observations else {}
    example: dict[str, Any] = {"observations": "what you see, in at most 60 words"} if observations else {}
    return json_object({**properties, key: answer}), f"{FORM}\n{json.dumps({**example, key: shape})}"
