"""A rubric: the criteria, their anchors in words and the instructions, as data with a hash."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.record import Record, validate
from layerloop.components.schema.yaml_text import read_yaml

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
    """Criteria, instructions and questions in words. `sha256` is of the file's bytes and goes into every score row."""

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


@functools.lru_cache(maxsize=8)
def load_rubric(name: str) -> Rubric:
    """The rubric of that name in this package, or of the YAML file at that path.

    Keys beyond a rubric's own are the methods' questions; which there are and which must be is the methods' to check
    (`methods.rubric_of`).

    Raises:
        LayerloopError: no such rubric, not YAML, or a missing or wrong key.
    """
    shipped = resources.files("layerloop.components.judge").joinpath("rubrics")
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise LayerloopError(f"recipe.judge.rubric is {name}: that file does not exist")
        data = path.read_bytes()
    else:
        entry = shipped.joinpath(f"{name}.yaml")
        if "/" in name or not entry.is_file():
            known = ", ".join(
                sorted(e.name.removesuffix(".yaml") for e in shipped.iterdir() if e.name.endswith(".yaml"))
            )
            raise LayerloopError(f"recipe.judge.rubric is {name!r}: choose {known}, or the path of a .yaml file")
        data = entry.read_bytes()
    value = read_yaml(data, what=f"rubric {name}")
    if not isinstance(value, dict) or {"sha256", "texts"} & value.keys():
        raise LayerloopError(f"rubric {name} is not a mapping of a rubric's keys: start from rubrics/default.yaml")
    others = value.keys() - Rubric.model_fields.keys()
    texts = {key: value.pop(key) or "" for key in others if isinstance(value[key], str | None)}
    return validate(Rubric, {**value, "texts": texts, "sha256": hashlib.sha256(data).hexdigest()}, where="rubric")
