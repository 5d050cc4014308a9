"""Pretrain the tiny layered policy on generated designs and export it in diffusers' layout.

Four stages, each resumable from the work folder: the autoencoder learns to carry RGBA frames, the transformer learns to
decompose on its latents, the decoder alone learns for longer (the latents stay), and the export measures all of it on
held-out designs and writes the folder that `layerloop.components.policy.tiny.tiny_folder` names. It is not
a step of the pipeline: it makes the weights that the repository ships.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageLayeredPipeline
from PIL import Image

from layerloop.components.layers.designs import render_sketches
from layerloop.components.policy.tiny import PROMPT, build_tiny_pipeline, save_pipeline
from layerloop.components.research.pretraining.autoencoder import (
    draw_frames,
    measure_autoencoder,
    refine_decoder,
    train_autoencoder,
)
from layerloop.components.research.pretraining.measure import (
    compare,
    composite_everywhere,
    contact_sheet,
    measure_policy,
    sample,
)
from layerloop.components.research.pretraining.training import Schedule, restore_average
from layerloop.components.research.pretraining.transformer import (
    Latents,
    draw_latents,
    encode_designs,
    train_transformer,
)

STAGES = ("autoencoder", "transformer", "decoder", "export")


@dataclass(frozen=True)
class Pretraining:
    """Stages, lengths and amounts of data of a pretraining; the defaults made the weights that ship."""

    work: Path  # checkpoints
    out: Path  # the finished pipeline
    stages: Sequence[str] = STAGES
    autoencoder_steps: int = 4000
    transformer_steps: int = 12000
    decoder_steps: int = 2000
    frames_from: int = 12_000  # designs that the autoencoder's frames are taken from
    designs: int = 40_000  # that the transformer sees
    measured: int = 48  # designs of every layer count that the export is measured on
    seed: int = 0

    def schedule(self, steps: int, *, batch: int, peak: float) -> Schedule:
        """The schedule of one stage."""
        return Schedule(work=self.work, steps=steps, batch=batch, peak=peak, seed=self.seed)


def run(p: Pretraining) -> None:
    """Pretrain by stages.

    Raises:
        FileNotFoundError: a stage lacks the output of an earlier one; the message names that stage.
    """
    p.work.mkdir(parents=True, exist_ok=True)
    pipeline = build_tiny_pipeline(seed=p.seed)
    prompt = pipeline.encode_prompt(PROMPT)[0].detach()

    encoder_folder = p.work / "vae"
    if "autoencoder" in p.stages:
        schedule = p.schedule(p.autoencoder_steps, batch=32, peak=1e-3)
        train_autoencoder(pipeline.vae, schedule, designs=p.frames_from)
        pipeline.vae.save_pretrained(encoder_folder)
    elif encoder_folder.is_dir():
        pipeline.vae = type(pipeline.vae).from_pretrained(encoder_folder).eval().requires_grad_(False)
    else:
        raise FileNotFoundError(f"{encoder_folder} does not exist: run the stage `autoencoder` first")

    if "transformer" in p.stages:
        train_transformer(
            pipeline.transformer,
            _latents(pipeline.vae, designs=p.designs, seed=p.seed, cache=p.work / "latents.pt"),
            prompt,
            p.schedule(p.transformer_steps, batch=64, peak=1e-3),
            shift=pipeline.scheduler.config.shift,
        )
    if "decoder" in p.stages:
        refine_decoder(pipeline.vae, p.schedule(p.decoder_steps, batch=32, peak=6e-4), designs=p.frames_from)
        pipeline.vae.save_pretrained(p.work / "vae-refined")
    elif (p.work / "vae-refined").is_dir():
        pipeline.vae = type(pipeline.vae).from_pretrained(p.work / "vae-refined").eval().requires_grad_(False)
    if "export" in p.stages:
        steps = restore_average(pipeline.transformer, p.work / "transformer.pt")
        export(pipeline, prompt, work=p.work, out=p.out, steps=steps, designs=p.measured)


def _latents(vae: AutoencoderKLQwenImage, *, designs: int, seed: int, cache: Path) -> list[Latents]:
    """The encoded designs, kept in `cache` so that a resumed training does not encode them again."""
    if cache.exists():
        return [Latents(layers, tuple(grid), frames) for layers, grid, frames in torch.load(cache, weights_only=True)]
    data = draw_latents(vae, designs=designs, seed=seed)
    partial = cache.with_suffix(".partial")
    torch.save([(part.layers, part.grid, part.frames) for part in data], partial)
    partial.replace(cache)
    return data


@torch.no_grad()
def export(
    pipeline: QwenImageLayeredPipeline, prompt: torch.Tensor, *, work: Path, out: Path, steps: int, designs: int
) -> None:
    """Measure on held-out designs, print, and replace `out` by the pipeline, `steps` steps old, and its figures."""
    held_out = np.random.default_rng((77, 5))
    figures: dict[str, object] = {
        "transformer_steps": steps,
        "autoencoder": measure_autoencoder(pipeline.vae, draw_frames(held_out, designs=4 * designs, side=64)),
        "policy": measure_policy(pipeline, prompt, designs=designs),
    }
    for layers, row in figures["policy"].items():  # type: ignore[attr-defined]
        truth = render_sketches(np.random.default_rng((77, 9, layers)), count=designs, layers=layers, size=(64, 64))
        trivial = compare(composite_everywhere(truth), truth)
        print(f"{layers} layers: " + "  ".join(f"{name} {row[name]:.3f} ({trivial[name]:.3f})" for name in row))
    print(f"(in brackets: every layer = the composite)  autoencoder: {figures['autoencoder']}", flush=True)

    sheets = []
    for layers in (2, 3, 4):
        stacks = render_sketches(
            np.random.default_rng((77, 8, layers)), count=min(6, designs), layers=layers, size=(64, 64)
        )
        made = sample(pipeline, encode_designs(pipeline.vae, stacks), prompt)
        sheets.append(np.concatenate([contact_sheet(stacks), contact_sheet(made)], axis=1))
    width = max(sheet.shape[1] for sheet in sheets)
    padded = [np.pad(sheet, ((0, 0), (0, width - sheet.shape[1]), (0, 0)), constant_values=255) for sheet in sheets]
    Image.fromarray(np.concatenate(padded).repeat(2, 0).repeat(2, 1)).save(work / "sheet.png")

    staged = out.parent / f".{out.name}.new"
    replaced = out.parent / f".{out.name}.old"
    for folder in (staged, replaced):
        shutil.rmtree(folder, ignore_errors=True)
    save_pipeline(pipeline, staged)
    (staged / "pretraining.json").write_text(json.dumps(_rounded(figures), indent=1) + "\n")
    for file in staged.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    if out.exists():
        out.rename(replaced)
    staged.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out}, {size / 1e6:.2f} MB; contact sheet at {work / 'sheet.png'}", flush=True)


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m layerloop.components.research.pretraining",
        description="Pretrain the tiny layered policy on generated designs and export it in diffusers' layout. "
        "Stop it at any time; the same command continues.",
    )
    parser.add_argument("--work", type=Path, default=Path("build/pretrain"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_package_folder(), help="where to export (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them")
    parser.add_argument("--autoencoder-steps", type=int, default=4000, metavar="N", help="default: %(default)s")
    parser.add_argument("--transformer-steps", type=int, default=12000, metavar="N", help="default: %(default)s")
    parser.add_argument("--decoder-steps", type=int, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--frames-from",
        type=int,
        default=12_000,
        metavar="N",
        help="designs behind the autoencoder's frames (default: %(default)s)",
    )
    parser.add_argument(
        "--designs",
        type=int,
        default=40_000,
        metavar="N",
        help="designs the transformer sees, 10 kB each in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--measured",
        type=int,
        default=48,
        metavar="N",
        help="held-out designs of every layer count that the export is measured on (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    try:
        run(Pretraining(**vars(parser.parse_args(arguments))))
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from None


def _package_folder() -> Path:
    from layerloop.components import policy

    return Path(str(policy.__file__)).parent / "tiny-weights"


if __name__ == "__main__":
    main()
