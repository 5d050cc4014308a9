"""Shared by the methods of phase 1: the parts of a request that show one candidate."""

from __future__ import annotations

from typing import Any

from layerloop.components.judge.forms import is_candidate_label
from layerloop.components.judge.images import CandidateImages, EncodedImage
from layerloop.components.judge.requests import LAYER, RECOMPOSITION, SOURCE


def candidate_parts(source: EncodedImage, candidate: CandidateImages) -> list[str | EncodedImage]:
    """Source, recomposition and every layer on every backdrop, each after its label."""
    parts: list[str | EncodedImage] = [SOURCE, source, RECOMPOSITION, candidate.recomposition]
    for backdrop, layers in candidate.layers.items():
        for index, image in enumerate(layers):
            position = "background" if index == 0 else "top" if index == len(layers) - 1 else "middle"
            parts += [LAYER.format(index=index, count=len(layers), place=position, backdrop=backdrop), image]
    return parts


def without_candidate_label(answer: Any) -> Any:
    """The scores of {"candidate_1": {...}}, as a judge answers that saw grids before; other answers as they are."""
    labelled = [item for key, item in answer.items() if is_candidate_label(key)] if isinstance(answer, dict) else []
    if len(labelled) != 1 or any(isinstance(item, int | float) for item in answer.values()):
        return answer
    return labelled[0]
