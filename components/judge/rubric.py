"""A rubric: the criteria, their anchors in words and the instructions, as data with a hash."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.record import Record, canonical_json, validate
from layerloop.components.schema.yaml_text import load_yaml

TOP = 5  # the anchors go from 0 to TOP


class Criterion(Record):
    """One thing that is judged, with TOP + 1 anchors (worst first) and yes/no questions for the checklist method."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)
    title: str
    weight: float = Field(default=1.0, ge=0)
    question: str
    anchors: tuple[str, ...] = Field(min_length=TOP + 1, max_length=TOP + 1)
    checklist: tuple[str, ...] = ()


class Rubric(Record):
    """Criteria, instructions and questions in words. `sha256` is of the file's bytes, or of a recipe's rubric as
    canonical JSON, and goes into every score row."""

    name: str
    version: str
    instructions: str
    criteria: tuple[Criterion, ...] = Field(min_length=1)
    texts: dict[str, str] = {}  # the methods' questions by their keys in the YAML (phase1, phase2, ...)
    sha256: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [c.name for c in self.criteria]
        if len(set(names)) != len(names):
            raise ValueError(f"rubric.criteria has names {names}: give each criterion its own")
        if not sum(c.weight for c in self.criteria) > 0:
            raise ValueError("rubric.criteria have no weight: give at least one a weight above 0")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.criteria)

    @property
    def weights(self) -> dict[str, float]:
        """Criterion -> weight, summing to 1."""
        total = sum(c.weight for c in self.criteria)
        return {c.name: c.weight / total for c in self.criteria}

    def mean(self, scores: Mapping[str, float]) -> float:
        """The weighted mean of a candidate's criteria, [0, 1]."""
        weights = self.weights
        return sum(weights[name] * scores[name] for name in weights)

    def text(self, name: str, *, method: str) -> str:
        """The question of a judge method.

        Raises:
            LayerloopError: the rubric has none; `method` says in the recipe's words what needs it.
        """
        if not (text := self.texts.get(name, "").strip()):
            raise LayerloopError(
                f"rubric {self.name} has no text {name}, which recipe.judge.{method} needs: add it, or choose another "
                "method"
            )
        return text

    def system_text(self) -> str:
        """The system message: the instructions, then every criterion with its anchors. Never depends on an image."""
        lines = [self.instructions.strip(), ""]
        for criterion in self.criteria:
            lines.append(f"{criterion.name} - {criterion.title}: {criterion.question}")
            lines += [f"  {score}: {anchor}" for score, anchor in enumerate(criterion.anchors)]
        return "\n".join(lines)


def load_rubric(rubric: str | Mapping[str, Any]) -> Rubric:
    """The rubric of that name in this package, of the YAML file at that path, or the rubric that it is itself.

    Keys beyond a rubric's own are the methods' questions; which there are and which must be is the methods' to check
    (`methods.rubric_of`).

    Raises:
        LayerloopError: no such rubric, not YAML, or a missing or wrong key.
    """
    if not isinstance(rubric, str):
        return _read(canonical_json(rubric), "of the recipe")
    shipped = resources.files("layerloop.components.judge").joinpath("rubrics")
    if is_file(rubric):
        path = Path(rubric).expanduser()
        if not path.is_file():
            raise LayerloopError(
                f"recipe.judge.rubric is {rubric}: that file does not exist; what it holds may stand in its place, as "
                "it must where pods cannot see the file"
            )
        return _read(path.read_bytes(), rubric)
    entry = shipped.joinpath(f"{rubric}.yaml")
    if "/" in rubric or not entry.is_file():
        known = ", ".join(sorted(e.name.removesuffix(".yaml") for e in shipped.iterdir() if e.name.endswith(".yaml")))
        raise LayerloopError(f"recipe.judge.rubric is {rubric!r}: choose {known}, or the path of a .yaml file")
    return _read(entry.read_bytes(), rubric)


def is_file(rubric: str) -> bool:
    """Whether a recipe's rubric is the path of a file, not the name of one of this package's."""
    return rubric.endswith((".yaml", ".yml"))


def file_content(rubric: str) -> dict[str, Any]:
    """What a rubric's file holds, checked, to stand in a recipe in its place.

    Raises:
        LayerloopError: as `load_rubric`.
    """
    load_rubric(rubric)
    return dict(load_yaml(Path(rubric).expanduser().read_bytes(), where=f"rubric {rubric}"))


@functools.lru_cache(maxsize=8)
def _read(data: bytes, name: str) -> Rubric:
    value: Any = load_yaml(data, where=f"rubric {name}")
    if not isinstance(value, dict) or {"sha256", "texts"} & value.keys():
        raise LayerloopError(f"rubric {name} is not a mapping of a rubric's keys: start from rubrics/default.yaml")
    others = value.keys() - Rubric.model_fields.keys()
    texts = {key: value.pop(key) or "" for key in others if isinstance(value[key], str | None)}
    return validate(Rubric, {**value, "texts": texts, "sha256": hashlib.sha256(data).hexdigest()}, where="rubric")
