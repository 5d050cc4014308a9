"""What the training metrics count."""

from __future__ import annotations

import pytest
import torch

from layerloop.components.update_lora.diagnostics import Diagnostics


def columns(values: list[float]) -> dict[str, torch.Tensor]:
    numbers = torch.tensor(values)
    named = dict.fromkeys(
        ("loss", "ratio_excess", "log_ratio", "replay_noise_squared", "velocity_gradient", "kl"), numbers
    )
    clips = dict.fromkeys(("clipped_low", "clipped_high"), numbers > 1)
    return {"points": torch.ones_like(numbers), "ratio_excess_squared": numbers**2, **named, **clips}


def test_padding_counts_for_nothing_in_any_metric() -> None:
    """A point of weight 0 only keeps ranks in step: whatever came of it, the metrics are those without it."""
    plain, padded = Diagnostics(2), Diagnostics(2)
    timesteps = torch.tensor([0, 1, 1])
    plain.add(timesteps, torch.tensor([1.0, 1.0, 0.5]), first=True, **columns([0.25, 0.5, 2.0]))
    padded.add(timesteps, torch.tensor([1.0, 1.0, 0.5]), first=True, **columns([0.25, 0.5, 2.0]))
    padded.add(timesteps, torch.zeros(3), first=True, **columns([7.0, 8.0, 9.0]))
    padded.add(torch.tensor([0, 1]), torch.tensor([0.0, 0.0]), first=False, **columns([70.0, 80.0]))
    assert padded.per_timestep() == plain.per_timestep()
    assert padded.summary() == plain.summary()


def test_a_mean_is_over_points_whatever_their_weights() -> None:
    diagnostics = Diagnostics(2)
    weights = torch.tensor([1.0, 0.25, 1.0])
    diagnostics.add(torch.tensor([0, 0, 1]), weights, first=True, **columns([1.0, 3.0, 8.0]))
    assert diagnostics.per_timestep()["loss"] == [2.0, 8.0]
    assert diagnostics.summary()["loss"] == 4.0
    assert diagnostics.per_timestep()["clip_fraction_low"] == [0.5, 1.0]
    assert diagnostics.summary()["ratio_mean"] == 5.0


def test_the_first_log_ratio_is_of_the_first_optimizer_step_alone() -> None:
    diagnostics = Diagnostics(1)
    diagnostics.add(torch.tensor([0]), torch.ones(1), first=True, **columns([1.0]))
    diagnostics.add(torch.tensor([0]), torch.ones(1), first=False, **columns([5.0]))
    assert diagnostics.summary()["first_log_ratio_abs"] == 1.0
    assert diagnostics.summary()["log_ratio_abs"] == 3.0


def test_an_algorithm_without_a_ratio_has_no_metrics_of_one() -> None:
    diagnostics = Diagnostics(1)
    few = {name: value for name, value in columns([2.0]).items() if name in ("points", "loss", "velocity_gradient")}
    diagnostics.add(torch.tensor([0]), torch.ones(1), first=True, **few)
    assert diagnostics.summary() == pytest.approx({"loss": 2.0, "velocity_gradient": 2.0})
