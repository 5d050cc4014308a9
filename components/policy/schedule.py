"""The noise schedule of the flow-matching policy."""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmas(scheduler: Any, steps: int, *, condition_tokens: int) -> tuple[float, ...]:
    """The schedule of `steps` steps, `steps + 1` float32 values from 1 to 0, from the loaded scheduler's own config.

    As in diffusers' layered pipeline: uniform 1 .. 1/steps, shifted with mu = sqrt(condition tokens / 256), where the
    condition is one frame (1600 tokens at 640x640 give mu = 2.5); a scheduler without dynamic shifting ignores mu.
    """
    scheduler = type(scheduler).from_config(scheduler.config)  # set_timesteps changes it
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 0, steps + 1)[:-1], mu=(condition_tokens / 256) ** 0.5, device="cpu"
    )
    return tuple(scheduler.sigmas.tolist())
