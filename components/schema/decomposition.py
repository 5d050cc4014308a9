"""What may be chosen for a decomposition of pictures: the options of `layerloop decompose` and of `decompose()`."""

from __future__ import annotations

from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.record import Record, validate

Format = Literal["png", "psd", "pptx", "zip", "html"]
FORMATS: Final[tuple[Format, ...]] = ("png", "psd", "pptx", "zip", "html")
MOST_LAYERS: Final = 20  # as recipe.rollout.max_layers
AUTO_LAYERS: Final = (2, 3, 4, 5)  # the counts that models are trained with
MOST_MEGAPIXELS: Final = 100.0


class DecomposeOptions(Record):
    """Everything but the pictures and the folder. `recipe` is YAML text; a value of None is the recipe's."""

    adapter: str | None = None  # a folder or file in any trainer's layout, a campaign, s3://..., or a hub id
    recipe: str | None = None  # of which model, resolution and evaluation.steps are used
    base: str | None = None  # in place of a recipe: "tiny", "tiny-faulty", a folder, s3://..., or a hub id
    layers: int | Literal["auto"] = 4
    sampler: Literal["heun", "euler"] = "heun"
    steps: int | None = Field(default=None, ge=1)
    guidance: float = Field(default=1.0, ge=1)  # 1 is none
    resolution: int | None = Field(default=None, ge=16)  # longest side that the model works at, pixels
    seed: int = Field(default=0, ge=0)
    drop_blank: bool = False
    formats: tuple[Format, ...] = FORMATS
    batch_size: int | None = Field(default=None, ge=1)

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        try:
            count = value if value == "auto" else int(value)
        except (TypeError, ValueError):
            count = 0
        if count != "auto" and not 1 <= count <= MOST_LAYERS:
            raise ValueError(f"options.layers is {value}: choose 1..{MOST_LAYERS}, or auto")
        return count

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.recipe is not None and self.base is not None:
            raise ValueError(f"both recipe and base ({self.base}) are given: a recipe names its base, leave out one")
        if not self.formats:
            raise ValueError(f"formats is empty: choose some of {', '.join(FORMATS)}")
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of layers that are tried."""
        return AUTO_LAYERS if self.layers == "auto" else (self.layers,)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Options from values by name.

        Raises:
            LayerloopError: an unknown name or an impossible value, in one line.
        """
        formats = values.get("formats", FORMATS)
        unknown = [name for name in formats if name not in FORMATS]
        if unknown:
            raise LayerloopError(f"format {unknown[0]!r} is not known: choose some of {', '.join(FORMATS)}")
        return validate(cls, values, where="options")
