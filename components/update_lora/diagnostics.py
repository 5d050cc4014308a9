"""Training metrics of one update, per timestep: summed over points on each rank, then over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerloop.components.runtime.distributed import all_reduce_sum

COLUMNS = (
    "points", "loss", "ratio_excess", "ratio_excess_squared", "clipped_low", "clipped_high", "log_ratio",
    "first_points", "first_log_ratio", "replay_noise_squared", "velocity_gradient", "kl",
)  # fmt: skip


@dataclass
class Diagnostics:
    """Sums over points, `sums[timestep, column]` in float64, and one gradient norm per optimizer step."""

    timesteps: int
    gradient_norms: list[float] = field(default_factory=list)
    sums: Tensor = field(init=False)
    observed: set[str] = field(default_factory=set)  # columns that the algorithm records

    def __post_init__(self) -> None:
        self.sums = torch.zeros(self.timesteps, len(COLUMNS), dtype=torch.float64)

    def add(self, timesteps: Tensor, weights: Tensor, *, first: bool, **values: Tensor) -> None:
        """Add values `[P]` of the points whose weight is not 0 (padding, which only keeps ranks in step).

        Args:
            first: whether they belong to the iteration's first optimizer step.
        """
        if first:
            values |= {f"first_{name}": values[name] for name in ("points", "log_ratio") if name in values}
        counted = (weights > 0).cpu()
        index = timesteps.cpu()[counted]
        self.observed |= values.keys()
        for name, value in values.items():
            column = self.sums[:, COLUMNS.index(name)]
            column.index_add_(0, index, value.detach().cpu().double()[counted])

    def reduce(self) -> None:
        """Sum over the ranks."""
        all_reduce_sum([self.sums])

    def per_timestep(self) -> dict[str, list[float]]:
        """Means over the points of each timestep, of the columns that the algorithm records (some have no ratio).

        `clip_fraction_*` counts the points whose gradient the clip stopped. `first_log_ratio_abs` is the mean |log r|
        in the first optimizer step, 0 by construction. `replay_noise` is the root mean square of (x' - mu_old) / s:
        1 up to sampling noise if and only if the rollout sampled from the policy that is replayed here.
        `velocity_gradient` is the norm of a point's gradient with respect to the velocity: what gradient reweighting
        evens out.
        """
        return {name: row.tolist() for name, row in self._means(self.sums).items()}

    def summary(self) -> dict[str, float]:
        """The means of `per_timestep` over all timesteps together, for the metrics."""
        return {name: float(row) for name, row in self._means(self.sums.sum(0, keepdim=True)).items()}

    def _means(self, sums: Tensor) -> dict[str, Tensor]:
        columns = {name: sums[:, i] for i, name in enumerate(COLUMNS)}
        points, first = columns["points"].clamp_min(1), columns["first_points"].clamp_min(1)
        means = {"loss": columns["loss"] / points, "velocity_gradient": columns["velocity_gradient"] / points}
        if "kl" in self.observed:
            means["kl"] = columns["kl"] / points
        if "ratio_excess" in self.observed:  # of the ratio over 1: it may be as small as 1e-6, which 1 + x would round
            excess = columns["ratio_excess"] / points
            means |= {
                "ratio_mean": 1 + excess,
                "ratio_std": (columns["ratio_excess_squared"] / points - excess**2).clamp_min(0).sqrt(),
                "clip_fraction_low": columns["clipped_low"] / points,
                "clip_fraction_high": columns["clipped_high"] / points,
                "log_ratio_abs": columns["log_ratio"] / points,
                "first_log_ratio_abs": columns["first_log_ratio"] / first,
                "replay_noise": (columns["replay_noise_squared"] / points).sqrt(),
            }
        return means
