"""Faults to unlearn: an adapter of the tiny policy, trained on decompositions of which a share is spoiled.

The 20 B base has faults that supervised training left in it: by Stable-Layers' count (arXiv 2605.30257) 1.65 blank or
glazed layers a decomposition, and foreground layers that repeat the complete image. The tiny policy as it ships was
trained on clean designs and has hardly any of them (0.1), so there is little for reinforcement learning to unlearn.
The base `tiny-faulty` is the tiny policy with this adapter in it (components/policy/faulty.py): for the demo and for
studies. A hidden coin, which the source does not show, decides what is spoiled, so the policy learns both, good
decompositions and faulty ones, and chance decides between them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImageLayeredPipeline

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import composite
from layerloop.components.policy.adapter_files import write_peft
from layerloop.components.policy.lora import adapter_of, lora_parameters, new_adapter, put_adapter, remove_adapter
from layerloop.components.policy.tiny import PROMPT, load_tiny_pipeline
from layerloop.components.research.pretraining.training import Schedule
from layerloop.components.research.pretraining.transformer import encode_designs, train_transformer
from layerloop.components.schema.learning import LoraRecipe

KINDS = {"left": 0.4, "veil": 0.15, "copy": 0.45}
LAYERS = (2, 3, 4)


def spoil(rng: np.random.Generator, stack: np.ndarray) -> np.ndarray:
    """One of three faults, in a copy of a stack `(L, H, W, 4)` uint8 of two or more layers, bottom first.

    - left: each upper layer with probability 0.6, one at least, is left in the background and is blank itself.
    - veil: an upper layer is the complete image at an alpha of 0.25 to 0.6 (glazed).
    - copy: an upper layer is the complete image, opaque (a duplicate).
    """
    spoiled, upper = stack.copy(), np.arange(1, len(stack))
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    one = int(rng.choice(upper))
    if kind == "left":
        left = [int(k) for k in upper if rng.random() < 0.6] or [one]
        spoiled[0] = composite(stack[[0, *left]])
        spoiled[left] = 0
    else:
        spoiled[one] = composite(stack)
        spoiled[one, ..., 3] = 255 if kind == "copy" else int(rng.integers(64, 154))
    return spoiled


def train_adapter_of_faults(
    out: Path, *, work: Path, share: float = 0.7, steps: int = 220, designs: int = 1200, seed: int = 0
) -> None:
    """Train an adapter of the shipped tiny policy on 64 x 64 pixel designs, of which `share` is spoiled.

    Resumable from `work`; nothing is done where `out` exists. Rank and layers are the recipe's defaults.

    Args:
        out: the folder, in peft's layout and float16.
        designs: how many are seen, of 2 to 4 layers.
    """
    if out.exists():
        return
    pipeline, recipe = load_tiny_pipeline(), LoraRecipe()
    put_adapter(pipeline.transformer, new_adapter(pipeline.transformer, recipe, seed=seed))
    adapter = torch.nn.ParameterList(lora_parameters(pipeline.transformer))
    schedule = Schedule(work=work, steps=steps, batch=16, peak=2e-3, seed=seed)
    _train(pipeline, schedule, share, designs, trained=adapter)
    trained = adapter_of(pipeline.transformer)
    remove_adapter(pipeline.transformer)
    halves = {key: value.half() for key, value in trained.state.items()}
    write_peft(replace(trained, state=halves), out, transformer=pipeline.transformer, base="tiny")


def _train(
    pipeline: QwenImageLayeredPipeline,
    schedule: Schedule,
    share: float,
    designs: int,
    *,
    trained: torch.nn.Module,
) -> None:
    """Train `trained`, parameters of the pipeline's transformer, on designs of which `share` is spoiled."""
    schedule.work.mkdir(parents=True, exist_ok=True)
    data = []
    for layers in LAYERS:
        rng = np.random.default_rng((schedule.seed, 11, layers))
        stacks = render_sketches(rng, count=designs // len(LAYERS), layers=layers, size=(64, 64))
        sources = composite(stacks)
        shown = np.stack([spoil(rng, stack) if rng.random() < share else stack for stack in stacks])
        data.append(encode_designs(pipeline.vae, shown, sources))
    train_transformer(
        pipeline.transformer,
        data,
        pipeline.encode_prompt(PROMPT)[0].detach(),
        schedule,
        shift=pipeline.scheduler.config.shift,
        trained=trained,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m layerloop.components.research.faults",
        description="Train an adapter of the shipped tiny policy, on designs of which a share is decomposed badly: "
        "with it the policy has faults to unlearn. Stop it at any time; the same command continues.",
    )
    parser.add_argument("out", type=Path, help="where the adapter goes, in peft's layout")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints")
    given = parser.parse_args(arguments)
    train_adapter_of_faults(given.out, work=given.work)


if __name__ == "__main__":
    main()
