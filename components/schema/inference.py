"""How layers are sampled at inference, and the samplers that an evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Inference:
    """How layers are sampled at inference. The released model's settings are Heun, 50 steps and no guidance; by its
    authors' account others give garbled results."""

    steps: int
    sampler: Literal["heun", "euler"] = "heun"
    guidance: float = 1.0  # weight of the prompt's velocity against the blank prompt's; 1 is no guidance

    @property
    def calls(self) -> int:
        """Model calls for one image: two per Heun step, one for the last; twice as many with guidance."""
        calls = 2 * self.steps - 1 if self.sampler == "heun" else self.steps
        return calls if self.guidance == 1 else 2 * calls

    @property
    def name(self) -> str:
        """For files: `euler-20`, `heun-50-guidance-4`."""
        return f"{self.sampler}-{self.steps}" + (f"-guidance-{self.guidance:g}" if self.guidance != 1 else "")


REFERENCE: Final = Inference(50)  # the released model's own
# Of a comparison of samplers: without guidance, and with the default of diffusers' pipeline.
COMPARED: Final = tuple(
    how
    for guidance in (1.0, 4.0)
    for how in (
        *(Inference(steps, "euler", guidance) for steps in (10, 20, 30, 50)),
        *(Inference(steps, "heun", guidance) for steps in (25, 50)),
    )
)
# Images that are compared on, at most: all of COMPARED are 1,548 model calls an image, of base and adapter.
COMPARED_CASES: Final[dict[Literal["designs", "pictures"], int]] = {"designs": 24, "pictures": 8}
