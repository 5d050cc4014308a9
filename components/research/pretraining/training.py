"""Shared parts of the trainings: a budget in steps, an averaged copy of the weights, checkpoints, progress lines."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Length, batch size and learning rate of a training, and the folder of its checkpoints."""

    work: Path
    steps: int
    batch: int
    peak: float  # learning rate
    seed: int


class Averaged:
    """Exponential moving average of a module's parameters; the average forgets over the last `1 / (1 - decay)`
    steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's parameters after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the average into `module`."""
        for parameter, average in zip(module.parameters(), self.shadow, strict=True):
            parameter.copy_(average)


class Training:
    """A resumable optimisation of one module over `steps` steps, the learning rate decaying by a cosine.

    A checkpoint holds everything but the data, which follows from the seed and the step: where it was stopped and how
    busy the machine was do not change what is drawn. Continuing with more `steps` than before raises the rate again.
    """

    def __init__(self, name: str, module: nn.Module, schedule: Schedule, *, decay: float = 0.999) -> None:
        self.name, self.module, self.schedule = name, module, schedule
        self.checkpoint = schedule.work / f"{name}.pt"
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=schedule.peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.average = Averaged(module, decay)
        self.step, self.spent = 0, 0.0
        self._last_step_at = time.monotonic()
        self._saved_at = self._logged_at = self._last_step_at
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.shadow = state["average"]
            self.step, self.spent = state["step"], state["spent"]
            print(f"{name}: continues at step {self.step} after {self.spent / 60:.1f} min", flush=True)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.schedule.steps

    def start_clock(self) -> None:
        """Count from now, so that a step's time does not include making the data."""
        self._last_step_at = self._saved_at = self._logged_at = time.monotonic()

    def advance(self, loss: torch.Tensor, clip: float = 1.0) -> None:
        """Take one optimizer step on `loss`; a checkpoint is written every two minutes."""
        rate = learning_rate(self.step / self.schedule.steps, self.schedule.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        else:
            print(f"{self.name}: step {self.step} left out, gradient norm {norm:.2g}", flush=True)
        self.step += 1
        self.average.update(self.module, self.step)
        now = time.monotonic()
        self.spent += now - self._last_step_at
        self._last_step_at = now
        if now - self._saved_at > 120 or self.done:
            self.save()
            self._saved_at = now

    def log(self, figures: dict[str, float], every: float = 20.0) -> None:
        """A progress line every `every` seconds."""
        now = time.monotonic()
        if now - self._logged_at < every and not self.done:
            return
        self._logged_at = now
        values = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        per_step = self.spent / max(1, self.step)
        print(
            f"{self.name}: step {self.step} of {self.schedule.steps}  {1000 * per_step:.0f} ms per step  "
            f"{per_step * (self.schedule.steps - self.step) / 60:.0f} min left  {values}",
            flush=True,
        )

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.shadow,
            "step": self.step,
            "spent": self.spent,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)


def learning_rate(progress: float, peak: float, warm_up: float = 0.02) -> float:
    """Linear warm-up, then a cosine to a hundredth of `peak`; `progress` in [0, 1]."""
    if progress < warm_up:
        return peak * max(progress, 1e-3) / warm_up
    along = min(1.0, (progress - warm_up) / (1 - warm_up))
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * along)) / 2)


def restore_average(module: nn.Module, checkpoint: Path) -> int:
    """Put a checkpoint's averaged weights into `module`; returns its step. Raises FileNotFoundError where there is
    none."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint} does not exist: run that stage of the training first")
    state = torch.load(checkpoint, weights_only=True)
    with torch.no_grad():
        for parameter, average in zip(module.parameters(), state["average"], strict=True):
            parameter.copy_(average)
    module.eval().requires_grad_(False)
    return int(state["step"])
