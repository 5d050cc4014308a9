"""The weights of a policy that are evaluated and published."""

from __future__ import annotations

from layerloop.components.schema.manifest import File, Manifest

AVERAGE, SAMPLING = "ema.safetensors", "adapter_model.safetensors"


def final_weights(policy: Manifest) -> File:
    """The average, where the recipe keeps one (`update.ema`), else the weights that sample next.

    Both are in peft's layout, with the same `adapter_config.json`.
    """
    averaged = any(file.base_name == AVERAGE for file in policy.files)
    return policy.file(AVERAGE if averaged else SAMPLING)
